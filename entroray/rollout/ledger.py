"""What became of every prompt, group, sample and token: issued = trained + dropped(reason) + pending.

The stream issues prompts, the driver asks for samples and receives them. Whoever trains on a group or drops
it hands it in, and it must hold what was drawn for it. `check` compares after each step (README.md).
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import numpy as np
from numpy.typing import NDArray

from entroray.errors import LedgerError
from entroray.roles import Generator
from entroray.rollout.branch_points import Attempt, failure
from entroray.types import Group, Rollout, Status

UNITS = "prompts", "groups", "samples", "tokens"
Amount = NDArray[np.int64]  # [4], of UNITS
Lines = dict[str, Amount]
NONE: Amount = np.zeros(4, np.int64)

ISSUED, TRAINED, DROPPED = "issued", "trained", "dropped: "
NO_SIGNAL = "no signal"
"""Why a group that `keep` sent back was dropped."""
REFUSED, SURPLUS = "refused", "surplus"
"""Too old, its prompt issued again; finished beyond a step's need."""
SKIPPED, ROLLED_BACK = "skipped", "rolled_back"
"""Of an update that was left out; drawn after the checkpoint that the run went on from."""
FIRST, REPLACED = "first_draw", "replaced"
"""A second draw, or what was replayed, took their place."""
SECOND, REPLAY, ANEW, EVALUATION = "second_draw", "replay", "drawn_anew", "evaluation"
"""Lines beside the balance: parts of it, or of none."""


@dataclass
class Account:
    """One group in flight."""

    position: int = -1
    prompt_id: str = "nobody"
    drawn: Amount = field(default_factory=NONE.copy)
    """Samples asked for it, tokens received."""
    lost: Lines = field(default_factory=dict)
    """Of these, by reason, what failed."""

    @property
    def rest(self) -> Amount:
        return self.drawn - sum(self.lost.values(), NONE)


class Ledger:
    """The balance of a run from its first step on, over all its processes."""

    def __init__(self) -> None:
        self.lines: Lines = {}
        """`issued`, `trained`, `dropped: <reason>`; and what is part of these, or of none."""
        self.open = defaultdict[int, Account](Account)
        """Groups in flight, by serial; `taken` are those of the step under way."""
        self.taken: dict[int, Account] = {}
        self.again: set[int] = set()
        """Positions of prompts to be issued again."""
        self.last = -1
        """Position issued last."""
        self.wrong: list[str] = []

    # What happens.

    def issue(self, serial: int, position: int, prompt_id: str) -> None:
        """A group is begun."""
        again = position in self.again
        if not again and position <= self.last:
            self.wrong.append(f"the prompt at position {position} ({prompt_id}) was issued twice")
        self.again.discard(position)
        self.last = max(self.last, position)
        _add(self.lines, ISSUED, np.array([not again, 1, 0, 0]))
        self.open[serial] = Account(position, prompt_id)

    def ask(self, serial: int, samples: int) -> None:
        """So many samples of a group are asked for."""
        self.open[serial].drawn += np.array([0, 0, samples, 0])
        _add(self.lines, ISSUED, np.array([0, 0, samples, 0]))

    def receive(self, serial: int, found: Attempt, line: str = "") -> None:
        """What came of that; `line` says why it was asked for, where that was not the first time."""
        account = self.open[serial]
        for rollout, verdict in found.failed:
            _add(account.lost, failure(rollout, verdict), _count([rollout]))
        amount = _count([*(r for r, _ in (*found.kept, *found.failed)), *found.abandoned])
        account.drawn += amount * (0, 0, 0, 1)
        _add(self.lines, ISSUED, amount * (0, 0, 0, 1))
        _add(self.lines, line, amount if line else NONE)

    def drop(self, serial: int, reason: str, group: Group | None = None) -> None:
        """A group in flight is given up; where none came of it, whatever did not fail goes with it."""
        account, why = self.open.pop(serial, Account()), reason.partition(":")[0]
        self._close(account, _contents(group, why) if group else {why: account.rest}, why)
        if why == REFUSED:
            self.again.add(account.position)

    def take(self, serial: int) -> None:
        """A group is handed to the step."""
        self.taken[serial] = self.open.pop(serial, Account())

    def commit(self, groups: Sequence[Group], reason: str = TRAINED) -> None:
        """What was handed to the step is trained on, or dropped with an update that was left out."""
        for account, group in zip_longest(self.taken.values(), groups):
            account = account or Account()
            self._close(account, _contents(group, reason) if group else {}, reason)
            if group and group.prompt.id != account.prompt_id:
                self.wrong.append(f"the group of {group.prompt.id} was trained on for {account.prompt_id}")
            old = [r.length for r in group.rollouts if r.replayed] if group else []
            _add(self.lines, REPLAY, np.array([0, bool(old), len(old), sum(old)]))
        self.taken = {}

    def _close(self, account: Account, parts: Lines, reason: str) -> None:
        lacks = account.rest - sum(parts.values(), NONE)
        if lacks.any():
            whose = f"the group of {account.prompt_id}, {reason}, does not hold what was drawn for it"
            self.wrong.append(f"{whose}: {lacks[2]:+d} samples, {lacks[3]:+d} tokens")
        for lines in (parts, account.lost, {reason: np.array([reason != REFUSED, 1, 0, 0])}):
            for why, amount in lines.items():
                _add(self.lines, TRAINED if why == TRAINED else DROPPED + why, amount)

    # The law.

    @property
    def dropped(self) -> Lines:
        """By reason."""
        return {n.removeprefix(DROPPED): amount for n, amount in self.lines.items() if n.startswith(DROPPED)}

    @property
    def pending(self) -> Amount:
        waiting = (*self.open.values(), *self.taken.values())
        groups = np.array([len(waiting) + len(self.again), len(waiting), 0, 0])
        return groups + sum((account.drawn for account in waiting), NONE)

    @property
    def gap(self) -> Amount:
        """Issued, and neither trained on nor dropped."""
        return self.of(ISSUED) - self.of(TRAINED) - sum(self.dropped.values(), NONE)

    def of(self, line: str) -> Amount:
        return self.lines.get(line, NONE)

    def check(self, in_flight: Collection[int]) -> None:
        """LedgerError unless all that was issued is trained on, dropped, or in the groups `in_flight`."""
        wrong = list(self.wrong)
        if odd := sorted(self.open.keys() ^ set(in_flight)):
            wrong.append(f"groups {odd[:5]} are in flight and were not issued, or the other way round")
        if self.again:
            wrong.append(f"the prompts at positions {sorted(self.again)[:5]} were not issued again")
        pairs = zip(UNITS, self.gap - self.pending, strict=True)
        wrong += [f"{missing:+d} {unit} are nowhere" for unit, missing in pairs if missing]
        if wrong:
            raise LedgerError("; ".join(wrong[:8]) + "\n" + "\n".join(self.report()))

    # What is said of it.

    @property
    def spent(self) -> int:
        """Response tokens drawn for groups trained on or dropped, without what was rolled back."""
        return int((self.of(ISSUED) - self.pending - self.of(DROPPED + ROLLED_BACK))[3])

    def metrics(self) -> dict[str, float]:
        """The running totals."""
        back, refused, surplus = (self.of(DROPPED + reason) for reason in (ROLLED_BACK, REFUSED, SURPLUS))
        lines = {"pending": self.pending, ROLLED_BACK: back} | {n: self.of(n) for n in (ISSUED, TRAINED)}
        found = {f"{u}/{name}": n[i] for name, n in lines.items() for i, u in enumerate(UNITS) if i}
        found["groups/dropped"] = (sum(self.dropped.values(), NONE) - back - refused - surplus)[1]
        found |= {"groups/refused": refused[1], "groups/surplus": surplus[1]}
        found |= {"tokens/drawn": self.spent, "tokens/evaluated": self.of(EVALUATION)[3]}
        return {name: float(value) for name, value in found.items()}

    def table(self) -> dict[str, dict[str, int]]:
        """Every line, as JSON holds it."""
        whole = {ISSUED: self.of(ISSUED), TRAINED: self.of(TRAINED), "pending": self.pending}
        lines = whole | {name: amount for name, amount in self.lines.items() if name not in whole}
        return {name: dict(zip(UNITS, amount.tolist(), strict=True)) for name, amount in lines.items()}

    def report(self) -> list[str]:
        """Every line, in words."""
        said = lambda line: ", ".join(f"{n:,} {unit}" for unit, n in line.items() if n)
        return [f"ledger     {name}: {said(line) or 'none'}" for name, line in self.table().items()]

    # What a checkpoint holds.

    def state(self) -> dict[str, Any]:
        """Plain JSON for whoever goes on: what is pending, or missing, is rolled back, its prompts wait."""
        waiting = {a.position for a in (*self.open.values(), *self.taken.values())} | self.again
        lines, rest = dict(self.lines), self.gap - np.array([len(waiting), 0, 0, 0])
        _add(lines, DROPPED + ROLLED_BACK, np.maximum(rest, 0))
        _add(lines, ISSUED, -np.minimum(rest, 0))
        plain = {name: amount.tolist() for name, amount in lines.items()}
        return {"lines": plain, "last": self.last, "again": sorted(waiting)}

    def roll_back(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """`state`, with what this ledger has seen beyond it rolled back, too."""
        lines = state["lines"]
        beyond = np.maximum(self.of(ISSUED) - lines.get(ISSUED, NONE), 0) * (0, 1, 1, 1)  # prompts come again
        more = {n: (beyond + lines.get(n, NONE)).tolist() for n in (ISSUED, DROPPED + ROLLED_BACK)}
        return {**state, "lines": {**lines, **more} if beyond.any() else lines}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`, in a new process or in this one."""
        self.lines = {name: np.array(n) for name, n in self.roll_back(state)["lines"].items()}
        self.taken, self.wrong = {}, []
        self.open.clear()
        self.again, self.last = set(state["again"]), state["last"]


@dataclass(frozen=True)
class Evaluated:
    """A Generator for evaluations: what it draws has a line of its own."""

    generator: Generator
    ledger: Ledger

    async def sample(self, *asked: Any, **named: Any) -> list[Rollout]:
        rollouts = await self.generator.sample(*asked, **named)
        _add(self.ledger.lines, EVALUATION, _count(rollouts))
        return rollouts


def _count(rollouts: Iterable[Rollout]) -> Amount:
    """The samples that the policy drew, and their tokens."""
    drawn = [r.drawn for r in rollouts if not r.replayed]
    return np.array([0, 0, len(drawn), sum(drawn)])


def _contents(group: Group, reason: str) -> Lines:
    """What a group holds that was drawn for it: its members under `reason`, the rest under its own."""
    found: Lines = {}
    _add(found, reason, _count(group.rollouts))
    _add(found, str(Status.ABANDONED), _count(group.abandoned))
    _add(found, REPLACED, _count(group.replaced))
    for first in group.earlier:
        for why, amount in _contents(first, FIRST).items():
            _add(found, why, amount)
    return found


def _add(lines: Lines, name: str, amount: Amount) -> None:
    if amount.any():
        lines[name] = lines.get(name, NONE) + amount
