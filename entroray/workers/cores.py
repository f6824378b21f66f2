"""The cores of one node, divided between engines and learner while both work, whole while one rests."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from entroray.roles import Scores
from entroray.workers.engine_pool import EnginePool
from entroray.workers.roles import LearnerRole

BESIDE = "use_threads"
"""The method of a learner rank that is answered while another runs."""
LOOK = 0.05
"""Seconds between two looks at whether the engines still work while the learner does."""


@dataclass(frozen=True)
class Threads:
    """Of each actor of a role."""

    alone: int
    shared: int
    """While the other role works too."""


def divide_cores(
    cores: int, engines: tuple[int, int | None], ranks: tuple[int, int | None]
) -> tuple[Threads, Threads]:
    """Threads of an engine and of a rank, from (how many there are, threads that the user gave each or None).

    A role whose threads are given keeps them; the other has what is left, or the larger half: of 3 cores
    a rank takes 2.
    """
    first = _part(cores, engines, ranks, cores // 2)
    return first, _part(cores, ranks, engines, cores - cores // 2)


def _part(cores: int, own: tuple[int, int | None], other: tuple[int, int | None], half: int) -> Threads:
    (count, given), (others, taken) = own, other
    if given is not None:
        return Threads(given, given)
    left = half if taken is None else cores - others * taken
    return Threads(max(1, cores // count), max(1, left // count))


@dataclass(frozen=True)
class SharingLearner:
    """A Learner on the node of its engines: while it works they keep to their part of the cores.

    A rank takes another number between two micro-batches, an engine between two steps.
    """

    learner: LearnerRole
    engines: EnginePool
    engine: Threads
    rank: Threads

    async def score(self, *args: Any, **kwargs: Any) -> Scores:
        """As `LearnerRole.score`."""
        async with self._working():
            return await self.learner.score(*args, **kwargs)

    async def update(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As `LearnerRole.update`."""
        async with self._working():
            return await self.learner.update(*args, **kwargs)

    async def score_and_update(self, *args: Any, **kwargs: Any) -> tuple[dict[str, float], Scores]:
        """As `LearnerRole.score_and_update`."""
        async with self._working():
            return await self.learner.score_and_update(*args, **kwargs)

    @asynccontextmanager
    async def _working(self) -> AsyncIterator[None]:
        self._tell_engines(self.engine.shared)
        watch = asyncio.create_task(self._follow(self._tell_ranks(self._due())))
        try:
            yield
        finally:
            watch.cancel()
            self._tell_engines(self.engine.alone)
            self._tell_ranks(self.rank.alone)

    async def _follow(self, told: int) -> None:
        """Give the ranks the cores of engines that have run out of work, and take them back."""
        while True:
            await asyncio.sleep(LOOK)
            if self._due() != told:
                told = self._tell_ranks(self._due())

    def _due(self) -> int:
        return self.rank.shared if self.engines.busy else self.rank.alone

    def _tell_ranks(self, number: int) -> int:
        for handle in self.learner.gang.handles:  # nobody waits: a rank that died is told of by its call
            handle.use_threads.options(concurrency_group=BESIDE).remote(number)
        return number

    def _tell_engines(self, number: int) -> None:
        for handle in self.engines.all_handles:
            handle.use_threads.remote(number)
