"""The objective of a run judged against its other settings, and put into words."""

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

from entroray.binding import traits
from entroray.config import Config
from entroray.control import Controller
from entroray.objective import check_group_size, why_scored
from entroray.objective.compatibility import Schedule, check_combinations, remarks
from entroray.policy.vocabulary_statistics import named
from entroray.wiring import sampler, selection
from entroray.wiring.controllers import updates_range
from entroray.wiring.parts import Parts


def check_objective(config: Config, parts: Parts) -> None:
    """ConfigError where the objective cannot be trained with these settings."""
    check_group_size(parts.objective, config.rollout.group_size)
    for statistic in parts.objective.statistics:
        named(statistic)
    check_combinations(parts.objective, objective_schedule(config, parts))


def objective_schedule(config: Config, parts: Parts) -> Schedule:
    """What the settings say of when a row is used."""
    r = config.rollout
    _, updates = updates_range(config.learner.updates_per_rollout, parts.controllers)
    return Schedule(
        updates,
        config.driver.max_lag,
        second=selection.draws_hotter(r.second, "at_once"),
        replay=bool(r.replay.tokens),
        lowest=r.prompts.band[0],
        highest=r.prompts.band[1],
        retire=r.prompts.retire,
        shaped=sampler.reshapes(parts, config.generator.engine, r.second),
        siblings=traits(parts.plan).siblings,
        by_entropy=tuple(
            (c.name, c.knob)
            for c in parts.controllers
            if (c.signal or "").startswith(("entropy/", "update/entropy"))
        ),
    )


def remark_lines(config: Config, parts: Parts) -> list[str]:
    """What is refused, inert, or to beware of, and whether steps are scored first, one a line."""
    found = remarks(parts.objective, objective_schedule(config, parts))
    return [*(f"  {r.kind:<12} {r.text}" for r in found), f"  scoring pass {_scoring(config, parts)}"]


def _scoring(config: Config, parts: Parts) -> str:
    """Whether a forward pass of its own scores the rows of a step before their update, and why."""
    if config.learner.score == "always":
        return "of every step: learner.score=always"
    _, updates = updates_range(config.learner.updates_per_rollout, parts.controllers)
    if why := why_scored(parts.objective, updates):
        return f"needed by {why}"
    every = config.observe.prediction.every
    due = f" but once in {every} steps, for observe.prediction.every" if every else ""
    return f"skipped{due}: nothing reads it before the update"


ADVISED = (
    *("learner.lr", "learner.updates_per_rollout", "driver.max_lag", "model.dtype", "sampler.temperature"),
    *("rollout.max_tokens",),
)
"""Settings that the words on a run are about, beside its objective."""


def advised_settings(config: Config, controllers: Sequence[Controller]) -> dict[str, Any]:
    """The run's settings by dotted name, as `metrics.remedies` reads them."""
    steered = {"objective": dict(config.objective), "control": [c.knob for c in controllers]}
    return {name: attrgetter(name)(config) for name in ADVISED} | steered
