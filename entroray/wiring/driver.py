"""Settings -> the driver of a run: its loop, its prompts, its diagnostics, what may move."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from pathlib import Path

from entroray.binding import holds
from entroray.config import Config, Observe
from entroray.errors import InfrastructureError, LedgerError
from entroray.evaluation.sets import EvaluatedSet
from entroray.policy.tokenizer import chat
from entroray.train.diagnostics import DiagnosticsSchedule
from entroray.train.driver import After, Driver, Knobs, Roles
from entroray.train.loop_settings import LoopSettings
from entroray.train.prompt_entropy import build_prompt_entropy
from entroray.types import Draw
from entroray.wiring import actors, controllers, dataset, selection
from entroray.wiring.parts import Parts

LAW_WINDOW = 50
"""Steps that the reward-entropy law is fitted over."""


def build_driver(config: Config, parts: Parts, read_in: dataset.Dataset, roles: Roles, draw: Draw) -> Driver:
    """The driver of a run, at its first step."""
    training = read_in.split.training
    order = dataset.prompt_order(config.data, training, config.seed)
    prompts, chosen = selection.build_selection(config.rollout, order, len(training), config.seed)
    counts, metrics = dataset.count_drawn(training)
    chosen = replace(chosen, observers={**chosen.observers, **counts}, metrics=[*chosen.metrics, *metrics])
    return Driver(
        prompts,
        roles,
        Knobs(parts.objective, draw, config.learner.updates_per_rollout),
        loop_settings(config, read_in.sets),
        seed=config.seed,
        plan=parts.plan,
        diagnostics=_diagnostics(config.observe, parts, read_in, config.model.system),
        selection=chosen,
        control=controllers.build_control(config, parts.controllers),
        tune=controllers.build_tuner(config.objective, config.packages, parts),
    )


async def train_balanced(
    driver: Driver, steps: int, after: After, save: Callable[[], Awaitable[Path]], say: Callable[[str], None]
) -> None:
    """Train, and say what was dropped; where the ledger does not balance, save and raise LedgerError."""
    try:
        await driver.train(steps, after)
    except LedgerError as error:
        try:
            saved = f"saved in {await driver.within_stall(save())}"
        except InfrastructureError as failed:
            saved = f"not saved, for {failed}"
        raise LedgerError(
            f"after step {driver.version}, {saved}: {error}\nThis is a fault of the program: please "
            f"report it with events.jsonl. run.resume=auto goes on and counts what is missing as rolled back"
        ) from error
    finally:
        driver.roles.journal.event("ledger", step=driver.version, lines=driver.ledger.table())
    if driver.ledger.dropped:
        say("\n".join(driver.ledger.report()))


def loop_settings(config: Config, sets: Mapping[str, EvaluatedSet] | None = None) -> LoopSettings:
    """How many, how late and how long."""
    r, d = config.rollout, config.driver
    answered = None if sets is None else sum(len(s.prompts) * s.plan.samples for s in sets.values())
    return LoopSettings(
        group_size=r.group_size,
        groups_per_step=r.groups_per_step,
        max_lag=d.max_lag,
        wait=d.stale == "wait",
        refill_limit=d.refill_limit,
        max_failed=config.reward.max_failed,
        stall=actors.run_deadlines(config, answered).step,
        tokens=config.run.tokens or None,
        extra=r.early.extra,
        surplus=r.surplus,
        score=config.learner.score,
    )


def _diagnostics(
    o: Observe, parts: Parts, read_in: dataset.Dataset, system: str | None
) -> DiagnosticsSchedule:
    keeps_all = holds(parts.objective.keep, "neutral")  # else R is of all groups and H of those kept
    law = LAW_WINDOW if keeps_all and not parts.controllers else 0  # found on runs that nobody steers
    probe = build_prompt_entropy(read_in.split.heldout, chat(read_in.tokenizer, system))
    return DiagnosticsSchedule(
        diagnosis=o.diagnosis.every,
        prediction=o.prediction.every,
        law=law,
        probe=probe,
    )
