"""Which prompts come up: none that is mastered, and rarely one whose pass rate lies outside a band.

The rule, in the order of `inner`: a prompt never judged is drawn. One whose running pass rate, the mean share
of right answers of its last `visits` groups, is at least `retire` is passed over, for good or for `rest`
epochs (ScaleRL's no-positive-resampling at 0.9, arXiv 2510.13786). One whose rate lies outside
[`low`, `high`] is drawn at a share `outside` of its turns: prompts of middling difficulty carry the most
signal (balanced difficulty filtering, arXiv 2504.03380; there groups are thrown away after they were drawn),
and the rest must be looked at now and then, since the policy changes. Where a whole epoch holds none to draw,
the next prompt that is not mastered is drawn all the same, else the next: nothing ever starves.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from entroray.roles import Prompts
from entroray.types import Group, Prompt, Version


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Pass rates in [0, 1]; the default passes over nothing."""

    visits: int = 2
    """Last groups of a prompt that its running pass rate is the mean of."""
    retire: float = 0.0
    """Rate from which a prompt is passed over; 0 is never."""
    rest: int = 0
    """Epochs it is passed over for; 0 is for good."""
    low: float = 0.0
    high: float = 1.0
    outside: float = 1.0
    """Share of the turns of a prompt outside the band at which it is drawn."""


@dataclass
class Record:
    """What is known of one prompt."""

    rates: list[float]
    """Shares of right answers, the newest last."""
    epoch: int
    """In which it was judged last."""

    @property
    def rate(self) -> float:
        return sum(self.rates) / len(self.rates)


class Curriculum:
    """The prompts of `inner`, `count` an epoch, some passed over; positions are those of `inner`.

    What is drawn depends on `seed`, positions and the groups noted so far alone, and `at` on the position
    alone: a slot in flight finds its prompt again whatever has been learnt of it since.
    """

    def __init__(self, inner: Prompts, count: int, rule: Rule, *, seed: int):
        self.inner, self.count, self.rule, self.seed = inner, count, rule, seed
        self.records: dict[str, Record] = {}
        self.passed = self.forced = 0

    @property
    def position(self) -> int:
        """One past the prompt drawn last."""
        return self.inner.position

    @position.setter
    def position(self, position: int) -> None:
        self.inner.position = position

    def at(self, position: int) -> Prompt:
        """The prompt at `position`, without moving."""
        return self.inner.at(position)

    def __next__(self) -> Prompt:
        start, spare = self.position, None
        for position in range(start, start + self.count):
            prompt_id = self.at(position).id
            if self.drawn(prompt_id, position):
                return self._go(position)
            if spare is None and not self.mastered(prompt_id, position):
                spare = position
        self.forced += 1
        return self._go(start if spare is None else spare)

    def _go(self, position: int) -> Prompt:
        self.passed += position - self.position
        self.position = position
        return next(self.inner)

    def drawn(self, prompt_id: str, position: int) -> bool:
        """Whether the prompt is drawn when its turn at `position` comes."""
        if self.mastered(prompt_id, position):
            return False
        return self.inside(prompt_id) or _coin(self.seed, position) < self.rule.outside

    def mastered(self, prompt_id: str, position: int) -> bool:
        """Whether its rate has reached `retire` and its rest is not over."""
        record = self.records.get(prompt_id)
        if record is None or not self.rule.retire or record.rate < self.rule.retire:
            return False
        return not self.rule.rest or position // self.count - record.epoch <= self.rule.rest

    def inside(self, prompt_id: str) -> bool:
        """Whether its rate lies in the band; one never judged counts as inside."""
        record = self.records.get(prompt_id)
        return record is None or self.rule.low <= record.rate <= self.rule.high

    def note(self, group: Group) -> None:
        """Hear how a group came out, in the order of issue; hotter second draws do not count."""
        first = group.earlier[0] if group.earlier else group
        record = self.records.setdefault(group.prompt.id, Record([], 0))
        record.rates = [*record.rates, first.share_right][-self.rule.visits :]
        record.epoch = max(0, self.position - 1) // self.count

    def metrics(self, groups: Sequence[Group], judged: Sequence[Group], version: Version) -> dict[str, float]:
        """Of every prompt judged so far, and how often one was passed over since the run began."""
        known = max(1, len(self.records))
        turn = self.position
        return {
            "prompts/seen": float(len(self.records)),
            "prompts/mastered": sum(self.mastered(p, turn) for p in self.records) / known,
            "prompts/inside": sum(map(self.inside, self.records)) / known,
            "prompts/passed_over": float(self.passed),
            "prompts/forced": float(self.forced),
        }

    def state(self) -> dict[str, Any]:
        """Plain JSON; the position is the stream's to keep."""
        records = {name: [r.epoch, *r.rates] for name, r in self.records.items()}
        return {"records": records, "passed": self.passed, "forced": self.forced}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        self.records = {name: Record(rates, epoch) for name, (epoch, *rates) in state["records"].items()}
        self.passed, self.forced = state["passed"], state["forced"]


def _coin(seed: int, position: int) -> float:
    """In [0, 1), the same for the same turn in every run with this seed."""
    words = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return int.from_bytes(words, "little") / 2**64
