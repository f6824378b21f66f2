"""Prompts by pass rate: none that is mastered, rarely one outside a band (rollout/README.md)."""

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
    low: float = 0.0
    high: float = 1.0
    outside: float = 1.0
    """Share of the turns of a prompt outside the band at which it is drawn."""


class Curriculum:
    """The prompts of `inner`, `count` an epoch, some passed over; positions are those of `inner`."""

    def __init__(self, inner: Prompts, count: int, rule: Rule, *, seed: int):
        self.inner, self.count, self.rule, self.seed = inner, count, rule, seed
        self.rates: dict[str, list[float]] = {}
        """Shares of right answers of each prompt's last groups, the newest last."""
        self.passed = self.forced = 0
        self.counted = 0, 0  # both at the end of the last step: what is drawn after it is drawn again

    @property
    def position(self) -> int:
        """One past the prompt drawn last."""
        return self.inner.position

    @position.setter
    def position(self, position: int) -> None:
        self.inner.position = position

    def at(self, position: int) -> Prompt | None:
        """The prompt at `position`, without moving."""
        return self.inner.at(position)

    def __next__(self) -> Prompt:
        start, none, spare = self.position, 0, None
        for position in range(start, start + self.count):
            prompt = self.at(position)
            if prompt and self.drawn(prompt.id, position):
                return self._go(position, none)
            if spare is None and prompt and not self.mastered(prompt.id):
                spare = position, none
            none += prompt is None
        self.forced += 1
        return self._go(*(spare or (start, 0)))

    def _go(self, position: int, none: int) -> Prompt:
        """The prompt at `position`; of those before it `none` are no prompts."""
        self.passed += position - self.position - none
        self.position = position
        return next(self.inner)

    def drawn(self, prompt_id: str, position: int) -> bool:
        """Whether the prompt is drawn when its turn at `position` comes."""
        if self.mastered(prompt_id):
            return False
        return self.inside(prompt_id) or _coin(self.seed, position) < self.rule.outside

    def mastered(self, prompt_id: str) -> bool:
        """Whether its rate has reached `retire`."""
        rate = self.pass_rate(prompt_id)
        return rate is not None and 0 < self.rule.retire <= rate

    def inside(self, prompt_id: str) -> bool:
        """Whether its rate lies in the band; one never judged counts as inside."""
        rate = self.pass_rate(prompt_id)
        return rate is None or self.rule.low <= rate <= self.rule.high

    def pass_rate(self, prompt_id: str) -> float | None:
        """Mean share of right answers of its last `visits` groups; None if it was never judged."""
        rates = self.rates.get(prompt_id)
        return sum(rates) / len(rates) if rates else None

    def observe(self, group: Group) -> None:
        """Take in a finished group, in the order of issue; hotter second draws do not count."""
        first = group.earlier[0] if group.earlier else group
        known = self.rates.get(group.prompt.id, [])
        self.rates[group.prompt.id] = [*known, first.share_right][-self.rule.visits :]

    def metrics(self, groups: Sequence[Group], judged: Sequence[Group], version: Version) -> dict[str, float]:
        """Of every prompt judged so far, and how often one was passed over since the run began."""
        self.counted, known = (self.passed, self.forced), max(1, len(self.rates))
        return {
            "prompts/seen": float(len(self.rates)),
            "prompts/mastered": sum(map(self.mastered, self.rates)) / known,
            "prompts/inside": sum(map(self.inside, self.rates)) / known,
            "prompts/passed_over": float(self.passed),
            "prompts/forced": float(self.forced),
        }

    def state(self) -> dict[str, Any]:
        """Plain JSON; the position is the stream's to keep."""
        return {"rates": dict(self.rates), "counted": list(self.counted)}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.rates = {name: list(rates) for name, rates in state["rates"].items()}
        self.passed, self.forced = state["counted"]
        self.counted = self.passed, self.forced


def _coin(seed: int, position: int) -> float:
    """In [0, 1), the same for the same turn in every run with this seed."""
    words = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return int.from_bytes(words, "little") / 2**64
