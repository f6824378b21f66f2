"""Who waits for what of an engine, and what is out of time."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from entroray.engine.vllm_request import Request
from entroray.types import Rollout

BEAT = 10.0
"""Seconds after which an engine that has finished nothing says that it is at work."""


@dataclass
class Waiting:
    """A request's samples, filled in as they finish; times are of `time.monotonic`."""

    request: Request
    future: Future
    admitted: float
    left: set[str]
    begun: dict[str, float] = field(default_factory=dict)
    """When a sample was first seen to have a token."""
    done: dict[str, Rollout] = field(default_factory=dict)

    def look(self, now: float, has_begun: Callable[[str], bool]) -> bool:
        """Note which samples have a token; is one of those without an answer under way?"""
        self.begun |= dict.fromkeys(filter(has_begun, self.left - self.begun.keys()), now)
        return not self.left.isdisjoint(self.begun)

    def late(self, now: float, idle_since: float) -> set[str]:
        """Samples without an answer `request.deadline` seconds after their first token.

        One without a token waits for its turn, `request.patience`: since it was admitted, and again since
        the engine was last at work on others, which end in time themselves.
        """
        first, lasts = max(self.admitted, idle_since) + self.request.patience, self.request.deadline
        return {n for n in self.left if (self.begun[n] + lasts if n in self.begun else first) < now}


async def as_they_end(futures: Sequence[Future], turns: Callable[[], int]) -> AsyncIterator[dict[int, Any]]:
    """Results of an engine's `futures` by index, those that end together at once; {} where none has in `BEAT`
    seconds and the engine's thread has turned since, whose `turns` have been so many.
    """
    finished: asyncio.Queue[int] = asyncio.Queue()
    waiting = [asyncio.wrap_future(future) for future in futures]
    for place, future in enumerate(waiting):
        future.add_done_callback(partial(lambda place, _: finished.put_nowait(place), place))
    left = len(waiting)
    while left:
        seen = turns()
        try:
            ended = [await asyncio.wait_for(finished.get(), BEAT)]
        except TimeoutError:
            if turns() > seen:  # a thread that is stuck says nothing
                yield {}
            continue
        while not finished.empty():  # each answer costs Ray a message: what ended together goes together
            ended.append(finished.get_nowait())
        left -= len(ended)
        yield {index: await waiting[index] for index in ended}
