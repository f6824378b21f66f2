r"""Whether an answer is the reference: text as text, numbers as fractions, anything else as mathematics.

Mathematics is latex2sympy's to read and math-verify's to compare. A reference may stand in a sentence or a
worked solution. Of an answer all that is written counts: it is one expression, or one value among words
(`42 dollars`). So a list of guesses is a list, and equal to no number.
"""

import math
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

from latex2sympy2_extended.latex2sympy2 import NormalizationConfig, latex2sympy, normalize_latex
from math_verify import parse, verify
from math_verify.grader import should_treat_as_complex
from sympy import (
    And,
    Eq,
    FiniteSet,
    I,
    MatrixBase,
    Product,
    Rational,
    Set,
    Sum,
    Tuple,
    Union,
    log,
    preorder_traversal,
)
from sympy.core.relational import Relational

from entroray.reward.extract import boxed
from entroray.reward.quantities import (
    PLACES,
    SMALL,
    TINIEST,
    Quantity,
    Unit,
    in_digits,
    read_quantity,
    same_quantity,
    split_unit,
)
from entroray.reward.texts import (
    STYLE,
    WORD,
    choice,
    is_name,
    is_text,
    same_moment,
    same_text,
    without_words,
)
from entroray.reward.writing import NUMBER, clean

DIGITS = 15
"""Digits that exact numbers are compared to."""
LOOSE = 2
"""Decimal places to which the sides of `x = 1/3 = 0.33` must agree."""
LONGEST = 2000
"""Characters of an answer beyond ten times its reference, from which on it is wrong unread."""
DEEPEST = 50
"""Brackets within each other, from which on an answer is wrong unread."""

_NO_NUMBER = re.compile(r"[-+]?(?:nan|inf)", re.IGNORECASE)
_DOUBT = re.compile(
    r"\\(?:\w*arrow|to|implies|iff|mapsto|leadsto|therefore|because|neg|lnot|not|neq?)(?![A-Za-z])|->|=>|!=|~~"
    r"|(?:\b(?:not|neither|nor|never)|n't)\s+(?:(?:be|equal|equals|to|exactly)\s+)*"
    r"(?:[-+\d$\\(.]|[A-J](?![A-Za-z])|the\b|a\b|right|correct)|\b(?:wrong|incorrect)\b",
    re.IGNORECASE,
)
"""Arrows and negations; `20 of them are not sold` is neither."""
_CUT_OFF = re.compile(r"(?:[-+*/^=<>_]|\\(?:cdot|times|div|pm|mp|leq?|geq?|cup|cap|in|to|frac|sqrt))\s*$")
_BASE = re.compile(r"\(?([0-9A-Fa-f]*\d[0-9A-Fa-f]*)\)?_\{?\s*\(?(?:\\text\{)?(\d+)\)?\}?\}?")
_MARKS = re.compile(r"(?<!\\)\$|\\[()\[\]]")
_SENTENCE = re.compile(r"(?<!\\)\$|\\[(\[]|\n|\b(?:answer|is|are)\b")
_PERCENT = re.compile(rf"(-?{NUMBER})\s*\\?%")
_SIDE_BY_SIDE = re.compile(r"(?<![_\d])\d+\.?(?:\s|\\[,;:! ]|~|\\q?quad)+\.?\d")
"""`4 2` and `1. 42`, which are no product and no sum."""
_TURNED = re.compile(r"([^=]*\d[^=]*)=\s*([A-Za-z](?:_\w|_\{\w+\})?(?:\([a-z]\))?)")
"""42 = x."""


@dataclass(frozen=True)
class Reference:
    """A reference, read once for all answers to its prompt."""

    text: str
    is_text: bool = False
    quantity: Quantity | None = None
    values: Sequence[Any] = ()
    """As sympy has it, without its unit; of a number with words around it, the number."""
    unit: Unit | None = None
    letter: str = ""
    """Of a choice: C of (C) 42."""
    inside: "Reference | None" = None
    """What stands behind the letter."""


@lru_cache(maxsize=4096)
def read_reference(text: str) -> Reference | None:
    """None for a reference that latex2sympy and math-verify can make nothing of, nor is a text."""
    if "####" in text:  # gsm8k's worked solutions, and MATH's
        text = text.rpartition("####")[2]
    elif r"\boxed" in text:
        text = boxed(text) or text
    cleaned = in_digits(clean(text))
    letter, rest = choice(cleaned) or ("", "")
    inside = read_reference(rest) if rest else None
    if not cleaned or is_text(cleaned):
        return Reference(cleaned, True, letter=letter, inside=inside) if cleaned else None
    if quantity := read_quantity(cleaned):
        return Reference(cleaned, False, quantity, [_number(quantity)], quantity.unit, letter, inside)
    value, unit = split_unit(cleaned)
    value = value.replace("\\%", "").replace("%", "")
    values = [] if _SENTENCE.search(cleaned) else _parsed(_with_symbols(value))
    values = values or parse(f"${value}$", parsing_timeout=None)
    values = [v.rhs if isinstance(v, Eq) and _is_number(v.lhs) else v for v in values]  # 5 - 2 = 3
    wordy = not values and WORD.search(STYLE.sub(r" \1 ", cleaned))
    return Reference(cleaned, bool(wordy), None, values, unit, letter, inside) if values or wordy else None


def is_equal(reference: Reference, answer: str) -> bool:
    """Whether an answer is the reference; it is not where it contradicts itself, negates or points on."""
    if _NO_NUMBER.fullmatch(reference.text) or len(answer) > LONGEST + 10 * len(reference.text):
        return False
    said = in_digits(clean(answer))
    if said == reference.text or (not reference.is_text and _squeezed(said) == _squeezed(reference.text)):
        return True
    if not said or _CUT_OFF.search(said) or _depth(said) > DEEPEST:  # latex2sympy takes seconds over brackets
        return False
    for told in (_by_letter(reference, said), same_moment(reference.text, said)):
        if told is not None:
            return told
    if reference.is_text or is_name(said, reference.text):
        return same_text(reference.text, said)
    if _DOUBT.search(said) and not _DOUBT.search(reference.text):
        return False
    if (bases := _bases(reference.text, said)) is not None:
        return bases
    return _same_number(reference, said)


def _by_letter(reference: Reference, said: str) -> bool | None:
    """By the letter of a choice, and by what stands behind it; None where there is none."""
    letter, rest = choice(said) or ("", "")
    if letter and reference.letter:
        inside = reference.inside if rest else None
        return letter == reference.letter and (inside is None or is_equal(inside, rest))
    if reference.inside:
        return is_equal(reference.inside, said)
    return is_equal(reference, rest) if rest else None


def _depth(text: str) -> int:
    """How many brackets are open, or closed too often, at most."""
    steps = ((sign in "([{") - (sign in ")]}") for sign in text)
    return max(map(abs, accumulate(steps)), default=0)


def _squeezed(text: str) -> str:
    """Without the white space that is none between digits: `4 2` is not 42."""
    return re.sub(
        r"\\(?:left|right|displaystyle)(?![A-Za-z])|\\[,;:! ]|(?<!\d)\s+|\s+(?!\d)|(?<=\d)\s+$", "", text
    )


def _bases(reference: str, said: str) -> bool | None:
    """Whether two numerals with their bases (101_2) are the same; None where one has none."""
    ours, theirs = _BASE.fullmatch(reference), _BASE.fullmatch(said)
    if not ours or not theirs:
        return False if theirs and not 2 <= int(theirs[2]) <= 36 else None
    digits = lambda numeral: (numeral[1].lstrip("0").upper(), numeral[2])
    return digits(ours) == digits(theirs)


# Values.


def _same_number(reference: Reference, said: str) -> bool:
    """As fractions where both are numbers, else as mathematics."""
    if reference.quantity:
        point = reference.quantity.value.denominator > 1 and re.fullmatch(r"[-+]?\d+,\d+", said)  # 3,14
        theirs = read_quantity(
            said.replace(",", ".") if point else re.sub(r"(?<=\d)(?=[A-Za-z]$)", " ", said)
        )
        if theirs:
            return same_quantity(reference.quantity, theirs)
    for text in _readings(reference, said):
        value, unit = split_unit(text)
        if unit and reference.unit and unit[:2] != reference.unit[:2]:
            continue
        if reference.text.startswith("(") and value.startswith(r"\{") and "(" not in value:
            continue  # a set is no tuple
        if _same_value(reference, value) or all(_same_value(reference, part) for part in value.split(" ; ")):
            return True
    return False


def _readings(reference: Reference, said: str) -> Iterator[str]:
    """The answer as it stands, then without the words around its value, where they are not another unit."""
    value, words = without_words(said)
    if "\n" in said and words:  # something is said behind the answer
        return
    wordy = bool(words) and "=" in said and not WORD.search(reference.text)
    if not wordy and not _MARKS.search(said):  # else it is mathematics among words
        yield said
    known = reference.quantity.words if reference.quantity else frozenset()
    if value == said or (known and words and not known <= {*words}):
        return
    yield value
    last = ([part for part in value.split(" ; ") if "=" in part] or [value])[-1]
    if last != value:  # a sentence that ends in a sum: the sum counts
        yield re.sub(r"^\s*[-+*/=][^=]*=", "", last).strip(" =")


def _same_value(reference: Reference, said: str) -> bool:
    """50% is 50 and 0.5."""
    values = _read(said)
    ours = [*map(_point, reference.values)] if "=" not in said else reference.values
    if _equal(ours, values) or any(_same_region(a, b) for a in ours for b in values):
        return True
    if ("%" in reference.text) == ("%" in said):
        return False
    theirs = said if "%" in reference.text else _PERCENT.sub(r"(\1/100)", said)
    ours = [value / 100 for value in reference.values] if "%" in reference.text else reference.values
    return _equal(ours, _read(theirs))


def _equal(ours: Sequence[Any], theirs: Sequence[Any], places: int = PLACES) -> bool:
    more = max((_zeros(value) for value in (*ours, *theirs)), default=0)
    return verify(
        list(ours),
        list(theirs),
        float_rounding=places + more,
        numeric_precision=DIGITS + more,
        allow_set_relation_comp=True,
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
    if quantity := read_quantity(text):
        return [_number(quantity)]
    if _SIDE_BY_SIDE.search(text):
        return []
    if "%" in text and "=" in text:  # 60% * 40% = 24%
        if not all(map(_agrees, _parsed(_PERCENT.sub(r"(\1/100)", text)))):
            return []
        text = text.rpartition("=")[2]
    if turned := _TURNED.fullmatch(text):
        text = f"{turned[2]} = {turned[1]}"
    found = _parsed(_with_symbols(text.replace("\\%", "").replace("%", "")))
    return [value for value in found if _agrees(value)]


_COMPARES = re.compile(r"[<>]|\\(?:[lg]e|[lg]eq|[lg]eqslant|neq?)(?![A-Za-z])")
_OR = re.compile(r"\\(?:text|mbox|mathrm)\s*\{\s*or\s*\}|\bor\b|\\lor(?![A-Za-z])|\\vee(?![A-Za-z])")
_TIMES = re.compile(r"(?:(?<![_\d.])(\d[\d.]*)|(?<=\)))\s*(?=\()")
"""2(3) and (2)(3), which latex2sympy takes for two and three."""
_CONFIG = NormalizationConfig(True, False, True, True, "all", False)


@lru_cache(maxsize=256)
def _parsed(text: str) -> list[Any]:
    if _COMPARES.search(text) and len(ways := _OR.split(text)) > 1:  # x < 1 or x > 2
        regions = [_region(value) for way in ways for value in _parsed(way)]
        return (
            [Union(*regions)]
            if len(regions) == len(ways) and all(isinstance(r, Set) for r in regions)
            else []
        )
    try:
        latex = normalize_latex(_TIMES.sub(r"\1 \\cdot ", text), _CONFIG)
        real = not should_treat_as_complex(latex)
        value = latex2sympy(latex, is_real=real, convert_degrees=False, normalization_config=None)
    except Exception:  # boundary: the grammar raises whatever a text makes it
        pair = "" if "," in text else ", ".join(re.sub(r"\\pm(?![A-Za-z])", sign, text) for sign in "+-")
        return _parsed(pair) if r"\pm" in text and pair else []
    imaginary = {s: I for s in getattr(value, "free_symbols", ()) if s.name == "i"}
    return [value.subs(imaginary) if imaginary and not value.has(Sum, Product) else value]


def _point(value: Any) -> Any:
    """x=2, y=3 as (2, 3); anything else as it is."""
    sides = getattr(value, "_unsorted_args", ()) if isinstance(value, FiniteSet) else ()
    if (
        not sides
        or not all(isinstance(side, Eq) for side in sides)
        or len({s.lhs for s in sides}) < len(sides)
    ):
        return value
    return Tuple(*(side.rhs for side in sides))


def _same_region(a: Any, b: Any) -> bool:
    """Whether inequalities allow the same numbers, of one unknown or of none that is named."""
    ours, theirs = _region(a), _region(b)
    if (ours is a and theirs is b) or (
        a.free_symbols and b.free_symbols and a.free_symbols != b.free_symbols
    ):
        return False
    return _equal([ours], [theirs])


def _region(value: Any) -> Any:
    """The numbers that inequalities of one unknown allow; anything else as it is."""
    if not isinstance(value, And | Relational) or isinstance(value, Eq):
        return value
    try:
        return value.as_set()
    except Exception:  # boundary: sympy solves for one unknown, and not always
        return value


_WORDS = re.compile(
    r"(?<!_\{)\\(?:text\w*|math(?:rm|bf|it|sf)|mbox)\s*\{(?!\s*(?:and|or)\s*\})([^{}]*[A-Za-z]{2}[^{}]*)\}"
    r"|\\(?:angle|triangle|odot)\s*([A-Z]{2,})"
    r"|(?<![\\A-Za-z_{\d])(?!(?:exp|sqrt|lim|max|min|gcd|lcm|mod|det|and|arc\w+)(?![A-Za-z]))"
    r"((?=[A-Za-z]*[aeiouAEIOU])[A-Za-z]{3,})(?![A-Za-z])"
)


def _with_symbols(text: str) -> str:
    """Each word as one symbol: `x = cat` is not `x = act`."""
    code = lambda found: zlib.crc32(re.sub(r"[\W_]+", "", found[0].rpartition("{")[2]).casefold().encode())
    return _WORDS.sub(lambda found: f" w_{{{code(found)}}} ", text)


def _agrees(value: Any) -> bool:
    """Whether both sides of every equation in it are one number, where both are numbers: not 41 = 42."""
    equations = value.atoms(Eq) if not isinstance(value, MatrixBase) else ()
    sides = ((each.lhs, each.rhs) for each in equations)
    return all(_equal([a], [b], LOOSE) for a, b in sides if _is_number(a) and _is_number(b))


def _is_number(value: Any) -> bool:
    return bool(getattr(value, "is_number", False))


def _number(quantity: Quantity) -> Any:
    exact = Rational(quantity.value.numerator, quantity.value.denominator)
    return exact.evalf(max(DIGITS, len(str(quantity.value.numerator)))) if quantity.decimal else exact
