"""How prompts and groups are chosen, beyond drawing each prompt once in its turn."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from entroray.loop.rescue import Rescue
from entroray.types import Group, Version

Tell = Callable[[Sequence[Group], Sequence[Group], Version], dict[str, float]]
"""Groups trained on, groups judged, the version they made -> metrics of the step."""


class Memory(Protocol):
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
class Choice:
    """The choices of one run; the default makes none."""

    memories: Mapping[str, Memory] = field(default_factory=dict)
    """By the name they have in the driver's state."""
    rescue: Rescue = field(default_factory=Rescue)
    tell: Sequence[Tell] = ()
