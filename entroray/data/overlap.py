"""Questions that two sets of data share, however they are written: 8 bytes a question, none kept whole."""

import hashlib
import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping

_TOKEN = re.compile(r"\d+(?:\.\d+)*|[^\W\d_]+|[-+*/^=<>()%!|]")
"""Numbers, words, and signs; a sign between words is punctuation."""
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}\b)")
_DASHES = str.maketrans(dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212", "-"))


def question_hash(text: str) -> int:
    """64 bits of a question without case, white space and punctuation; signs beside numbers stay.

    `What is 3 - 4?` and `what is 3-4` are one question, `What is 3 + 4?` is another.
    """
    return int.from_bytes(hashlib.blake2b(_normalise(text).encode(), digest_size=8).digest(), "little")


def _normalise(text: str) -> str:
    plain = text if text.isascii() else unicodedata.normalize("NFKC", text).translate(_DASHES)
    folded = plain.casefold()
    tokens = _TOKEN.findall(_THOUSANDS.sub("", folded))
    words = [token.isalpha() for token in tokens]
    alone = lambda at: all(words[i] for i in (at - 1, at + 1) if 0 <= i < len(tokens))
    kept = [t for at, t in enumerate(tokens) if words[at] or t[0].isdigit() or not alone(at)]
    return " ".join(kept) or " ".join(folded.split())


def count_shared(training: Iterable[str], sets: Mapping[str, Collection[frozenset[int]]]) -> dict[str, int]:
    """How many questions of each set, given by the hashes of their forms, are among the texts `training`."""
    left = {value for questions in sets.values() for forms in questions for value in forms}
    found = {value for value in map(question_hash, training) if value in left} if left else set[int]()
    return {name: sum(bool(forms & found) for forms in questions) for name, questions in sets.items()}
