"""How prompts and groups are chosen, beyond drawing each prompt once in its turn."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from entroray.errors import ConfigError
from entroray.roles import GroupObserver, StepMetrics
from entroray.rollout.second_draw import SecondDraw


@dataclass(frozen=True)
class Selection:
    """What one run chooses; the default chooses nothing."""

    observers: Mapping[str, GroupObserver] = field(default_factory=dict)
    """By the settings that ask for them, which are their names in the driver's state."""
    second_draw: SecondDraw = field(default_factory=SecondDraw)
    metrics: Sequence[StepMetrics] = ()

    def restore(self, states: Mapping[str, Any]) -> None:
        """Go on from what each observer remembered; ConfigError if `states` holds nothing of one."""
        if missing := sorted(self.observers.keys() - states.keys()):
            raise ConfigError(
                f"{', '.join(missing)}: in effect here, and the checkpoint is of a run without: set it as "
                "the config.yaml of run.dir has it, or begin anew with another run.dir"
            )
        for name, observer in self.observers.items():
            observer.restore(states[name])
