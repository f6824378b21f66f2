"""Settings -> the driver of a run: its loop, its prompts, its diagnostics, what may move."""

from entroray.binding import holds
from entroray.config import Config
from entroray.objective import Objective
from entroray.policy.tokenizer import chat
from entroray.train.diagnostics import DiagnosticsSchedule
from entroray.train.driver import Driver, Knobs, LoopSettings, Roles
from entroray.train.prompt_entropy import build_prompt_entropy
from entroray.types import Draw
from entroray.wiring import controllers, dataset, rollout_plan, selection

LAW_WINDOW = 50
"""Steps that the reward-entropy law is fitted over."""


def build_driver(
    config: Config, objective: Objective, read_in: dataset.Dataset, roles: Roles, draw: Draw
) -> Driver:
    """The driver of a run, at its first step."""
    training = read_in.split.training
    prompts, chosen = selection.build_selection(
        config, dataset.prompt_order(config.data, training, config.seed), len(training)
    )
    return Driver(
        prompts,
        roles,
        Knobs(objective, draw, config.learner.updates_per_rollout),
        loop_settings(config),
        seed=config.seed,
        plan=rollout_plan.bind_plan(config.rollout.plan, config.packages),
        diagnostics=_diagnostics(config, objective, read_in),
        selection=chosen,
        control=controllers.build_control(config),
        tune=controllers.build_tuner(config),
    )


def loop_settings(config: Config) -> LoopSettings:
    """How many, how late and how long."""
    r, d = config.rollout, config.driver
    return LoopSettings(
        group_size=r.group_size,
        groups_per_step=r.groups_per_step,
        max_lag=d.max_lag,
        wait=d.stale == "wait",
        refill_limit=d.refill_limit,
        max_failed=config.reward.max_failed,
        stall=d.stall,
        tokens=config.run.tokens or None,
        extra=r.early.extra,
        surplus=r.surplus,
    )


def _diagnostics(config: Config, objective: Objective, read_in: dataset.Dataset) -> DiagnosticsSchedule:
    o = config.observe
    keeps_all = holds(objective.keep, "neutral")  # else R is of all groups and H of those kept
    law = LAW_WINDOW if keeps_all and not config.control else 0  # it was found on runs that nobody steers
    probe = build_prompt_entropy(read_in.split.heldout, chat(read_in.tokenizer, config.model.system))
    return DiagnosticsSchedule(
        diagnosis=o.diagnosis.every,
        prediction=o.prediction.every,
        law=law,
        probe=probe,
    )
