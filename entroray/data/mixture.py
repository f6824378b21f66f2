"""Several tasks in one run: whose turn it is is drawn by weight, and each has its own order."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, zip_longest
from typing import Any

import numpy as np
from numpy.typing import NDArray

from entroray.data.prompts import LargePrompts, PromptStream, next_prompt, pick
from entroray.errors import PreflightError
from entroray.types import Prompt

BLOCK = 1024
"""Positions drawn at once."""


class Mixture(Iterator[Prompt]):
    """Prompts for ever, each position of a domain drawn by weight; the order is `seed`'s and the sets' alone.

    `position` counts the prompts given so far; setting it continues from there, exactly. Within a domain
    prompts come as in a `PromptStream` of their own: each once an epoch.
    """

    def __init__(
        self, prompts: Sequence[Prompt], weights: Mapping[str, float], *, seed: int, position: int = 0
    ):
        self.domains = sorted(weights)
        of = {name: _of_domain(prompts, name) for name in self.domains}
        if empty := [name for name in self.domains if not of[name]]:
            raise PreflightError(f"data.parts: no prompt of {', '.join(empty)} is left: lower data.heldout")
        self._streams = [PromptStream(of[name], seed=seed) for name in self.domains]
        shares = np.array([weights[name] for name in self.domains])
        self._edges = np.cumsum(shares / shares.sum())[:-1]
        self._seed, self.position = seed, position
        self._drawn: list[NDArray[np.int64]] = []
        self._before = [np.zeros(len(self.domains), np.int64)]

    def __next__(self) -> Prompt:
        prompt, self.position = next_prompt(self.at, self.position)
        return prompt

    def at(self, position: int) -> Prompt | None:
        """The prompt at `position`, without moving: for those in flight when a run was stopped."""
        block, index = divmod(position, BLOCK)
        while len(self._drawn) <= block:
            self._draw()
        drawn = self._drawn[block]
        domain = drawn[index]
        return self._streams[domain].at(int(self._before[block][domain] + (drawn[:index] == domain).sum()))

    def _draw(self) -> None:
        """Domains of the next block; raw words, as NumPy promises those for ever."""
        words = np.random.PCG64([self._seed, len(self._drawn), 1]).random_raw(BLOCK)
        drawn = np.searchsorted(self._edges, words / 2.0**64, side="right")
        self._drawn.append(drawn)
        self._before.append(self._before[-1] + np.bincount(drawn, minlength=len(self.domains)))


def prompt_stream(
    prompts: Sequence[Prompt], weights: Mapping[str, float], *, seed: int
) -> PromptStream | Mixture:
    """The order of one task's prompts, or of a mixture's where there are weights."""
    return Mixture(prompts, weights, seed=seed) if weights else PromptStream(prompts, seed=seed)


def without_shared(parts: Sequence[Sequence[Prompt]]) -> tuple[list[Sequence[Prompt]], int]:
    """The parts without what an earlier one has, by id or by text, and how many that were.

    Two large tables are compared by question; what a smaller part has, a large one passes over when drawn.
    """
    ids, texts, keys, kept = set[str](), set[str](), np.empty(0, np.uint64), list[Sequence[Prompt]]()
    for part in parts:
        if isinstance(part, LargePrompts):
            kept.append(part.cut(~np.isin(part.keys, keys)) if len(keys) else part)
            keys = np.concatenate([keys, part.keys])
        else:
            kept.append([p for p in part if p.id not in ids and p.text not in texts])
            ids |= {p.id for p in part}
            texts |= {p.text for p in part}
    for part in kept:
        if isinstance(part, LargePrompts):
            part.drawn.taken = frozenset(ids | texts)
    return kept, sum(map(len, parts)) - sum(map(len, kept))


class Interleaved(Sequence[Prompt]):
    """One of each part, then the next of each, of which one or more are large; each drawn when it is read."""

    def __init__(self, parts: Sequence[Sequence[Prompt]]):
        self.parts = parts

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __iter__(self) -> Iterator[Prompt]:
        return (p for p in chain.from_iterable(zip_longest(*self.parts)) if p is not None)

    def __getitem__(self, index: Any) -> Any:
        return pick(self, index)


def interleave(parts: Sequence[Sequence[Prompt]]) -> Sequence[Prompt]:
    """One of each part, then the next of each: any beginning of it has as many of each as there are."""
    if any(isinstance(part, LargePrompts) for part in parts):
        return parts[0] if len(parts) == 1 else Interleaved(parts)
    return tuple(Interleaved(parts))


def parts_of(prompts: Sequence[Prompt]) -> Sequence[Sequence[Prompt]]:
    """The parts of a mixture with a large table; anything else is one part."""
    return prompts.parts if isinstance(prompts, Interleaved) else [prompts]


def large_parts(prompts: Sequence[Prompt]) -> list[LargePrompts]:
    """Those parts of a run's prompts that are large tables."""
    return [part for part in parts_of(prompts) if isinstance(part, LargePrompts)]


def _of_domain(prompts: Sequence[Prompt], name: str) -> Sequence[Prompt]:
    for part in large_parts(prompts):
        if part.domain == name:
            return part
    return [
        p
        for part in parts_of(prompts)
        if not isinstance(part, LargePrompts)
        for p in part
        if p.domain == name
    ]


def positions_by_domain(prompts: Sequence[Prompt]) -> dict[str, list[int]]:
    """Indices by domain, in order of names; nothing where there is no mixture."""
    found: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        if prompt.domain:
            found.setdefault(prompt.domain, []).append(index)
    return dict(sorted(found.items()))
