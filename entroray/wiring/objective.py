"""The objective of the configuration: built, judged against the other settings, and put into words."""

from operator import attrgetter
from typing import Any

from entroray.config import Config
from entroray.control import Controller, build_controllers
from entroray.objective import Objective, build_objective, check_group_size
from entroray.objective.compatibility import Schedule, check_combinations, remarks
from entroray.wiring import controllers, rollout_plan, sampler, selection


def build_checked_objective(config: Config) -> Objective:
    """The objective as configured; ConfigError where it cannot be trained with these settings."""
    objective = build_objective(config.objective, config.packages)
    check_group_size(objective, config.rollout.group_size)
    check_combinations(objective, objective_schedule(config))
    return objective


def objective_schedule(config: Config) -> Schedule:
    """What the settings say of when a row is used."""
    r, (_, updates) = config.rollout, controllers.updates_range(config)
    return Schedule(
        updates,
        config.driver.max_lag,
        second=selection.draws_hotter(r, "at_once"),
        replay=bool(r.replay.tokens),
        lowest=r.prompts.band[0],
        highest=r.prompts.band[1],
        retire=r.prompts.retire,
        shaped=sampler.reshapes(config),
        siblings=rollout_plan.makes_siblings(config.rollout.plan, config.packages),
        by_entropy=tuple(
            (c.name, c.knob)
            for c in _controllers(config)
            if (c.signal or "").startswith(("entropy/", "update/entropy"))
        ),
    )


def remark_lines(config: Config, objective: Objective) -> list[str]:
    """What is refused, inert, or to beware of, one a line."""
    return [f"  {r.kind:<12} {r.text}" for r in remarks(objective, objective_schedule(config))]


ADVISED = (
    *("learner.lr", "learner.updates_per_rollout", "driver.max_lag", "model.dtype", "sampler.temperature"),
    *("rollout.max_tokens",),
)
"""Settings that the words on a run are about, beside its objective."""


def advised_settings(config: Config) -> dict[str, Any]:
    """The run's settings by dotted name, as `metrics.remedies` reads them."""
    steered = {"objective": dict(config.objective), "control": [c.knob for c in _controllers(config)]}
    return {name: attrgetter(name)(config) for name in ADVISED} | steered


def _controllers(config: Config) -> tuple[Controller, ...]:
    return build_controllers(config.control, config.packages)
