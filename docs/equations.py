"""A formula as `describe()` prints it -> Markdown with its mathematics between dollar signs; LaTeX -> MathML.

`-min(r A, cap) where A > 0` becomes `$-\\min(r\\,A, \\text{cap})$ where $A > 0$`: words stay words, so that a
long formula is broken between them on a narrow screen.
"""

import re
from collections.abc import Iterator

TOKEN = re.compile(r"\s+|PPO's clip|\d(?:[\d.]*\d)?(?:e[+-]?\d+)?|[^\W\d_²]+(?:[_'][^\W\d_²]+)*|[<>]=|.")
FUNCTIONS = {
    "min",
    "max",
    "clip",
    "exp",
    "log",
    "ln",
    "std",
    "mean",
    "var",
    "sg",
    "KL",
    "sqrt",
    "mean_t",
    "mean_v",
}
NAMED = {"exp", "log", "ln"}
"""Functions that LaTeX has by name; its own min and max are drawn with space around them."""
QUANTITIES = {"correct", "length", "limit"}
"""Words of a formula that are factors in it."""
SIGNS = {
    **{"<=": r"\le", ">=": r"\ge", "·": r"\cdot", "×": r"\times", "±": r"\pm", "#": r"\#", "|": "|"},
    **{"²": "^2", "[": "[", "]": "]"},
}
LETTERS = {
    **{
        "π": r"\pi",
        "μ": r"\mu",
        "τ": r"\tau",
        "σ": r"\sigma",
        "ρ": r"\rho",
        "α": r"\alpha",
        "ε": r"\epsilon",
    },
    **{"Ω": r"\Omega", "Σ": r"\sum", "Π": r"\prod", "η": r"\eta"},
}
CLOSE = {"(": ")", "[": "]"}


def markdown_formula(text: str, settings: frozenset[str] = frozenset()) -> str:
    """`text` with its mathematics as LaTeX between dollar signs; `settings` are names of numbers in it."""
    return "".join(_pieces(TOKEN.findall(" ".join(text.split())), QUANTITIES | settings))


def _pieces(tokens: list[str], factors: frozenset[str] | set[str]) -> Iterator[str]:
    """Runs of mathematics between dollar signs, and what stands between them, as it is."""
    run: list[str] = []
    at = 0
    while at < len(tokens):
        end = _end(tokens, at)
        group = tokens[at:end]
        if _mathematical(group, factors):
            run += group
        elif len(group) > 1:  # in brackets with words: the brackets are text, what is within may be either
            yield from [*_flush(run), group[0], *_pieces(group[1:-1], factors), group[-1]]
            run = []
        else:
            yield from [*_flush(run), *group]
            run = []
        at = end
    yield from _flush(run)


def _end(tokens: list[str], at: int) -> int:
    """Where what begins at `at` ends: behind the bracket that closes it, or the next token."""
    close = CLOSE.get(tokens[at])
    depth = 0
    for place in range(at, len(tokens) if close else at):
        depth += (tokens[place] == tokens[at]) - (tokens[place] == close)
        if not depth:
            return place + 1
    return at + 1


def _mathematical(group: list[str], factors: frozenset[str] | set[str]) -> bool:
    if len(group) > 1:
        return all(token == "," or _mathematical([token], factors) for token in group)
    (token,) = group
    letter = len(token.partition("_")[0]) == 1 and token[0].isalpha() and token != "a"
    known = token in FUNCTIONS or token in factors or token in SIGNS or token[0].isdigit()
    return letter or known or token.isspace() or token in "+-/=<>()"


def _flush(run: list[str]) -> Iterator[str]:
    """The run as one formula; white space around it, and a sign that waits for words, are left outside."""
    before, core, after = re.fullmatch(r"(\s*)(.*?)(\s*[/=]?\s*)", "".join(run)).groups()  # type: ignore[union-attr]
    yield before
    yield f"${_latex(TOKEN.findall(core))}$" if re.search(r"[^\W_]", core) else core.replace("-", "−")
    yield after


def _latex(tokens: list[str]) -> str:
    """LaTeX of a run without words: what is written `(a) / (b)` or `π / π_old` becomes a fraction."""
    atoms = list(_atoms([token for token in tokens if not token.isspace()]))
    while (at := next((i for i in range(1, len(atoms) - 1) if _fraction(*atoms[i - 1 : i + 2])), 0)) > 0:
        atoms[at - 1 : at + 2] = [f"\\frac{{{_bare(atoms[at - 1])}}}{{{_bare(atoms[at + 1])}}}"]
    text = ""
    for before, atom in zip(["", *atoms], atoms, strict=False):
        text += (r"\," if _factors(before, atom) else " " if before else "") + atom
    return text


def _atoms(tokens: list[str]) -> Iterator[str]:
    """Each number, letter and sign as LaTeX, and each pair of brackets with what is within as one."""
    at = 0
    while at < len(tokens):
        end = _end(tokens, at)
        if end - at > 1:
            inner = _latex(tokens[at + 1 : end - 1])
            yield f"{tokens[at]}{inner}{tokens[end - 1]}"
        elif tokens[at] == "|" and "|" in tokens[at + 1 :]:
            end = tokens.index("|", at + 1) + 1
            yield f"\\left| {_latex(tokens[at + 1 : end - 1])} \\right|"
        elif tokens[at] == "sqrt":
            end = _end(tokens, at + 1)
            yield f"\\sqrt{{{_latex(tokens[at + 2 : end - 1])}}}"
        else:
            yield _atom(tokens[at])
        at = end


def _atom(token: str) -> str:
    if token[0].isdigit() and "e" in token:
        mantissa, _, power = token.partition("e")
        return ("" if mantissa == "1" else f"{mantissa} \\cdot ") + f"10^{{{int(power)}}}"
    base, _, below = token.partition("_")
    if len(base) > 1 and base not in FUNCTIONS and base.isalpha():
        return f"\\text{{{token}}}"
    name = f"\\{base}" if base in NAMED else f"\\operatorname{{{base}}}" if base in FUNCTIONS else ""
    known = name or SIGNS.get(base) or LETTERS.get(base) or base
    return known + (f"_{below}" if len(below) == 1 else f"_{{\\text{{{below}}}}}" if below else "")


def _fraction(above: str, sign: str, below: str) -> bool:
    bracketed = above.startswith("(") and below.startswith(("(", r"\sqrt"))
    return sign == "/" and (bracketed or (above.startswith(r"\pi") and below.startswith(r"\pi")))


def _bare(atom: str) -> str:
    return atom[1:-1] if atom.startswith("(") else atom


def _factors(before: str, atom: str) -> bool:
    """Do the two stand side by side as factors, and not as sign, function or bracket?"""
    signs = {"", "+", "-", "/", "=", "<", ">", ",", r"\#", *SIGNS.values()}
    opens = atom.startswith(("(", "[")) and before.startswith(("\\operatorname", *(f"\\{n}" for n in NAMED)))
    return not (before in signs or atom in signs or opens)


def mathml(latex: str, block: bool = False) -> str:
    """MathML of LaTeX, which browsers draw by themselves: no script, no font to be fetched."""
    from docutils.utils.math.latex2mathml import tex2mathml  # what sphinx brings

    return tex2mathml(latex, as_block=block)
