r"""Answers of words, letters, dates and times: what is text and no mathematics, and when two are the same."""

import math
import re
from fractions import Fraction

STYLE = re.compile(r"\\(?:text\w*|math(?:rm|bf|it|sf)|mbox|operatorname|boxed|fbox)\s*\{([^{}]*)\}")
_SHORT = (
    "am an as at be by do go he if in is it me my no of oh ok on or so to up us we "  # English, and units
    "mm cm km mg kg ml ft mi oz lb hr pm sq Hz kW"
)
WORD = re.compile(
    r"(?<![\\A-Za-z\d])(?<!_\{)(?!(?:exp|sqrt|lim|max|min|gcd|lcm|mod|det|sinh|cosh|tanh|arc\w+)(?![A-Za-z]))"
    rf"(?:(?:[A-Za-z]{{3,}}|(?i:{_SHORT.replace(' ', '|')}))(?:'[a-z]+|/[a-z]+)?(?:\^\{{?\d\}}?)?(?![A-Za-z])"
    r"|k?m/[sh]r?(?:\^\{?2\}?)?(?![A-Za-z])|[^\x00-\u03ff\W\d_]+)"
)
_STATED = re.compile(
    r"\b(?:answer|ans)\b\.?(?:\s+is)?\s*[:=]?|(?<=\w)\s+(?:is|are|equals)\b\s*:?", re.IGNORECASE
)


def stated(text: str, known: str = r"\S") -> str:
    """What stands behind the last `the answer is` that something `known` follows."""
    tails = (text[found.end() :] for found in reversed([*_STATED.finditer(text)]))
    return next((tail for tail in tails if re.search(known, tail)), text)


def without_words(text: str) -> tuple[str, list[str]]:
    """The value among words, and these: `a total of $42 a day` -> (42, [total, of, day])."""
    bare = re.sub(r"\b(?:and|or)\b", ",", stated(STYLE.sub(r" \1 ", text), r"\d"))
    bare = re.sub(r"(?<=\d)(?=(?:[ap]m|[kcm]?m|k?g|m?[lL]|ft|lbs?|oz)\b)|(?<=\d)/(?=[A-Za-z]{2})", " ", bare)
    bare = re.sub(r"(?<=\d)(?=[^\x00-\u03ff\W\d_])", " ", bare)  # 42元
    words = [word.casefold().removesuffix("s") for word in WORD.findall(bare)]
    value = re.sub(r"\\?[$€£¥₹₽₩](?=\s*[\d.])", "", WORD.sub(" ; ", bare))
    value = re.sub(r"\\?\$|\\[()\[\]]|[€£¥₹₽₩]|\b[aA]\b(?=\s)", " ; ", value)
    value = re.sub(r"\([\s;-]*\)", " ; ", value)
    return re.sub(r"[\s,.;:]*;[\s,.;:]*", " ; ", value).strip(" ;,.:="), words


_NO_TEXT = re.compile(r"[\d\\^_=+*/<>|{}\[\]%$~]")
_NUMBERED = re.compile(
    r"\d{4}[-/]\d\d?[-/]\d\d?|\d+(?:\.\d+){2,}|\d+(?:\s*:\s*\d+){2,}|\d+\s*(?:-|\bto\b)\s*\d+"
)
"""Dates, versions, ratios of three, ranges and scores: 3-5 is no -2."""
_NAME = re.compile(r"[A-Z]{2,}|(?=.*[A-Za-z]\d)[A-Za-z\d]+|[A-Za-z](?:\s+[A-Za-z])+")
"""AB, H2O, P1, a b: letters in their order, and no product."""
_LETTERS = re.compile(r"[A-Za-z\d\s]+")


def is_text(text: str) -> bool:
    """Whether it is words, a name, a date or 1.2.3: mathematics would read `cat` as a product."""
    bare = STYLE.sub(r"\1", text).strip()
    numbered = _NUMBERED.fullmatch(bare) or _NAME.fullmatch(bare)
    return bool(numbered or (WORD.search(bare) and not _NO_TEXT.search(bare)))


def is_name(answer: str, reference: str) -> bool:
    """Whether an answer is a name or numbered, and the reference, which is not, could be one: P1 and 1P."""
    bare, other = (STYLE.sub(r"\1", text).strip() for text in (answer, reference))
    return bool(_NUMBERED.fullmatch(bare) or (_NAME.fullmatch(bare) and _LETTERS.fullmatch(other)))


def same_text(reference: str, answer: str) -> bool:
    """By words alone, case and commas aside; of a list in any order, unless it is in brackets."""
    for said in (answer, stated(STYLE.sub(r" \1 ", answer))):
        if _listed(reference) == _listed(said) or _words(reference) == _words(said):
            return True
    ours, theirs = _ratio(reference), _ratio(answer)
    return bool(ours) and ours == theirs


def _listed(text: str) -> list[list[str]]:
    bare = STYLE.sub(r" \1 ", text).strip()
    parts = [_words(part) for part in re.split(r"[,;]|\band\b|\bor\b", bare)]
    return [part for part in (parts if bare.startswith("(") and "," in bare else sorted(parts)) if part]


def _words(text: str) -> list[str]:
    """`Don't, 2024/01/31` -> [dont, 2024-1-31]."""
    text = re.sub(r"(?<=[^\W\d_])'(?=[^\W\d_])", "", STYLE.sub(r" \1 ", text).casefold())
    text = re.sub(r"(?<=\d)\s*(?:\bto\b|[-./:])\s*0*(?=\d)", "-", text)
    return re.findall(r"\d+(?:-\d+)*|[^\W\d_]+", text)


def _ratio(text: str) -> list[Fraction]:
    """`2:4:6` -> [1, 2, 3]; empty for anything else."""
    terms = text.split(":")
    if len(terms) < 3 or not all(term.strip().isdecimal() and int(term) for term in terms):
        return []
    return [Fraction(int(term), int(terms[0])) for term in terms]


# Dates and times.

_MONTHS = (
    "jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sep(?:t(?:ember)?)?|"
    "oct(?:ober)?|nov(?:ember)?|dec(?:ember)?"
)
_DATE = re.compile(
    rf"(?:(\d\d?)\s+(?:of\s+)?)?({_MONTHS})\.?(?:\s+(\d\d?))?(?:\s*,?\s+(\d{{4}}))?|(\d{{4}})[-/](\d\d?)[-/](\d\d?)",
    re.IGNORECASE,
)
_CLOCK = re.compile(r"(\d\d?)(?::([0-5]\d)(?::([0-5]\d))?)?\s*(?:([ap])\.?\s?m\.?)?", re.IGNORECASE)


def same_moment(reference: str, answer: str) -> bool | None:
    """Whether two dates or two times of the day are the same; None where they are not both."""
    ours, theirs = (_date(STYLE.sub(r"\1", text).strip()) for text in (reference, answer))
    if ours and theirs:
        return ours == theirs
    began, ended = (_clock(STYLE.sub(r"\1", text).strip()) for text in (reference, answer))
    if began and ended:
        return began[1:3] == ended[1:3] and (
            began[0] == ended[0] or (bool(began[3]) != bool(ended[3]) and (began[0] - ended[0]) % 12 == 0)
        )
    terms = re.fullmatch(r"(\d+):([0-5]\d)", reference)
    clock = terms and (terms[2].startswith("0") or math.gcd(int(terms[1]), int(terms[2])) != 1)
    return False if clock else None  # else it may be a ratio


def _date(text: str) -> tuple[int, ...] | None:
    """`5 March 2024` -> (2024, 3, 5), 0 for a year that is not said."""
    found = _DATE.fullmatch(text)
    if not found:
        return None
    if found[5]:
        return int(found[5]), int(found[6]), int(found[7])
    day = found[1] or found[3]
    month = "-janfebmaraprmayjunjulaugsepoctnovdec".index(found[2][:3].lower()) // 3 + 1
    return (int(found[4] or 0), month, int(day)) if day else None


def _clock(text: str) -> tuple[int, int, int, str] | None:
    found = _CLOCK.fullmatch(text)
    if not found or not (found[2] or found[4]):
        return None
    half = (found[4] or "").lower()
    hour = int(found[1]) % 12 + 12 * (half == "p") if half else int(found[1])
    return hour, int(found[2] or 0), int(found[3] or 0), half


# Multiple choice.

_ASKED = re.compile(
    r"^(?:(?:so|thus|hence|therefore)\b,?\s*)?(?:the\s+)?(?:(?:correct|right|best|final)\s+)*"
    r"(?:(?:option|choice|answer)\b\s*(?:is\b|:)?\s*)+",
    re.IGNORECASE,
)
_CHOICE = re.compile(
    r"(?:[(\[]\s*([A-Ja-j])\s*[)\]][.:]?|([A-J])(?:[).:]|$))\s*(?![-=+*/^_<>,;|])(.*)", re.DOTALL
)
_NEXT = re.compile(r"[(\[]\s*[A-Ja-j]\s*[)\]]|\b[A-J][).:]|^(?:and|or)\b")


def choice(text: str) -> tuple[str, str] | None:
    r"""The letter and what stands behind it: C, (C), C) 42, \textbf{(C)}\ 42, Option C; not (A), (B)."""
    bare = re.sub(r"\\[,;:! ]|~|\\q?quad", " ", STYLE.sub(r" \1 ", text)).strip().strip("*$")
    asked = _ASKED.match(bare)
    bare = bare[asked.end() :] if asked else bare
    found = _CHOICE.fullmatch(bare.upper() if asked and len(bare) == 1 else bare.strip())
    if not found or _NEXT.search(found[3]):
        return None
    return (found[1] or found[2]).upper(), found[3].strip("* ")
