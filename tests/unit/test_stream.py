"""The stream beside one that looks at every group anew whenever a group finishes, on schedules by chance."""

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from entroray.errors import DataError
from entroray.rollout.ledger import NO_SIGNAL, REFUSED, SURPLUS
from entroray.rollout.stream import Dropped, Slot, Stream, _too_many
from entroray.types import Group, Prompt, Rollout, Verdict
from tests.toy import ToyPrompts

Keep = Callable[[Group], bool]


class Plain(Stream):
    """The definition: no counters, nothing remembered of what was sifted."""

    def _unfinished(self) -> bool:
        return any(slot.group is None for slot in self.slots.values())

    async def take(self, keep: Keep, *, wait: bool, limit: int) -> list[Group]:
        self.dropped = Counter()
        while True:
            self.changed.clear()
            self.sift(keep, wait)
            if self.dropped.total() > limit:
                raise DataError(_too_many(self.dropped, limit))
            self.fill()
            ready = [s for _, s in sorted(self.slots.items()) if s.group][: self.per_step]
            if len(ready) == self.per_step and self.may_go(ready, wait):
                return self.leave(ready)
            await self.changed.wait()

    def sift(self, keep: Keep, wait: bool) -> None:
        for slot in [s for s in self.slots.values() if s.group]:
            if not wait and self.version - slot.group.version > self.max_lag:
                self.ledger.drop(slot.serial, REFUSED, slot.group)
                self._remove(slot)
                self._issue(slot.prompt, slot.position)
            elif not keep(slot.group):
                self.judged[slot.serial] = slot.group
                self._free(slot, NO_SIGNAL)

    def may_go(self, ready: list[Slot], wait: bool) -> bool:
        return not self._unfinished() if self.max_lag == 0 else not wait or self.feasible(ready)

    def feasible(self, ready: list[Slot]) -> bool:
        taken = {s.serial for s in ready}
        left = [s.version for s in self.slots.values() if s.serial not in taken]
        return all(
            sum(v + self.max_lag <= self.version + ahead - 1 for v in left) <= (ahead - 1) * self.per_step
            for ahead in range(1, self.max_lag + 2)
        )

    def leave(self, ready: list[Slot]) -> list[Group]:
        if self.max_lag == 0:
            kept = len(self.slots)
            self.kept_share = kept / (kept + len(self.judged))
        taken = {s.serial for s in ready}
        surplus = [s for s in self.slots.values() if s.group and s.serial not in taken]
        self.held = len(surplus) if self.keeps else 0
        for slot in ready if self.keeps else [*ready, *surplus]:
            self.judged[slot.serial] = slot.group
            self._remove(slot)
        for slot in ready:
            self.ledger.take(slot.serial)
        for slot in [] if self.keeps else surplus:
            self.ledger.drop(slot.serial, SURPLUS, slot.group)
        return [s.group for s in ready]


def group_of(prompt: Prompt, version: int) -> Group:
    ids, versions = np.zeros(3, np.int32), np.full(3, version, np.int32)
    return Group(
        prompt, (Rollout(prompt.id, ids, ids.astype(np.float32), versions, "", 1.0, 3),), (Verdict(0, False),)
    )


async def told(kind: type[Stream], seed: int, *, wait: bool, **settings: Any) -> list[object]:
    """What a run of some steps came to, of groups that finish, fail or are sent back by chance."""
    stream: Stream

    async def rollout(prompt: Prompt, serial: int) -> Group | Dropped:
        chance = random.Random(f"{seed} {prompt.id} {serial}")
        began = stream.version
        for _ in range(chance.choice([1, 1, 2, 3, 5, 40])):
            await asyncio.sleep(0)
        if chance.random() < 0.1:
            return Dropped(f"timeout: {chance.randrange(3)}")
        return group_of(prompt, began)

    def keeps(below: int) -> Keep:
        return lambda group: random.Random(f"{seed} {group.prompt.id}").randrange(10) < below

    stream, lines = kind(ToyPrompts(), rollout, **settings), list[object]()
    rules = [keeps(6)] * 4 + [keeps(4)] * 4
    for version, keep in enumerate(rules):
        stream.advance(version)
        taken = await stream.take(keep, wait=wait, limit=200)
        for _ in range(random.Random(seed + version).randrange(30)):
            await asyncio.sleep(0)
        lines += [[g.prompt.id for g in taken], [g.prompt.id for g in stream.judged_since()], stream.held]
        lines += [stream.state()]
    await stream.close()
    return lines


@pytest.mark.parametrize("wait", [True, False])
@pytest.mark.parametrize(("max_lag", "keeps"), [(0, False), (1, False), (1, True), (2, True), (3, False)])
def test_a_stream_trains_drops_refuses_and_holds_what_its_definition_does(
    max_lag: int, keeps: bool, wait: bool
) -> None:
    for seed in range(6):
        settings = {"per_step": 2 + seed, "max_lag": max_lag, "keeps": keeps, "wait": wait}
        runs = [asyncio.run(told(kind, seed, **settings)) for kind in (Stream, Plain)]
        assert runs[0] == runs[1], settings


def test_whether_the_rest_can_still_be_trained_is_what_its_definition_says() -> None:
    """Windows by chance, more crowded than a run makes them, of versions that never fall."""
    found = Counter[bool]()
    for seed in range(400):
        chance = random.Random(seed)
        per_step, max_lag, version = chance.randint(1, 3), chance.randint(1, 3), 5
        stream = Stream(ToyPrompts(), None, per_step=per_step, max_lag=max_lag, keeps=False)  # type: ignore[arg-type]
        stream.version = version
        for serial, old in enumerate(sorted(chance.choices(range(max_lag + 1), k=9), reverse=True)):
            group = group_of(Prompt("q", "q", (0,), ""), 0) if chance.random() < 0.6 else None
            stream.slots[serial] = slot = Slot(
                serial, serial, Prompt("q", "q", (0,), ""), version - old, group
            )
            for count in (stream.issued, stream.finished) if group else (stream.issued,):
                count[slot.version] += 1
        ready = [s for s in stream.slots.values() if s.group][:per_step]
        if len(ready) == per_step:
            found[answer := stream._feasible()] += 1
            assert answer == Plain.feasible(stream, ready), seed  # type: ignore[arg-type]
    assert min(found[True], found[False]) > 10


class Counted(dict[int, Slot]):
    """Slots that count how many of them were looked through."""

    seen = 0

    def values(self) -> Any:
        self.seen += len(self)
        return super().values()


@pytest.mark.parametrize("wait", [True, False])
@pytest.mark.parametrize("max_lag", [0, 1])
def test_a_group_that_finishes_costs_the_same_however_many_there_are(max_lag: int, wait: bool) -> None:
    """48 groups a step, which finish one after the other: each is shown to the rule once."""
    asked: list[str] = []

    async def rollout(prompt: Prompt, serial: int) -> Group:
        for _ in range(serial % 96):
            await asyncio.sleep(0)
        return group_of(prompt, stream.version)

    def keep(group: Group) -> bool:
        asked.append(group.prompt.id)
        return group.prompt.id[-1] != "7"

    async def run() -> None:
        for version in range(3):
            stream.advance(version)
            await stream.take(keep, wait=wait, limit=999)
        await stream.close()

    stream = Stream(ToyPrompts(), rollout, per_step=48, max_lag=max_lag, keeps=max_lag > 0)
    stream.slots = slots = Counted()
    asyncio.run(run())
    assert len(asked) == len(set(asked)) >= 144
    assert slots.seen <= 3 * 2 * 48 * (max_lag + 2), "twice a step, not once a group"


def test_an_error_of_a_group_is_raised_by_the_next_step_and_once_only() -> None:
    async def rollout(prompt: Prompt, serial: int) -> Group:
        raise ValueError(prompt.id)

    async def run() -> None:
        stream = Stream(ToyPrompts(), rollout, per_step=2, max_lag=1, keeps=False)
        with pytest.raises(ValueError, match="q0"):
            await stream.take(lambda group: True, wait=True, limit=1)
        await stream.close()
        assert not stream.tasks

    asyncio.run(run())
