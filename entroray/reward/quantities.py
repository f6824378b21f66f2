r"""Numbers with their units, as exact fractions: what most answers are, and compared without a parser."""

import math
import re
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from entroray.reward.texts import STYLE, without_words
from entroray.reward.writing import NUMBER

PLACES = 6
"""Decimal places that decimals are compared to."""
SMALL = 3
"""Zeros behind the point; a number with more of them is compared to as many places more."""
TINIEST = 20_000
"""Decimal places that are looked at."""

# Numbers in words.

_DIGIT = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
_TEEN = [
    "ten",
    "eleven",
    "twelve",
    *(f"{n}teen" for n in ("thir", "four", "fif", "six", "seven", "eigh", "nine")),
]
_TENS = [f"{n}ty" for n in ("twen", "thir", "for", "fif", "six", "seven", "eigh", "nine")]
_COUNTS = {word: n for n, word in enumerate(["zero", *_DIGIT, *_TEEN])}
_COUNTS |= {word: n for n, word in zip(range(20, 100, 10), _TENS, strict=True)}
_TIMES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9}
_PARTS = ["half", "third", "quarter", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth"]
_SHARES = dict(zip(_PARTS, (2, 3, 4, *range(4, 11)), strict=True)) | {"halve": 2}
_BELOW_100 = (
    rf"(?:(?:{'|'.join(_TENS)})(?:[\s-](?:{'|'.join(_DIGIT)}))?|{'|'.join(_TEEN)}|{'|'.join(_DIGIT)})"
)
_BELOW_1000 = rf"(?:{_BELOW_100}\s+hundred(?:\s+(?:and\s+)?{_BELOW_100})?|{_BELOW_100})"
_SPELT = re.compile(
    rf"(?:(?:a|the)\s+)?(zero|{_BELOW_1000}(?:\s+(?:thousand|million|billion)(?:,?\s+(?:and\s+)?{_BELOW_1000})?)*)"
    rf"(?:[\s-]({'|'.join(_SHARES)})s?)?(?=\s+[A-Za-z(\\]|\s*\\?%|$)",
    re.IGNORECASE,
)


def in_digits(text: str) -> str:
    r"""`twenty-five apples` -> `25 apples`, `two thirds` -> `\frac{2}{3}`; a text with digits stays."""
    bare = STYLE.sub(r"\1", text).strip()
    found = None if re.search(r"\d", bare) else _SPELT.match(bare)
    if not found:
        return text
    value, below = 0, 0
    for word in re.findall(r"[a-z]+", found[1].lower()):
        times = _TIMES.get(word, 1)
        below = below * times if times > 1 else below + _COUNTS.get(word, 0)
        if times > 100:
            value, below = value + below, 0
    number = str(value + below)
    if found[2]:
        number = rf"\frac{{{number}}}{{{_SHARES[found[2].lower()]}}}"
    return number + bare[found.end() :]


# Units.

_TABLE = (Path(__file__).parent / "units.tsv").read_text(encoding="utf-8").splitlines()[1:]
_UNITS = {
    name: (kind, Fraction(size))
    for kind, size, names in (line.split("\t") for line in _TABLE)
    for name in names.split()
}
"""Each unit's kind, and its size in the kind's first unit."""
_LONG = "|".join(sorted((re.escape(name) for name in _UNITS if len(name) > 1), key=len)[::-1])
_LETTER = "".join(name for name in _UNITS if len(name) == 1 and name.isalpha() and name.isascii())
_EXPONENT = r"(?:\s*\^\s*\{?\s*-?\d\s*\}?|\d)?"
_NAME = (
    rf"(?:(?:(?:square|sq|cubic|cu)\.?\s+)?(?:{_LONG})(?:e?s)?(?![A-Za-z])"
    rf"|\^\s*\{{?\s*\\circ\s*\}}?(?:\s*[CF](?![A-Za-z]))?|\\?[$€£¥₹¢]){_EXPONENT}"
)
_ANY = rf"(?:{_NAME}|(?-i:[{_LETTER}](?![A-Za-z])){_EXPONENT})"
_UNIT = re.compile(
    rf"(?:(?<=[\d}}%)])[\s-]*|(?<=[A-Za-z])\s+)((?:(?:/|\bper\b)\s*)?(?:{_NAME}|(?<=\s){_ANY})"
    rf"(?:\s*(?:/|\bper\b|\ban?\b|\\cdot|\\times|\*|-)\s*{_ANY}|\s+{_NAME}){{0,4}})\s*$",
    re.IGNORECASE,
)
_NAMED_UNIT = re.compile(
    r"(/|\bper\b|\ban?\b)|(square|sq|cubic|cu)\b|(circ[CF]?|[A-Za-z]+|[$€£¥₹¢])(?:\^?(-?\d))?"
)
_CURRENCY = re.compile(r"^([-+]?)\s*(?:US)?\\?([$€£¥₹₽₩])\s*(?=[-\d.])")
_SPACE = re.compile(r"\\[,;:! ]|~|\\q?quad(?![A-Za-z])")


class Unit(NamedTuple):
    powers: tuple[tuple[str, int], ...]
    """Of each kind, sorted: ((length, 1), (time, -1))."""
    size: Fraction
    """In the first unit of each kind."""
    names: tuple[str, ...]


def split_unit(text: str) -> tuple[str, Unit | None]:
    r"""What stands before a unit, and the unit: `$5 per day`, `2\sqrt{3} \text{ cm}`; else (`text`, None)."""
    bare = _SPACE.sub(" ", STYLE.sub(r" \1 ", text)).strip()
    bare = re.sub(r"\\frac\s*\{\s*([A-Za-z]+)\s*\}\s*\{\s*([A-Za-z]+)\s*\}$", r" \1/\2", bare)
    coin = _CURRENCY.match(bare)
    value = coin[1] + bare[coin.end() :] if coin else bare
    found = _UNIT.search(value)
    if not coin and not found:
        return text, None
    named = " ".join([coin[2] if coin else "", found[1] if found else ""])
    value = (value[: found.start()] if found else value).strip()
    if (
        bare == text
        and re.match(r"\s[A-Za-z](?![A-Za-z])", named)
        and not VALUE.fullmatch(value.rpartition("=")[2].strip())
    ):
        return text, None  # x^2 m is a product
    return value, _read_unit(named)


def _read_unit(named: str) -> Unit:
    powers, size, sign, times = Counter[str](), Fraction(1), 1, 1
    named = re.sub(r"\\cdot|\\times|[{}\\\s^](?=circ)|(?<=circ)[}\s]+(?=[CF])", "", named)
    names = []
    for per, shape, name, exponent in _NAMED_UNIT.findall(
        re.sub(r"\s*\^\s*\{?\s*(-?\d)\s*\}?", r"^\1", named)
    ):
        if per:
            sign = -1
        elif shape:
            times = 3 if shape.lower().startswith("cu") else 2
        elif known := _known(name):
            power = sign * times * int(exponent or 1)
            for per, kind, cubed in re.findall(r"(/?)([a-z]+)(\^3)?", known[0]):
                powers[kind] += power * (3 if cubed else 1) * (-1 if per else 1)
            size *= known[1] ** power
            names.append(name.casefold().removesuffix("s"))
            times = 1
    return Unit(tuple(sorted((kind, n) for kind, n in powers.items() if n)), size, tuple(names))


def _known(name: str) -> tuple[str, Fraction] | None:
    forms = (name, name.lower(), name.lower().removesuffix("s"))
    return next((_UNITS[form] for form in forms if form in _UNITS), None)


# Numbers.

VALUE = re.compile(
    r"(?P<sign>[-+]?)\s*(?:(?P<whole>\d+)?\s*\\frac\s*\{\s*(?P<top>-?\d+)\s*\}\s*\{\s*(?P<low>-?\d+)\s*\}"
    rf"|(?P<over>\d+)\s*/\s*(?P<under>\d+)|(?P<plain>{NUMBER}))\s*(?P<percent>\\?%)?"
)


@dataclass(frozen=True)
class Quantity:
    """A number as it is written."""

    value: Fraction
    decimal: bool
    """Whether with a decimal point: then it agrees to `PLACES`."""
    percent: bool
    unit: Unit | None
    words: frozenset[str]
    """Around it, the unit's names among them."""


def read_quantity(text: str) -> Quantity | None:
    """`text` as one number, with its unit or the words around it; None if it is anything else."""
    if "\n" in text:  # something is said behind it
        return None
    value, unit = split_unit(text)
    words = [*unit.names] if unit else []
    found = VALUE.fullmatch(value)
    if not found:
        value, words = without_words(text)
        found = VALUE.fullmatch(value) if words else None
    if not found:
        return _compound(text)
    whole, top, low = found["whole"], found["top"] or found["over"], found["low"] or found["under"] or "1"
    if int(low) == 0 or (whole and (int(top) < 0 or int(low) < 0)):
        return None
    number = Fraction(found["plain"]) if found["plain"] else int(whole or 0) + Fraction(int(top), int(low))
    sign = -1 if found["sign"] == "-" else 1
    decimal = "." in (found["plain"] or "")
    return Quantity(sign * number, decimal, bool(found["percent"]), unit, frozenset(words))


def _compound(text: str) -> Quantity | None:
    """`2 hours 30 minutes`, `5 dollars and 20 cents` as one; None where the units are not of one kind."""
    pieces = re.split(r"(?<=[a-z])\s*,?\s+(?:and\s+)?(?=\d)", STYLE.sub(r" \1 ", text))
    parts = [read_quantity(piece) for piece in pieces] if 1 < len(pieces) < 4 else []
    units = [part.unit for part in parts if part and part.unit and part.unit.powers]
    if not parts or len(units) < len(parts) or len({unit.powers for unit in units}) > 1:
        return None
    total = sum((p.value * u.size for p, u in zip(filter(None, parts), units, strict=True)), Fraction())
    words = frozenset(name for unit in units for name in unit.names)
    return Quantity(total / units[0].size, True, False, units[0], words)


def same_quantity(ours: Quantity, theirs: Quantity) -> bool:
    """5 m is 500 cm and no 5 cm; 50% is 50 and 0.5. A unit or words on one side alone do not count."""
    if not same_unit(ours, theirs):
        return False
    a, b, exact = ours.value, theirs.value, not (ours.decimal or theirs.decimal)
    if ours.unit and theirs.unit:
        b *= theirs.unit.size / ours.unit.size
    if _near(a, b, exact) or ours.percent == theirs.percent:
        return _near(a, b, exact)
    return _near(a / 100, b, exact) if ours.percent else _near(a, b / 100, exact)


def same_unit(ours: Quantity, theirs: Quantity) -> bool:
    if ours.unit and theirs.unit and ours.unit.powers and theirs.unit.powers:
        return ours.unit.powers == theirs.unit.powers
    return not ours.words or not theirs.words or ours.words <= theirs.words


def _near(a: Fraction, b: Fraction, exact: bool) -> bool:
    if a == b or exact:
        return a == b
    places = PLACES + max(zeros(a), zeros(b))
    return round(a, places) == round(b, places)


def zeros(value: Fraction) -> int:
    """How many more zeros than SMALL it has behind the point."""
    if not value or abs(value) >= Fraction(1, 10**SMALL):
        return 0
    digits = math.log10(abs(value.numerator)) - math.log10(value.denominator)
    return min(TINIEST, math.ceil(-digits) - SMALL)
