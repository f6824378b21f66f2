"""The tokens that each response token was drawn from, where top-p or top-k cut the vocabulary."""

from __future__ import annotations  # and without torch, as in types.py

from base64 import b64decode, b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


def encode(ids: NDArray[Any], vocabulary: int) -> NDArray[Any]:
    """A set as its ids in rising order, or as a bit for each token of the vocabulary, whichever is shorter.

    At most V / 8 bytes. An id takes two of them where V, the `vocabulary`, is at most 65,536, else four.
    """
    word = np.dtype(np.uint16 if vocabulary <= 1 << 16 else np.int32)
    width = 8 * word.itemsize
    if len(ids) <= -(-vocabulary // width):
        return ids.astype(word)
    held = np.zeros(-(-vocabulary // width) * width, dtype=np.bool_)
    held[ids] = True
    return np.packbits(held, bitorder="little").view(word)


@dataclass(frozen=True)
class KeptSets:
    """The set of each of L response tokens, one behind the other as `encode` has it."""

    sizes: NDArray[np.int32]
    """[L] tokens in each; 0 where none was drawn, as where a token was inserted."""
    words: NDArray[np.int32]
    """[L] entries of `data` that each takes: its ids, or fewer, its bits."""
    data: NDArray[Any]

    @classmethod
    def of(cls, sizes: Sequence[int], encoded: Sequence[NDArray[Any]]) -> KeptSets:
        """Of each set its size, and what `encode` made of it."""
        words = np.array([len(each) for each in encoded], np.int32)
        return cls(np.array(sizes, np.int32), words, np.concatenate([np.empty(0, np.uint16), *encoded]))

    @classmethod
    def none(cls, length: int) -> KeptSets:
        """Of tokens that nobody drew."""
        return cls.of([0] * length, [np.empty(0, np.uint16)] * length)

    @classmethod
    def joined(cls, parts: Sequence[KeptSets]) -> KeptSets:
        columns = ([getattr(part, name) for part in parts] for name in ("sizes", "words", "data"))
        return cls(*map(np.concatenate, columns))

    def take(self, tokens: NDArray[np.int64]) -> KeptSets:
        """Those of a choice of tokens, in that order."""
        from entroray.ops import token_places

        (places,) = token_places(self.words, [tokens])
        return KeptSets(self.sizes[tokens], self.words[tokens], self.data[places])

    def members(self) -> tuple[NDArray[np.int64], NDArray[Any]]:
        """(token, id) of every member of every set, flat, both rising: [sum of sizes] each."""
        token, ids = np.repeat(np.arange(len(self.sizes)), self.sizes), self.data
        bits = self.words < self.sizes
        if bits.any():
            pieces = zip(np.split(self.data, np.cumsum(self.words)[:-1]), bits, strict=True)
            ids = np.concatenate([_numbers(piece) if coded else piece for piece, coded in pieces])
        return token, ids

    def hold(self, token_ids: NDArray[np.int32]) -> bool:
        """Whether each token [L] is in its own set, or has none."""
        token, ids = self.members()
        found = self.sizes == 0
        found[token[ids == token_ids[token]]] = True
        return bool(found.all())

    def plain(self) -> dict[str, Any]:
        """What JSON holds; `from_plain` reads it."""
        columns = {name: getattr(self, name) for name in ("sizes", "words", "data")}
        coded = {name: b64encode(column.tobytes()).decode() for name, column in columns.items()}
        return coded | {"type": self.data.dtype.name}

    @classmethod
    def from_plain(cls, state: dict[str, Any]) -> KeptSets:
        types = {"sizes": np.int32, "words": np.int32, "data": state["type"]}
        return cls(*(np.frombuffer(b64decode(state[name]), kind) for name, kind in types.items()))


def _numbers(bits: NDArray[Any]) -> NDArray[Any]:
    return np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little")).astype(bits.dtype)
