r"""How answers are written: each way of writing one thing made one way, LaTeX's. Nothing here is compared."""

import re
import unicodedata
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction

_NAMED = {
    **{"×": "times", "·": "cdot", "⋅": "cdot", "π": "pi", "∞": "infty", "≤": "le", "≥": "ge", "≠": "ne"},
    **{"≈": "approx", "±": "pm", "∪": "cup", "∩": "cap", "∈": "in", "∅": "emptyset", "¬": "neg"},
    **{"ℝ": "mathbb{R}", "ℤ": "mathbb{Z}", "ℕ": "mathbb{N}", "ℚ": "mathbb{Q}", "ℂ": "mathbb{C}"},
    **dict.fromkeys("→⇒⟹⟶⇔↦", "to"),
}
_SIGNS = str.maketrans(
    {sign: rf"\{name} " for sign, name in _NAMED.items()}
    | dict(zip("−–∕⁄÷，；（）′’⟨⟩。、", "--///,;()''().,", strict=True))
    | dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\u00ad", "")
    | {"°": r"^\circ "}
)
NUMBER = r"(?:\d+(?:\.\d*)?|\.\d+)"
_SCALES = {"thousand": "3", "million": "6", "billion": "9", "trillion": "12"}
_UPRIGHT = r"\\(?:(?:math|text)(?:rm|bf|it|sf|tt|normal)?|underline|mbox)\s*"
_ORDINAL = rf"(?:{_UPRIGHT})?\{{\s*(?:st|nd|rd|th)\s*\}}"
_CLEANING: list[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]] = [
    (re.compile(r"<<[^<>]*>>"), ""),  # gsm8k's notes
    (re.compile(r"^\s*(?:\\approx|\\sim|[=:~])\s*|\\(?:bf|it|rm|sf)(?![A-Za-z])\s*"), ""),
    (re.compile(_UPRIGHT + r"\{\s*((?:[-+\d.,/ ]|\band\b|\bor\b)*\d[-+\d.,/ ]*)\}"), r"\1"),
    (re.compile(_UPRIGHT + r"\{\s*([ei])\s*\}"), r"\1"),
    (re.compile(rf"(?<=\d)(?:(?:st|nd|rd|th)(?![A-Za-z])|\^?\s*{_ORDINAL}|\^\{{{_ORDINAL}\}})"), ""),  # 3rd
    (re.compile(r"(?<![\\A-Za-z])(sin|cos|tan|cot|csc|ln|log|exp)(?![A-Za-z])"), r"\\\1"),
    (re.compile(r"\\log_\{?e\}?(?![A-Za-z])"), r"\\ln"),
    (re.compile(r"(?<=[\d}])\s*(?:percent|per cent|pct)\b"), r"\\%"),
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\frac\s*(\d)\s*(\d)"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\frac\s*\{([^{}]*)\}\s*(\d)"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\frac\s*(\d)\s*\{"), r"\\frac{\1}{"),
    (re.compile(r"\{([^{}]*)\\over(?![A-Za-z])([^{}]*)\}"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\langle(?![A-Za-z])"), "("),
    (re.compile(r"\\rangle(?![A-Za-z])"), ")"),
    (re.compile(r"(?<=[)\]])\s*[Uu]\s*(?=[(\[])"), r"\\cup "),  # (0,1) U (2,3)
    (
        re.compile(rf"(?<![\w.])({NUMBER})\s+(thousand|million|billion|trillion)\b"),
        lambda m: _plain(m[1], _SCALES[m[2]]),
    ),
    (re.compile(r"(?<![\\A-Za-z])(pi|infinity)(?![A-Za-z])"), lambda m: {"pi": r"\pi"}.get(m[1], r"\infty")),
    (re.compile(r"(?<![\w.,/])(\d+)\s+(\d+)\s*/\s*(\d+)(?![\w.])"), r"\1 \\frac{\2}{\3}"),  # 1 1/2
    (re.compile(rf"(?<![\w.\\^{{])({NUMBER})[eE]([-+]?\d{{1,3}})(?![\w.{{])"), lambda m: _plain(m[1], m[2])),
    (
        re.compile(
            rf"(?<![\w.\\^{{])({NUMBER})\s*(?:\\times|\\cdot|\*|x(?=\s*10\s*\^))\s*10\s*\^\s*"
            r"(?:\{\s*([-+]?\d{1,3})\s*\}|(\d)(?!\d))"
        ),
        lambda m: _plain(m[1], m[2] or m[3]),
    ),
    (re.compile(r"\\dot\s*\{?(\d)\}?(\d*)\\dot\s*\{?(\d)\}?"), r"\\overline{\1\2\3}"),
    (
        re.compile(r"(?<!\d)(\d*)\.(\d*)(?:\\(?:overline|bar|dot)\s*(?:\{\s*(\d+)\s*\}|(\d))|\((\d+)\))"),
        lambda m: _repeating(m[1], m[2], m[3] or m[4] or m[5]),
    ),
    (
        re.compile(r"\^\s*(?:\{\s*(-?\d*\.\d+)\s*\}|(-?\d*\.\d+))"),  # 2^{0.5}
        lambda m: "^{{{0.numerator}/{0.denominator}}}".format(Fraction(m[1] or m[2])),
    ),
    (
        re.compile(r"(?<![A-Za-z\\])([A-Za-z])(?:('+)|\^\s*\{?\s*((?:\\prime\s*)+)\}?)(?![A-Za-z])"),
        lambda m: f"{m[1]}_{{{900 + len(m[2] or m[3].split())}}}",  # f' is not f
    ),
]
_ENDLESS = re.compile(r"(\.\d{0,20}?)(\d{1,20}?)\2+\s*(?:\.{2,}|\\[lc]?dots)")
"""0.1666... and 0.1212\\ldots: the shortest end that stands there twice, again and again."""
_BOLD = re.compile(r"(?<![\w)*])(\*\*|__|`+|\*)(?=\S)([^*`\n]{1,500}?)(?<=\S)\1(?![\w(*])")
_AROUND = re.compile(
    r"\$\$?([^$]+)\$\$?|\\\((.+)\\\)|\\\[(.+)\\\]|\\f?box(?:ed)?\s*\{((?:[^{}]|\{[^{}]*\})*)\}", re.DOTALL
)
_AT_ENDS = re.compile(
    r"^(?:(?:\\[,;:! ]|<[A-Za-z]\w*>)\s*)+|(?:\s*(?:\\[,;:!\\]|\\q?quad|</[A-Za-z]\w*>))+\s*$"
)
"""Space of LaTeX around an answer, and the tag that closes it."""
_POWER = re.compile(r"(?<=[\w)\]}])\*\*\s*(-?\w+|\([^()]*\))")
"""As Python writes it: x**2."""

_START = r"(?<![\d.,(\[])(?<!\\\{)"
_EUROPEAN = re.compile(_START + r"(\d{1,3}(?:[. ']\d{3})+),(\d\d?)(?!\d|,)")
_GROUPED = re.compile(
    _START + r"(?:\d{1,3}(?:,(?:\\! ?)?\d{3})+|\d{1,2}(?:,\d\d)+,\d{3}|\d{1,3}(?:\.\d{3}){2,}"
    r"|\d{1,3}(?:(?:[ '_~]|\{,\}|\\[,;:! ])\d{3})+)(?!\d|[,_]\d)"
)
"""1,000; 12,34,567; 1.000.000; 1 000, 1'000, 1_000, 1{,}000, 1,\\!000, 1\\,000. Not (100,200)."""


def clean(text: str) -> str:
    """`text` without Markdown, Unicode's digits and signs as LaTeX, numbers in plain digits."""
    if not text.isascii():
        text = _as_latex(text)
    text = _AT_ENDS.sub("", text.strip())
    text = _ENDLESS.sub(lambda m: m[1] + m[2] * 20, text)
    text = _BOLD.sub(r"\2", text)
    for _ in range(2):  # **$42$.**
        text = text.strip("*") if text.startswith("*") else text.removesuffix("**")
        text = text.lstrip("`# ").rstrip("`.,;:?\n ") or text
        if found := _AROUND.fullmatch(text):
            text = next(inside for inside in found.groups() if inside is not None)
    text = re.sub(r"\\varnothing|\\\{\s*\\\}", r"\\emptyset ", text)
    text = _POWER.sub(r"^{\1}", re.sub(r"^\$([^$]+)\$(?=\s*[^$]+$)", r"\1", text))  # $12$ cm
    text = _EUROPEAN.sub(lambda m: f"{re.sub('[. ]', '', m[1])}.{m[2]}", text)
    text = _GROUPED.sub(lambda m: re.sub(r"\D", "", m[0]), text)
    for pattern, plain in _CLEANING:
        text = pattern.sub(plain, text)
    return text.strip()


def _as_latex(text: str) -> str:
    fold = lambda found: unicodedata.normalize("NFKC", found).translate(_SIGNS)
    text = re.sub("((?:\\d[\u0304\u0305])+)", lambda m: rf"\overline{{{m[0][::2]}}}", text)
    text = re.sub("[⁰¹²³⁴-⁹⁺⁻ⁿ]+", lambda m: f"^{{{fold(m[0])}}}", text)
    text = re.sub("[₀-₉₊₋]+", lambda m: f"_{{{fold(m[0])}}}", text)
    text = re.sub("[¼-¾⅐-⅞]", lambda m: r" \frac{{{}}}{{{}}}".format(*fold(m[0]).split("/")), text)
    root = lambda m: rf"\sqrt{'[3]' * (m[1] == '∛')}{{{m[2] or m[3]}}}"
    text = re.sub(r"([√∛])\s*(?:\(([^()]*)\)|(\d+\.?\d*|[A-Za-z]))", root, text)
    text = re.sub("[ℝℤℕℚℂ]", lambda m: rf"\{_NAMED[m[0]]}", text)
    text = unicodedata.normalize("NFKC", text.replace("√", r"\sqrt")).translate(_SIGNS)
    return "".join(str(unicodedata.decimal(sign, sign)) for sign in text)


def _plain(number: str, exponent: str) -> str:
    """`1.5`, `3` -> 1500."""
    return format(Decimal(f"{number.replace(',', '')}e{exponent}"), "f")


def _repeating(whole: str, once: str, again: str) -> str:
    """``, `1`, `6` (0.1666...) -> \\frac{15}{90}."""
    value = int(whole + once + again) - int("0" + whole + once)
    return rf"\frac{{{value}}}{{{(10 ** len(again) - 1) * 10 ** len(once)}}}"
