"""What became of every prompt, group, sample and token: issued = trained + dropped(reason) + pending.

The stream issues prompts, the driver asks for samples and receives them. Whoever trains on a group or drops
it hands it in, and it must hold what was drawn for it. `check` compares after each step (README.md).
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import numpy as np
from numpy.typing import NDArray

from entroray.errors import LedgerError
from entroray.roles import Generator
from entroray.rollout.branch_points import Attempt, failure
from entroray.types import Draw, Group, Prompt, Rollout, Status

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
    """Of these, by reason, what its group will not hold."""


class Ledger:
    """The balance of a run from its first step on, over all its processes."""

    def __init__(self) -> None:
        self.lines: Lines = {}
        """`issued`, `trained`, `dropped: <reason>`; and what is part of these, or of none."""
        self.open: dict[int, Account] = {}
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
        self._account(serial).drawn[2] += samples
        _add(self.lines, ISSUED, np.array([0, 0, samples, 0]))

    def receive(self, serial: int, found: Attempt, line: str = "") -> None:
        """What came of that; `line` says why it was asked for, where that was not the first time."""
        failed = [(failure(*pair), _count(pair[:1])) for pair in found.failed]
        drawn = _count(r for r, _ in found.kept) + _count(found.abandoned) + sum((n for _, n in failed), NONE)
        account = self._account(serial)
        for reason, amount in failed:
            _add(account.lost, reason, amount)
        account.drawn[3] += drawn[3]
        _add(self.lines, ISSUED, drawn * (0, 0, 0, 1))
        if line:
            _add(self.lines, line, drawn)

    def lose(self, serial: int, reason: str, rollouts: Iterable[Rollout]) -> None:
        """Samples that did not fail and are of no use, because others did."""
        _add(self._account(serial).lost, _short(reason), _count(rollouts))

    def drop(self, serial: int, reason: str, group: Group | None = None) -> None:
        """A group in flight is given up, whole where it is there."""
        self._close(self.open.pop(serial, Account()), group, _short(reason))

    def take(self, serial: int) -> None:
        """A group is handed to the step."""
        self.taken[serial] = self.open.pop(serial, Account())

    def commit(self, groups: Sequence[Group], skipped: bool = False) -> None:
        """The groups of a step are trained on, or dropped with an update that was left out."""
        for account, group in zip_longest(self.taken.values(), groups):
            self._close(account or Account(), group, SKIPPED if skipped else TRAINED)
        self.taken = {}
        for group in groups:
            old = [r.length for r in group.rollouts if r.replayed]
            _add(self.lines, REPLAY, np.array([0, bool(old), len(old), sum(old)]))

    def _account(self, serial: int) -> Account:
        return self.open.setdefault(serial, Account())  # one that nobody issued shows in `check`

    def _close(self, account: Account, group: Group | None, reason: str) -> None:
        parts = _contents(group, reason) if group else {}
        lacks = account.drawn - sum((*parts.values(), *account.lost.values()), NONE)
        if lacks.any() or (group and group.prompt.id != account.prompt_id):
            whose = f"of {account.prompt_id}, {reason}: {lacks[2]} samples and {lacks[3]} tokens"
            self.wrong.append(f"{whose} were drawn and are not in the group of {group and group.prompt.id}")
        _add(parts, reason, np.array([reason != REFUSED, 1, 0, 0]))
        for why, amount in (*parts.items(), *account.lost.items()):
            _add(self.lines, TRAINED if why == TRAINED else DROPPED + why, amount)
        if reason == REFUSED:
            self.again.add(account.position)

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
        dropped, pending = self.dropped, self.pending
        refused, surplus, skipped, back = (
            dropped.pop(reason, NONE) for reason in (REFUSED, SURPLUS, SKIPPED, ROLLED_BACK)
        )
        failed = sum(dropped.values(), NONE)
        lines = {"trained": self.of(TRAINED), "pending": pending, "rolled_back": back}
        found = {f"{u}/{name}": n[i] for name, n in lines.items() for i, u in enumerate(UNITS) if i}
        found |= {"groups/dropped": failed[1], "groups/refused": refused[1], "groups/surplus": surplus[1]}
        found |= {"samples/dropped": (failed + refused + surplus + skipped)[2]}
        found |= {"groups/issued": self.of(ISSUED)[1], "samples/issued": self.of(ISSUED)[2]}
        found |= {"tokens/drawn": self.spent, "tokens/evaluated": self.of(EVALUATION)[3]}
        return {name: float(value) for name, value in found.items()}

    def table(self) -> dict[str, dict[str, int]]:
        """Every line, as JSON holds it."""
        lines = self.lines | {"pending": self.pending}
        return {name: dict(zip(UNITS, amount.tolist(), strict=True)) for name, amount in lines.items()}

    def report(self) -> list[str]:
        """Every line, in words."""
        said = lambda line: ", ".join(f"{n:,} {unit}" for unit, n in line.items() if n)
        return [f"ledger     {name}: {said(line) or 'none'}" for name, line in self.table().items()]

    # What a checkpoint holds.

    def state(self) -> dict[str, Any]:
        """Plain JSON; of what is pending the prompts, which are issued again."""
        waiting = {a.position for a in (*self.open.values(), *self.taken.values())}
        lines = {name: amount.tolist() for name, amount in self.lines.items()}
        return {"lines": lines, "last": self.last, "again": sorted(waiting | self.again)}

    def rolled_back(self, state: Mapping[str, Any]) -> "Ledger":
        """`state`, with what was pending in it and what was drawn since dropped as `rolled_back`."""
        then = Ledger()
        then.lines = {name: np.array(amount) for name, amount in state["lines"].items()}
        then.last, then.again = state["last"], set(state["again"])
        since = np.maximum(self.of(ISSUED) - then.of(ISSUED), 0)
        _add(then.lines, ISSUED, since * (0, 1, 1, 1))  # its prompts are issued again
        rest = then.gap - then.pending
        _add(then.lines, ISSUED, -np.minimum(rest, 0))  # of a ledger that did not balance
        _add(then.lines, DROPPED + ROLLED_BACK, np.maximum(rest, 0))
        _add(then.lines, EVALUATION, np.maximum(self.of(EVALUATION) - then.of(EVALUATION), 0))
        return then

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`: what this ledger has seen beyond it is rolled back."""
        vars(self).update(vars(self.rolled_back(state)))


@dataclass(frozen=True)
class Evaluated:
    """A Generator for evaluations: what it draws has a line of its own."""

    generator: Generator
    ledger: Ledger

    async def sample(
        self, prompt: Prompt, seeds: Sequence[int], draw: Draw, after: Sequence[int] = ()
    ) -> list[Rollout]:
        rollouts = await self.generator.sample(prompt, seeds, draw, after)
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


def _short(reason: str) -> str:
    """A reason without its details."""
    return reason.partition(":")[0]
