"""Texts that are one answer: case, white space, punctuation, articles and forms of Unicode aside."""

import re
import unicodedata
from collections.abc import Callable, Sequence

_DASHES = str.maketrans(dict.fromkeys("‐‑‒–—―−", "-"))
_INVISIBLE = ("Cf", "Cc")
_MEANING = frozenset("#%&@")
"""Punctuation that tells answers apart: C# is not C."""
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_IN_NUMBERS = re.compile(r"(?<=\d)[.,:/-](?=\d)|(?<![\w.])[-.](?=\.?\d)")
_JOINING = frozenset(".'’‘`\"“”´")
"""Punctuation that stands within words, or around them: U.S. is us."""
_ARTICLES = re.compile(r"\b(?:an?\s+(?=\w\w|\d)|the\s+(?=\S))", re.IGNORECASE)
"""`A, C` are two choices, and no article."""


def normalise(text: str, keep: Sequence[str] = ()) -> str:
    """`text` without differences that do not count, but for those to `keep` (case, punctuation, articles).

    A text of which nothing would be left stays as it is, in one case.
    """
    visible = "".join(c for c in unicodedata.normalize("NFKC", text).translate(_DASHES) if _is_visible(c))
    squeezed = " ".join(visible.split())
    steps: dict[str, Callable[[str], str]] = {
        "case": lambda t: unicodedata.normalize("NFKC", t.casefold()),
        "punctuation": _without_punctuation,
        "articles": lambda t: _ARTICLES.sub("", t),
    }
    for name, step in steps.items():
        if name not in keep:
            squeezed = " ".join(step(squeezed).split()) or squeezed
    return squeezed


def _is_visible(character: str) -> bool:
    return character.isspace() or unicodedata.category(character) not in _INVISIBLE


def _without_punctuation(text: str) -> str:
    """Words apart by spaces; points, signs and bars of numbers stay, thousands are joined."""
    text = _THOUSANDS.sub("", text)
    kept = {match.start() for match in _IN_NUMBERS.finditer(text)}
    return "".join(c if i in kept else _replaced(c) for i, c in enumerate(text))


def _replaced(character: str) -> str:
    if character in _JOINING:
        return ""
    return " " if unicodedata.category(character)[0] == "P" and character not in _MEANING else character
