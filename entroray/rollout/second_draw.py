"""A group without one right answer: drawn once more at once, hotter, or given a success of old."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

from entroray.rollout.replay import Replay
from entroray.rollout.stream import Dropped
from entroray.types import Group, Version

DrawAgain = Callable[[float], Awaitable[Group | Dropped]]
"""Factor on the temperature -> the same prompt's group, drawn with other seeds."""


@dataclass(frozen=True)
class SecondDraw:
    """The second draw comes first (UEC-RL, arXiv 2604.14646), and replay where that has nothing right either.

    UEC-RL keeps the right answers of the second draw among those of the first. Here the second draw takes
    the first one's place whole, whatever came of it: every member of a group is then from one distribution,
    the advantages are compared within it, and the importance weights bring it back to the policy's.
    """

    hotter: float = 1.0
    """Factor on the temperature of the second draw; 1 is none."""
    replay: Replay | None = None

    async def __call__(self, group: Group | Dropped, again: DrawAgain) -> Group | Dropped:
        if self.hotter != 1.0 and _failed(group):
            group = _instead(group, await again(self.hotter))
        return self.replay.mend(group) if self.replay and isinstance(group, Group) else group

    def metrics(self, groups: Sequence[Group], judged: Sequence[Group], version: Version) -> dict[str, float]:
        """Of the groups judged in the step; `judged` holds first draws and second ones."""
        if self.hotter == 1.0:
            return {}
        second = [g for g in judged if g.earlier]
        drawn = len(judged) - sum(len(g.earlier) for g in second)
        found = {"second/groups": len(second) / max(1, drawn)}
        if second:
            found["second/right"] = sum(g.share_right for g in second) / len(second)
            found["second/mended"] = sum(g.share_right > 0 for g in second) / len(second)
        return found


def _failed(group: Group | Dropped) -> bool:
    return isinstance(group, Group) and group.share_right == 0


def _instead(first: Group | Dropped, second: Group | Dropped) -> Group | Dropped:
    """The second draw, which knows of the first; the first where the second gave no group."""
    if not isinstance(first, Group):
        return first
    if isinstance(second, Group):
        return replace(second, earlier=(first,))
    return replace(first, lost=first.lost + second.drawn)
