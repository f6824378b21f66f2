"""Groups as they finish, never more than `max_lag` steps behind the learner."""

import asyncio
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from entroray.errors import DataError
from entroray.ops import as_count
from entroray.roles import Prompts
from entroray.types import Group, Prompt, Version

NO_SIGNAL = "no signal"
"""Why a group that `keep` sent back was dropped; all other reasons are failures."""


@dataclass(frozen=True)
class Dropped:
    """A prompt that gave no group, and why."""

    reason: str
    drawn: int = 0
    """Response tokens drawn for it all the same."""


@dataclass
class Slot:
    """One group in flight: issued in order, sampled by weights no older than `version`."""

    serial: int
    position: int
    prompt: Prompt
    version: Version
    group: Group | None = None
    kept_by: object = None
    """The rule that has found its group worth training on."""


def wave(missing: int, kept_share: float) -> int:
    """Groups to draw so that `missing` are kept more often than not: their mean and one deviation more."""
    spread = math.sqrt(max(missing, 0) * (1 - kept_share))
    return as_count((missing + spread) / kept_share, math.ceil) if missing > 0 else 0


def _too_many(dropped: Counter[str], limit: int) -> str:
    """What a step dropped, what it may, and what to do about each kind of reason."""
    remedies = []
    if NO_SIGNAL in dropped:
        remedies.append(
            f"`{NO_SIGNAL}` is what the objective's keep rule sent back: take easier or harder prompts, or "
            "train on every group (objective.keep.fn=always)"
        )
    if dropped.keys() - {NO_SIGNAL}:
        remedies.append("for groups that failed see the event `resample` in events.jsonl")
    reasons = "; ".join(f"{count} x {reason}" for reason, count in dropped.most_common())
    return (
        f"{dropped.total()} groups were dropped since the step began, {limit} may be (driver.refill_limit x "
        f"rollout.groups_per_step): {reasons}. What to do: {'; '.join(remedies)}"
    )


Rollouts = Callable[[Prompt, int], Awaitable[Group | Dropped]]


class Stream:
    """A bounded window of `per_step * (max_lag + 1)` groups in flight (README.md here).

    A finished group is sifted once, and the counters say whether a step may go: what a group costs does not
    grow with their number. `slots` is in order of issue, and there `Slot.version` never falls.
    """

    def __init__(self, prompts: Prompts, rollout: Rollouts, *, per_step: int, max_lag: int, keeps: bool):
        if keeps and max_lag == 0:
            raise ValueError("rollout.surplus=keep lets groups grow a step old: raise driver.max_lag above 0")
        self.prompts, self.rollout = prompts, rollout
        self.per_step, self.max_lag = per_step, max_lag
        self.version: Version = 0
        self.serial = 0
        self.slots: dict[int, Slot] = {}
        self.issued: Counter[Version] = Counter()
        """Slots by their version; `finished` counts those with a group, `fresh` are not sifted yet."""
        self.finished: Counter[Version] = Counter()
        self.fresh: list[Slot] = []
        self.tasks: set[asyncio.Task[None]] = set()
        self.errors: list[BaseException] = []
        self.changed = asyncio.Event()
        self.dropped: Counter[str] = Counter()
        self.dropped_now = 0  # since `take` was called
        self.refused = 0
        self.lost = 0
        self.rolled_back = Counter[str]()
        """`groups` issued and `tokens` drawn of steps that the loss of the learner has undone."""
        self.surplus = self.held = 0
        self.keeps = keeps
        self.kept_share = 1.0
        self.judged: dict[int, Group] = {}

    def fill(self) -> None:
        """Draw prompts until the window is full, or the wave large enough."""
        missing = self.per_step * (self.max_lag + 1) - len(self.slots)
        if self.max_lag == 0:
            missing = 0 if self._unfinished() else wave(missing, self.kept_share)
        for _ in range(missing):
            prompt = next(self.prompts)
            self._issue(prompt, self.prompts.position - 1)  # afterwards: it may have passed over some

    def _unfinished(self) -> bool:
        return self.finished.total() < len(self.slots)

    def _issue(self, prompt: Prompt, position: int) -> None:
        self.serial += 1
        self._start(Slot(self.serial, position, prompt, self.version))

    def _start(self, slot: Slot) -> None:
        self.slots[slot.serial] = slot
        self.issued[slot.version] += 1
        task = asyncio.get_running_loop().create_task(self._one(slot))
        self.tasks.add(task)
        task.add_done_callback(self._ended)

    async def _one(self, slot: Slot) -> None:
        result = await self.rollout(slot.prompt, slot.serial)
        if isinstance(result, Group):
            slot.group = result
            self.finished[slot.version] += 1
            self.fresh.append(slot)
        else:
            self.lost += result.drawn
            self._free(slot, result.reason)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self.changed.set()
        self.tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            self.errors.append(error)

    def _free(self, slot: Slot, reason: str) -> None:
        """Give up a slot's group; `fill` draws the next prompt in its place."""
        self.dropped[reason] += 1
        self.dropped_now += 1
        self._remove(slot)

    def _remove(self, slot: Slot) -> None:
        del self.slots[slot.serial]
        for count in (self.issued, self.finished) if slot.group else (self.issued,):
            count[slot.version] -= 1
            if not count[slot.version]:
                del count[slot.version]

    async def take(self, keep: Callable[[Group], bool], *, wait: bool, limit: int) -> list[Group]:
        """The oldest `per_step` finished groups worth training on, in order of issue.

        `wait` holds until nothing left behind can grow older than `max_lag`; without it groups that did
        are refused and their prompts re-issued. DataError when more than `limit` groups are dropped.
        """
        before, self.dropped_now = Counter(self.dropped), 0
        self.fresh = [s for s in self.slots.values() if s.group]  # the rule or the version may have changed
        while True:
            self.changed.clear()
            if self.errors:
                raise self.errors[0]
            self._sift(keep, wait=wait)
            if self.dropped_now > limit:
                raise DataError(_too_many(self.dropped - before, limit))
            self.fill()
            if self._may_go(wait=wait):
                return self._leave()
            await self.changed.wait()

    def _may_go(self, *, wait: bool) -> bool:
        if self.finished.total() < self.per_step:
            return False
        return not self._unfinished() if self.max_lag == 0 else not wait or self._feasible()

    def _leave(self) -> list[Group]:
        """The oldest `per_step` finished groups; the others are held, or put aside."""
        if self.max_lag == 0:
            kept = len(self.slots)
            self.kept_share = kept / (kept + len(self.judged))
        there = [s for s in self.slots.values() if s.group]
        ready, surplus = there[: self.per_step], there[self.per_step :]
        self.held = len(surplus) if self.keeps else 0
        if not self.keeps:
            self.surplus += len(surplus)
        for slot in ready if self.keeps else there:
            self.judged[slot.serial] = slot.group  # type: ignore[assignment]
            self._remove(slot)
        return [s.group for s in ready]  # type: ignore[misc]

    def _sift(self, keep: Callable[[Group], bool], *, wait: bool) -> None:
        """Send back what is too old or not worth training on; each group is looked at once, oldest first."""
        fresh, self.fresh = sorted(self.fresh, key=lambda s: s.serial), []
        for slot in fresh:
            assert slot.group is not None
            if not wait and self.version - slot.group.version > self.max_lag:
                self.refused += 1
                self.lost += slot.group.drawn
                self._remove(slot)
                self._issue(slot.prompt, slot.position)
            elif slot.kept_by is keep or keep(slot.group):
                slot.kept_by = keep
            else:
                self.judged[slot.serial] = slot.group
                self._free(slot, NO_SIGNAL)

    def judged_since(self) -> list[Group]:
        """Groups judged since the last call, in order of issue: taken, sent back by `keep`, or surplus."""
        found, self.judged = self.judged, {}
        return [found[serial] for serial in sorted(found)]

    def _feasible(self) -> bool:
        """Whether all but the oldest `per_step` can still be trained within `max_lag`, so many a step."""
        for ahead in range(1, self.max_lag + 2):
            last = self.version + ahead - 1 - self.max_lag
            issued, finished = (
                sum(n for version, n in count.items() if version <= last)
                for count in (self.issued, self.finished)
            )
            if issued - min(finished, self.per_step) > (ahead - 1) * self.per_step:
                return False
        return True

    def advance(self, version: Version) -> None:
        """The generators serve `version` now: what the last step freed may be drawn anew."""
        self.version = version
        self.fill()

    def state(self) -> dict[str, Any]:
        """What a later process needs to draw the same prompts with the same seeds, as plain JSON."""
        return {
            "position": self.prompts.position,
            "serial": self.serial,
            "in_flight": [[s.serial, s.position] for s in self.slots.values()],
            "kept_share": self.kept_share,
            "dropped": dict(self.dropped),
            "refused": self.refused,
            "surplus": self.surplus,
            "lost": self.lost,
            "rolled_back": dict(self.rolled_back),
        }

    def restore(self, state: Mapping[str, Any], version: Version) -> None:
        """Go on from `state`: what was in flight is sampled anew, by the weights of `version`."""
        self.version, self.prompts.position = version, state["position"]
        self.serial, self.kept_share = state["serial"], state["kept_share"]
        self.dropped = Counter(state["dropped"])
        self.refused, self.surplus = state["refused"], state["surplus"]
        self.lost, self.rolled_back = state["lost"], Counter(state["rolled_back"])
        for serial, position in state["in_flight"]:
            prompt = self.prompts.at(position)
            assert prompt, "it was given once"
            self._start(Slot(serial, position, prompt, version))

    async def close(self) -> None:
        """Cancel what is in flight and wait until it is gone."""
        tasks = [*self.tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
