"""Questions that two sets of data share, however they are written: 8 bytes a question, none kept whole."""

import hashlib
import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping

_TOKEN = re.compile(r"\d+(?:\.\d+)*|[^\W\d_]+|[-+*/^=<>()%!|]")
_DASHES = str.maketrans(dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212", "-"))


def question_hash(text: str) -> int:
    """64 bits of a question without case, white space and punctuation; signs beside numbers stay.

    `What is 3 - 4?` and `what is 3-4` are one question, `What is 3 + 4?` is another.
    """
    return int.from_bytes(hashlib.blake2b(_normalise(text).encode(), digest_size=8).digest(), "little")


def _normalise(text: str) -> str:
    folded = unicodedata.normalize("NFKC", text).casefold().translate(_DASHES)
    tokens = _TOKEN.findall(re.sub(r"(?<=\d),(?=\d{3}\b)", "", folded))
    around = zip(["", *tokens], tokens, [*tokens[1:], ""], strict=False)
    kept = [t for before, t, after in around if t.isalnum() or "." in t or _counts(before, after)]
    return " ".join(kept) or " ".join(folded.split())


def _counts(before: str, after: str) -> bool:
    """Whether a sign stands beside a number or another sign: between words it is punctuation."""
    return any(side and not side.isalpha() for side in (before, after))


def count_shared(training: Iterable[str], sets: Mapping[str, Collection[int]]) -> dict[str, int]:
    """How many questions of each set, given by their hashes, are among the texts `training`."""
    left = {value for hashes in sets.values() for value in hashes}
    found = {value for value in map(question_hash, training) if value in left} if left else set[int]()
    return {name: sum(value in found for value in hashes) for name, hashes in sets.items()}
