"""A prompt whose whole group was wrong is drawn hotter when it comes up again (UEC-RL, arXiv 2604.14646)."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from entroray.types import Group


@dataclass
class Heat:
    """Factor on the sampling temperature by prompt; 1 for all but those that failed.

    Each group without one right rollout multiplies its prompt's factor, up to `most`; one right rollout
    cools it to 1. The policy's own temperature stays what it is: what is drawn hotter is corrected for.
    """

    factor: float = 1.0
    """On a prompt's temperature for each failed group; 1 is off."""
    most: float = 1.0
    factors: dict[str, float] = field(default_factory=dict)

    def of(self, prompt_id: str) -> float:
        """The factor to draw this prompt at."""
        return self.factors.get(prompt_id, 1.0)

    def note(self, group: Group) -> None:
        """Hear how a whole group ended."""
        if group.share_right > 0:
            self.factors.pop(group.prompt.id, None)
        elif self.factor != 1.0:
            self.factors[group.prompt.id] = min(self.of(group.prompt.id) * self.factor, self.most)

    def state(self) -> dict[str, float]:
        """Plain JSON."""
        return dict(self.factors)

    def restore(self, state: Mapping[str, float]) -> None:
        """Go on from `state`, in place: the generators read the same object."""
        self.factors.clear()
        self.factors.update(state)
