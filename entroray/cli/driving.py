"""Settings -> the driver of a run: its pace, its prompts, what it looks at, what may move."""

from entroray.cli import choices, knobs, material, plans
from entroray.config import Config
from entroray.loop.driver import Driver, Pace, Roles
from entroray.loop.heat import Heat
from entroray.loop.insight import Looks
from entroray.loop.probe import probe
from entroray.objective import Objective
from entroray.objective.keep import always
from entroray.policy.tokenizer import chat


def driver(
    config: Config, objective: Objective, read_in: material.Material, roles: Roles, heat: Heat
) -> Driver:
    """The driver of a run, at its first step."""
    training = read_in.split.training
    prompts, choice = choices.of(config, material.order(config, training, config.seed), len(training))
    return Driver(
        prompts,
        roles,
        objective,
        pace(config),
        seed=config.seed,
        plan=plans.plan_of(config.rollout),
        looks=_looks(config, objective, read_in),
        heat=heat,
        choice=choice,
        control=knobs.control_of(config),
        tune=knobs.tuner(config),
    )


def pace(config: Config) -> Pace:
    """How many, how late and how long."""
    r, d = config.rollout, config.driver
    return Pace(
        group_size=r.group_size,
        groups_per_step=r.groups_per_step,
        max_lag=d.max_lag,
        wait=d.stale == "wait",
        resamples=d.resamples,
        refill_limit=d.refill_limit,
        max_failed=config.reward.max_failed,
        max_skipped=config.learner.max_skipped,
        stall=d.stall,
        tokens=config.run.tokens or None,
        extra=r.early.extra,
        surplus=r.surplus,
    )


def _looks(config: Config, objective: Objective, read_in: material.Material) -> Looks:
    o = config.observe
    whole = objective.keep.func is always  # else R is of all groups and H of those kept
    law = o.law.window if whole and not config.control else 0  # it was found on runs that nobody steers
    asked = probe(read_in.split.heldout, chat(read_in.tokenizer, config.model.system))
    return Looks(
        diagnosis=o.diagnosis.every,
        prediction=o.prediction.every,
        window=o.prediction.window,
        law=law,
        probe=asked,
    )
