"""Groups as they finish, never more than `max_lag` steps behind the learner."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass

from entroray.errors import DataError
from entroray.types import Group, Prompt, Version


@dataclass(frozen=True)
class Dropped:
    """A prompt that gave no group, and why."""

    prompt: Prompt
    reason: str


@dataclass
class Slot:
    """One group in flight: issued in order, sampled by weights no older than `version`."""

    serial: int
    prompt: Prompt
    version: Version
    group: Group | None = None


Rollouts = Callable[[Prompt, int], Awaitable[Group | Dropped]]


class Stream:
    """A bounded window of `per_step * (max_lag + 1)` groups in flight.

    A slot is held from the moment its prompt is drawn until the step it fed has reached the
    generators, so sampling runs ahead of training by `max_lag` steps and no further. That alone does
    not bound staleness (a straggler may finish many steps late), so `take` waits until what it would
    leave behind can still be trained in time.
    """

    def __init__(self, prompts: Iterator[Prompt], rollout: Rollouts, *, per_step: int, max_lag: int):
        self.prompts, self.rollout = prompts, rollout
        self.per_step, self.max_lag = per_step, max_lag
        self.version: Version = 0
        self.serial = 0
        self.slots: dict[int, Slot] = {}
        self.tasks: set[asyncio.Task[None]] = set()
        self.changed = asyncio.Event()
        self.dropped: Counter[str] = Counter()
        self.refused = 0
        self.without_signal: list[Group] = []

    def fill(self) -> None:
        """Draw prompts until the window is full."""
        while len(self.slots) < self.per_step * (self.max_lag + 1):
            self._issue(next(self.prompts))

    def _issue(self, prompt: Prompt) -> None:
        self.serial += 1
        slot = Slot(self.serial, prompt, self.version)
        self.slots[slot.serial] = slot
        task = asyncio.get_running_loop().create_task(self._one(slot))
        self.tasks.add(task)
        task.add_done_callback(self._finished)

    async def _one(self, slot: Slot) -> None:
        result = await self.rollout(slot.prompt, slot.serial)
        if isinstance(result, Group):
            slot.group = result
        else:
            self._free(slot, result.reason)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self.changed.set()
        if task.cancelled() or task.exception() is None:
            self.tasks.discard(task)

    def _free(self, slot: Slot, reason: str) -> None:
        """Give up a slot's group and draw the next prompt in its place."""
        self.dropped[reason] += 1
        del self.slots[slot.serial]
        self._issue(next(self.prompts))

    def _raise_failed(self) -> None:
        for task in self.tasks:
            if task.done() and not task.cancelled() and (error := task.exception()):
                raise error

    async def take(self, keep: Callable[[Group], bool], *, wait: bool, limit: int) -> list[Group]:
        """The oldest `per_step` finished groups worth training on, in order of issue.

        `wait` holds until nothing left behind can grow older than `max_lag`; without it groups that did
        are refused and their prompts re-issued. DataError when more than `limit` groups are dropped.
        """
        before = self.dropped.total()
        while True:
            self.changed.clear()
            self._raise_failed()
            self._sift(keep, wait=wait)
            if self.dropped.total() - before > limit:
                raise DataError(f"{limit} groups were dropped in one step: {dict(self.dropped)}")
            ready = [s for _, s in sorted(self.slots.items()) if s.group][: self.per_step]
            if len(ready) == self.per_step and (not wait or self._feasible(ready)):
                return [self.slots.pop(s.serial).group for s in ready]  # type: ignore[misc]
            await self.changed.wait()

    def _sift(self, keep: Callable[[Group], bool], *, wait: bool) -> None:
        for slot in [s for s in self.slots.values() if s.group]:
            assert slot.group is not None
            if not wait and self.version - slot.group.version > self.max_lag:
                self.refused += 1
                del self.slots[slot.serial]
                self._issue(slot.prompt)
            elif not keep(slot.group):
                self.without_signal.append(slot.group)
                self._free(slot, "no signal")

    def judged_since(self) -> list[Group]:
        """Groups that `keep` sent back since the last call: judged, not trained on."""
        found, self.without_signal = self.without_signal, []
        return found

    def _feasible(self, ready: list[Slot]) -> bool:
        """Whether all others can still be trained within `max_lag`, `per_step` of them a step."""
        taken = {s.serial for s in ready}
        left = [s.version for s in self.slots.values() if s.serial not in taken]
        for ahead in range(1, self.max_lag + 2):
            due = sum(v + self.max_lag <= self.version + ahead - 1 for v in left)
            if due > (ahead - 1) * self.per_step:
                return False
        return True

    def advance(self, version: Version) -> None:
        """The generators serve `version` now: what the last step freed may be drawn anew."""
        self.version = version
        self.fill()

    async def close(self) -> None:
        """Cancel what is in flight and wait until it is gone."""
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
