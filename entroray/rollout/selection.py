"""How prompts and groups are chosen, beyond drawing each prompt once in its turn."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from entroray.roles import StepMetrics
from entroray.rollout.second_draw import SecondDraw
from entroray.types import Group


class GroupObserver(Protocol):
    """What is remembered of prompts from step to step; it is in the checkpoint."""

    def note(self, group: Group) -> None:
        """Hear how a group came out; in order of issue, after the step."""
        ...

    def state(self) -> Any:
        """Plain JSON."""
        ...

    def restore(self, state: Any) -> None:
        """Go on from `state`."""
        ...


@dataclass(frozen=True)
class Selection:
    """The choices of one run; the default makes none."""

    memories: Mapping[str, GroupObserver] = field(default_factory=dict)
    """By the name they have in the driver's state."""
    rescue: SecondDraw = field(default_factory=SecondDraw)
    tell: Sequence[StepMetrics] = ()
