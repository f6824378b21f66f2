"""How prompts and groups are chosen, beyond drawing each prompt once in its turn."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from entroray.roles import GroupObserver, StepMetrics
from entroray.rollout.second_draw import SecondDraw


@dataclass(frozen=True)
class Selection:
    """What one run chooses; the default chooses nothing."""

    observers: Mapping[str, GroupObserver] = field(default_factory=dict)
    """By their names in the driver's state."""
    second_draw: SecondDraw = field(default_factory=SecondDraw)
    metrics: Sequence[StepMetrics] = ()
