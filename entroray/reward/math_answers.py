r"""Whether an answer is the reference: a text as text, anything else as mathematics, which is math-verify's.

A reference may stand in a sentence or a worked solution. Of an answer all that is written counts: it is one
expression, or one value among words (`42 dollars`). So a list of guesses is a list, and equal to no number.
"""

import math
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache
from itertools import accumulate
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
from sympy import Eq, MatrixBase, log, preorder_traversal

PLACES, DIGITS = 6, 15
"""Decimal places that decimals are compared to, and digits that exact numbers are."""
SMALL = 3
"""Zeros behind the point; a number with more of them is compared to as many places more."""
LOOSE = 2
"""Decimal places to which the sides of `x = 1/3 = 0.33` must agree."""
TINIEST = 20_000
"""Decimal places that are looked at."""
LONGEST = 2000
"""Characters of an answer beyond ten times its reference, from which on it is wrong unread."""
DEEPEST = 50
"""Brackets within each other, from which on an answer is wrong unread."""

# What is written in other ways, as LaTeX.

_NAMED = {
    **{"×": "times", "·": "cdot", "⋅": "cdot", "π": "pi", "∞": "infty", "≤": "le", "≥": "ge", "≠": "ne"},
    **{"≈": "approx", "±": "pm", "∪": "cup", "∩": "cap", "∈": "in", "∅": "emptyset", "¬": "neg"},
    **dict.fromkeys("→⇒⟹⟶⇔↦", "to"),
}
_SIGNS = str.maketrans(
    {sign: rf"\{name} " for sign, name in _NAMED.items()}
    | dict(zip("−–∕⁄÷，；（）", "--///,;()", strict=True))
    | dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\u00ad", "")
    | {"°": r"^\circ "}
)
_NUMBER = r"(?:\d[\d,]*\.?\d*|\.\d+)"
_SCALES = {"thousand": "3", "million": "6", "billion": "9", "trillion": "12"}
_CLEANING: list[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]] = [
    (re.compile(r"<<[^<>]*>>"), ""),  # gsm8k's notes
    (re.compile(r"(?<![\w)*])(\*\*|__|`+|\*)(?=\S)([^*`\n]{1,500}?)(?<=\S)\1(?![\w(*])"), r"\2"),  # **42**
    (re.compile(r"^\s*(?:\\approx|\\sim|[=:~])\s*|\\(?:bf|it|rm|sf)(?![A-Za-z])\s*"), ""),
    (re.compile(r"\\(?:(?:math|text)(?:rm|bf|it|sf|tt|normal)?|underline)\s*\{\s*([-+\d.,/ ]+)\s*\}"), r"\1"),
    (re.compile(r"(\^\{?\\circ\}?)\s*[CF](?![A-Za-z])"), r"\1"),
    (re.compile(r"\\(?:math|text)(?:rm|bf|it|sf)?\s*\{\s*([ei])\s*\}"), r"\1"),
    (re.compile(r"(?<![\\A-Za-z])(sin|cos|tan|cot|csc|ln|log)(?![A-Za-z])"), r"\\\1"),
    (re.compile(r"(?<=[\d}])\s*(?:percent|per cent|pct)\b"), r"\\%"),
    (
        re.compile(rf"(?<![\w.])({_NUMBER})\s+(thousand|million|billion|trillion)\b"),
        lambda m: _plain(m[1], _SCALES[m[2]]),
    ),
    (re.compile(r"(?<![\\A-Za-z])(pi|infinity)(?![A-Za-z])"), lambda m: {"pi": r"\pi"}.get(m[1], r"\infty")),
    (re.compile(r"(?<![\w.,/])(\d+)\s+(\d+)\s*/\s*(\d+)(?![\w.])"), r"\1 \\frac{\2}{\3}"),  # 1 1/2
    (re.compile(rf"(?<![\w.\\^{{])({_NUMBER})[eE]([-+]?\d{{1,3}})(?![\w.{{])"), lambda m: _plain(m[1], m[2])),
    (
        re.compile(
            rf"(?<![\w.\\^{{])({_NUMBER})\s*(?:\\times|\\cdot|\*)\s*10\s*\^\s*"
            r"(?:\{\s*([-+]?\d{1,3})\s*\}|(\d)(?!\d))"
        ),
        lambda m: _plain(m[1], m[2] or m[3]),
    ),
]
_AROUND = re.compile(r"\$\$?([^$]+)\$\$?|\\\((.+)\\\)|\\\[(.+)\\\]", re.DOTALL)
_AT_ENDS = re.compile(r"^(?:\\[,;:!]\s*)+|(?:\s*(?:\\[,;:!\\]|\\q?quad|</[A-Za-z]\w*>))+\s*$")
"""Space of LaTeX around an answer, and the tag that closes it."""
_POWER = re.compile(r"(?<=[\w)\]}])\*\*\s*(-?\w+|\([^()]*\))")
"""As Python writes it: x**2."""
_CURRENCY = re.compile(r"^([-+]?)\s*(?:\\?\$|US\$|[€£¥₹₽₩])\s*(?=[\d.])")


def clean(text: str) -> str:
    """`text` without Markdown, Unicode's digits and signs as LaTeX, e-notation in digits."""
    if not text.isascii():
        text = _as_latex(text)
    text = _AT_ENDS.sub("", text.strip())
    for _ in range(2):  # **$42$.**
        text = text.strip().lstrip("*`#").rstrip("*`.,;:\n ").strip()
        if found := _AROUND.fullmatch(text):
            text = next(inside for inside in found.groups() if inside is not None)
    text = text.replace(r"\varnothing", r"\emptyset")
    text = _POWER.sub(r"^{\1}", text)
    for pattern, plain in _CLEANING:
        text = pattern.sub(plain, text)
    return _CURRENCY.sub(r"\1", text).strip()


def _as_latex(text: str) -> str:
    fold = lambda found: unicodedata.normalize("NFKC", found).translate(_SIGNS)
    text = re.sub("[⁰¹²³⁴-⁹⁺⁻ⁿ]+", lambda m: f"^{{{fold(m[0])}}}", text)
    text = re.sub("[₀-₉₊₋]+", lambda m: f"_{{{fold(m[0])}}}", text)
    text = re.sub("[¼-¾⅐-⅞]", lambda m: r" \frac{{{}}}{{{}}}".format(*fold(m[0]).split("/")), text)
    text = re.sub(r"√\s*(?:\(([^()]*)\)|(\d+\.?\d*|[A-Za-z]))", lambda m: rf"\sqrt{{{m[1] or m[2]}}}", text)
    text = unicodedata.normalize("NFKC", text.replace("√", r"\sqrt")).translate(_SIGNS)
    return "".join(str(unicodedata.decimal(sign, sign)) for sign in text)


def _plain(number: str, exponent: str) -> str:
    """`1.5`, `3` -> 1500."""
    return format(Decimal(f"{number.replace(',', '')}e{exponent}"), "f")


# Text.

_STYLE = re.compile(r"\\(?:text\w*|math(?:rm|bf|it|sf)|mbox|operatorname|boxed|fbox)\s*\{([^{}]*)\}")
_SHORT = (
    "am an as at be by do go he if in is it me my no of oh ok on or so to up us we "  # English, and units
    "mm cm km mg kg ml ft mi oz lb hr pm Hz kW"
)
_WORD = re.compile(
    r"(?<![\\A-Za-z\d])(?<!_\{)(?!(?:exp|sqrt|lim|max|min|gcd|lcm|mod|det|sinh|cosh|tanh|arc\w+)(?![A-Za-z]))"
    rf"(?:(?:[A-Za-z]{{3,}}|(?i:{_SHORT.replace(' ', '|')}))(?:'[a-z]+|/[a-z]+)?(?:\^\{{?\d\}}?)?(?![A-Za-z])"
    r"|k?m/[sh]r?(?:\^\{?2\}?)?(?![A-Za-z])|[^\x00-\u03ff\W\d_]+)"
)
_NO_TEXT = re.compile(r"[\d\\^_=+*/<>|{}\[\]%!$&~]")
_DATE = re.compile(r"\d{4}-\d\d-\d\d|\d+(?:\.\d+){2,}")
_STATED = re.compile(r"\banswer\b(?:\s+is)?\s*:?|(?<=\w)\s+(?:is|are|equals)\b\s*:?", re.IGNORECASE)
_NO_NUMBER = re.compile(r"[-+]?(?:nan|inf)", re.IGNORECASE)


def is_text(text: str) -> bool:
    """Whether it is words, a date or 1.2.3, and no mathematics, which would read `cat` as a product."""
    bare = _STYLE.sub(r"\1", text)
    return bool(_DATE.fullmatch(bare) or (_WORD.search(bare) and not _NO_TEXT.search(bare)))


def same_text(reference: str, answer: str) -> bool:
    """By letters and digits alone, case aside; of a list in any order, unless it is in brackets."""
    wanted = _listed(reference)
    return wanted in (_listed(answer), _listed(_stated(answer)))


def _listed(text: str) -> list[str]:
    bare = _STYLE.sub(r" \1 ", text).strip()
    parts = re.split(r"[,;]|\band\b|\bor\b", bare)
    words = [re.sub(r"[\W_]+", "", part).casefold() for part in parts]
    return [word for word in (words if bare.startswith("(") and "," in bare else sorted(words)) if word]


def _stated(text: str, known: str = r"\S") -> str:
    """What stands behind the last `the answer is` that something `known` follows."""
    tails = (text[found.end() :] for found in reversed([*_STATED.finditer(text)]))
    return next((tail for tail in tails if re.search(known, tail)), text)


def _without_words(text: str) -> tuple[str, list[str]]:
    """The value among words, and these: `a total of $42 a day` -> (42, [total, of, day])."""
    bare = re.sub(r"\b(?:and|or)\b", ",", _STYLE.sub(r" \1 ", _stated(text, r"\d")))
    words = [word.casefold().removesuffix("s") for word in _WORD.findall(bare)]
    value = re.sub(r"\\?[$€£¥₹₽₩](?=\s*[\d.])", "", _WORD.sub(" ; ", bare))
    value = re.sub(r"\\?\$|\\[()\[\]]|[€£¥₹₽₩]|\b[aA]\b(?=\s)", " ; ", value)
    value = re.sub(r"\([\s;-]*\)", " ; ", value)
    return re.sub(r"[\s,.;]*;[\s,.;]*", " ; ", value).strip(" ;,.:="), words


# Values.

_DOUBT = re.compile(
    r"\\(?:\w*arrow|to|implies|iff|mapsto|leadsto|therefore|because|neg|lnot|not|neq?)(?![A-Za-z])|->|=>|!=|~~"
    r"|(?:\b(?:not|neither|nor|never)|n't)\s+(?:(?:be|equal|equals|to|exactly)\s+)*(?:[-+\d$\\(.]|the\b|a\b|right|correct)"
    r"|\b(?:wrong|incorrect)\b",
    re.IGNORECASE,
)
"""Arrows and negations; `20 of them are not sold` is neither."""
_ARITHMETIC = re.compile(r"[\d\s.+*/^()-]+")
_EQUALS = re.compile(r"(?<![\\<>!:])=")
_BASE = re.compile(r"\(?([0-9A-Fa-f]*\d[0-9A-Fa-f]*)\)?_\{?\s*\(?(?:\\text\{)?(\d+)\)?\}?\}?")
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!\d)")
_MARKS = re.compile(r"(?<!\\)\$|\\[()\[\]]")
_UNIT = re.compile(r"\\?%")
_PERCENT = re.compile(rf"(-?{_NUMBER})\s*\\?%")
_PLAIN_NUMBER = re.compile(rf"[-+]?{_NUMBER}(?:\s*\\?%)?")


@dataclass(frozen=True)
class Reference:
    """A reference, read once for all answers to its prompt."""

    text: str
    values: list[Any]
    """As math-verify reads it; of a number with words around it, the number."""
    words: list[str]


@lru_cache(maxsize=4096)
def read_reference(text: str) -> Reference | None:
    """None for a reference that math-verify can make nothing of, nor is a text."""
    cleaned = clean(text)
    if not cleaned or is_text(cleaned):
        return Reference(cleaned, [], []) if cleaned else None
    value, words = _without_words(cleaned)
    if words and _PLAIN_NUMBER.fullmatch(value):
        return Reference(cleaned, _read(value), words)
    values = parse(f"${_UNIT.sub('', cleaned)}$", parsing_timeout=None)
    return Reference(cleaned, values, words) if values else None


def is_equal(reference: Reference, answer: str) -> bool:
    """Whether an answer is the reference; it is not where it contradicts itself, negates or points on."""
    if _NO_NUMBER.fullmatch(reference.text) or len(answer) > LONGEST + 10 * len(reference.text):
        return False
    said = clean(answer)
    if _squeezed(said) == _squeezed(reference.text):
        return True
    if _depth(said) > DEEPEST:  # math-verify takes seconds over such, and finds nothing
        return False
    if is_text(reference.text):
        return same_text(reference.text, said)
    if _DOUBT.search(said) and not _DOUBT.search(reference.text):
        return False
    if (bases := _bases(reference.text, said)) is not None:
        return bases
    return any(
        _same_value(reference, text) or all(_same_value(reference, part) for part in text.split(" ; "))
        for text in _readings(reference, said)
    )


def _depth(text: str) -> int:
    """How many brackets are open, or closed too often, at most."""
    steps = ((sign in "([{") - (sign in ")]}") for sign in text)
    return max(map(abs, accumulate(steps)), default=0)


def _squeezed(text: str) -> str:
    """Without the white space that is none between digits: `4 2` is not 42, and `1 000` is 1000."""
    text = re.sub(r"(?<![\d.,])\d{1,3}(?: \d{3})+(?!\d)", lambda m: m[0].replace(" ", ""), text)
    return re.sub(r"\\(?:left|right|displaystyle)(?![A-Za-z])|\\[,;!: ]|(?<!\d)\s+|\s+(?!\d)", "", text)


def _readings(reference: Reference, said: str) -> Iterator[str]:
    """The answer as it stands, then without the words around its value, where they are not another unit."""
    value, words = _without_words(said)
    if "\n" in said and words:  # something is said behind the answer
        return
    if not _MARKS.search(said):  # else it is mathematics among words
        yield said
    if value == said or (reference.words and words != reference.words):
        return
    yield value
    last = ([part for part in value.split(" ; ") if "=" in part] or [value])[-1]
    if last != value:  # a sentence that ends in a sum: the sum counts
        yield re.sub(r"^\s*[-+*/=][^=]*=", "", last).strip(" =")


def _bases(reference: str, said: str) -> bool | None:
    """Whether two numerals with their bases (101_2) are the same; None where one has none."""
    ours, theirs = _BASE.fullmatch(reference), _BASE.fullmatch(said)
    if not ours or not theirs:
        return False if theirs and not 2 <= int(theirs[2]) <= 36 else None
    digits = lambda numeral: (numeral[1].lstrip("0").upper(), numeral[2])
    return digits(ours) == digits(theirs)


def _same_value(reference: Reference, said: str) -> bool:
    """50% is 50 and 0.5."""
    values = _read(said)
    if _equal(reference.values, values):
        return True
    if ("%" in reference.text) == ("%" in said):
        return False
    ours, theirs = (_PERCENT.sub(r"(\1/100)", text) for text in (reference.text, said))
    return _equal(_read(ours), values) if "%" in reference.text else _equal(reference.values, _read(theirs))


def _equal(ours: Sequence[Any], theirs: Sequence[Any], places: int = PLACES) -> bool:
    more = max((_zeros(value) for value in (*ours, *theirs)), default=0)
    return verify(
        list(ours),
        list(theirs),
        float_rounding=places + more,
        numeric_precision=DIGITS + more,
        timeout_seconds=None,
    )


def _zeros(value: Any) -> int:
    """How many more zeros than SMALL the smallest number in an expression has behind the point."""
    if isinstance(value, str):
        return 0
    nodes = value.flat() if isinstance(value, MatrixBase) else [value]
    return max((_zeros_of(node) for each in nodes for node in preorder_traversal(each)), default=0)


def _zeros_of(node: Any) -> int:
    if not _is_number(node) or not node.is_finite or node.is_Integer:
        return 0
    size = abs(node.evalf(3))
    if not size.is_Float or size >= 10.0**-SMALL or size == 0:
        return 0
    return min(TINIEST, math.ceil(-float(log(size, 10).evalf(6))) - SMALL)


def _read(text: str) -> list[Any]:
    """An answer as one whole expression, or nothing; nothing too where the sides of its equations differ."""
    text = " ".join(re.sub(r"\\(?:boxed|fbox)(?![A-Za-z])", "", text).split())
    whole = _THOUSANDS.sub(lambda m: m[0].replace(",", ""), text)
    text = whole if "," not in whole and re.search(r"[=+*/-]", whole) else text
    if "%" in text and "=" in text:  # 60% * 40% = 24%
        if not all(map(_agrees, _parsed(_PERCENT.sub(r"(\1/100)", text)))):
            return []
        text = text.rpartition("=")[2]
    found = _parsed(_UNIT.sub("", text))
    if len(_EQUALS.findall(text)) > 1 and not any(value.has(Eq) for value in found):
        return []  # what parsed is the last side alone
    return [value for value in found if _agrees(value)]


def _parsed(text: str) -> list[Any]:
    found = parse(f"${text}$", [LatexExtractionConfig()], "no_fallback", parsing_timeout=None)
    if not found and _ARITHMETIC.fullmatch(text):
        found = parse(text, [ExprExtractionConfig()], "no_fallback", parsing_timeout=None)
    return found


def _agrees(value: Any) -> bool:
    """Whether both sides of every equation in it are one number, where both are numbers: not 41 = 42."""
    equations = value.atoms(Eq) if not isinstance(value, MatrixBase) else ()
    sides = ((each.lhs, each.rhs) for each in equations)
    return all(_equal([a], [b], LOOSE) for a, b in sides if _is_number(a) and _is_number(b))


def _is_number(value: Any) -> bool:
    return bool(getattr(value, "is_number", False))
