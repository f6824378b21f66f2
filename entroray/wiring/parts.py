"""The functions that the settings name, each found and bound once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from entroray.binding import bind, holds, traits
from entroray.config import Config
from entroray.control import Controller, build_controllers
from entroray.errors import ConfigError
from entroray.objective import Objective, build_objective
from entroray.observe import trackers
from entroray.rollout import plans, reshape

INDEPENDENT = {"fn": "independent"}


@dataclass(frozen=True)
class Parts:
    """What a run is composed of, beside its numbers."""

    objective: Objective
    rule: partial
    """`sampler.rule`: entropy of each draw -> factor on its temperature."""
    plan: partial
    """`rollout.plan`: how the members of a group are drawn."""
    controllers: tuple[Controller, ...]
    trackers: tuple[partial, ...]

    @property
    def reshapes(self) -> bool:
        """Whether `sampler.rule` changes the distribution that tokens are drawn from."""
        return not holds(self.rule, "neutral")

    @property
    def branches(self) -> bool:
        """Whether members of a group may begin otherwise than at the prompt."""
        return not holds(self.plan, "neutral")

    @property
    def notes_entropy(self) -> bool:
        """Whether first draws are noted, if only by a rule that changes nothing."""
        return self.reshapes or "entropy" in traits(self.plan).needs


def build_parts(config: Config) -> Parts:
    """ConfigError names the setting that is unknown or mistyped, and the nearest right name."""
    if not config.objective:
        raise ConfigError("no objective: say objective=<name>, see conf/objective")
    packages = config.packages
    return Parts(
        objective=build_objective(config.objective, packages),
        rule=reshape.build_rule(config.sampler.rule, packages),
        plan=bind(plans, config.rollout.plan or INDEPENDENT, packages),
        controllers=build_controllers(config.control, packages),
        trackers=_build_trackers(config.observe.trackers, packages),
    )


def _build_trackers(specs: Sequence[Mapping[str, Any]], packages: Sequence[str]) -> tuple[partial, ...]:
    """ConfigError for two of ours that would write the same files, or go on with the same run."""
    bound = tuple(bind(trackers, spec, packages) for spec in specs)
    ours = [each.func.__name__ for each in bound if each.func.__module__ == trackers.__name__]
    if twice := [name for name in ours if ours.count(name) > 1]:
        both = " and ".join(f"{{fn: {name}}}" for name in twice)
        raise ConfigError(f"{trackers.SETTING} has {both}, which are one place in a run's folder: drop one")
    return bound
