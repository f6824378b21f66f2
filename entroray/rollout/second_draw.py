"""A prompt without one right answer: drawn again, hotter, or given a success of earlier steps."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from entroray.rollout.replay import Replay
from entroray.rollout.stream import Dropped
from entroray.types import Draw, Group, Prompt, Version

DrawAgain = Callable[[Draw], Awaitable[Group | Dropped]]
"""Draws the same prompt's group with other seeds."""
MAXIMUM = 1.5
"""Factor that failed groups multiply up to, with `next_time`."""


@dataclass
class SecondDraw:
    """A failed prompt is drawn hotter (UEC-RL, arXiv 2604.14646); replay follows if that fails too."""

    factor: float = 1.0
    """On the temperature; 1 draws nothing hotter."""
    when: str = "at_once"
    """`at_once` | `next_time`."""
    replay: Replay | None = None
    factors: dict[str, float] = field(default_factory=dict)
    """Of the prompts whose last group failed, with `next_time`."""

    def first(self, prompt: Prompt, draw: Draw) -> Draw:
        """`draw` as the prompt's next group is drawn."""
        factor = self.factors.get(prompt.id, 1.0)
        return draw if factor == draw.factor else replace(draw, factor=factor)

    async def __call__(self, group: Group | Dropped, draw: Draw, again: DrawAgain) -> Group | Dropped:
        if not isinstance(group, Group):
            return group
        if self.when == "at_once" and self.factor != 1.0 and group.share_right == 0:
            hotter = await again(replace(draw, factor=self.factor))
            group = replace(hotter, earlier=(group,)) if isinstance(hotter, Group) else group
        return self.replay.insert_success(group) if self.replay else group

    def observe(self, group: Group) -> None:
        """Remember whether the prompt failed."""
        if group.share_right > 0:
            self.factors.pop(group.prompt.id, None)
        elif self.when == "next_time":
            factor = self.factors.get(group.prompt.id, 1.0) * self.factor
            self.factors[group.prompt.id] = min(factor, MAXIMUM)

    def metrics(self, groups: Sequence[Group], judged: Sequence[Group], version: Version) -> dict[str, float]:
        """Of the groups judged in the step; `judged` holds first draws and second ones."""
        second = [g for g in judged if g.earlier]
        drawn = len(judged) - sum(len(g.earlier) for g in second)
        found = {"second/groups": len(second) / max(1, drawn)}
        if second:
            found["second/right"] = sum(g.share_right for g in second) / len(second)
            found["second/mended"] = sum(g.share_right > 0 for g in second) / len(second)
        return found

    def state(self) -> dict[str, float]:
        return dict(self.factors)

    def restore(self, state: Mapping[str, float]) -> None:
        self.factors = dict(state)
