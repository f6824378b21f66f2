"""Every row of conf/objective on the real stack: one set of engines and ranks, reused row after row."""

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from entroray.data.prompts import PromptStream
from entroray.objective import build_objective
from entroray.train.batching import assemble, group_index, tokens_of
from entroray.train.driver import Driver, Knobs, Roles
from entroray.types import Draw
from entroray.wiring import actors, compose, dataset, warm_start
from entroray.wiring.driver import loop_settings
from entroray.wiring.parts import build_parts
from entroray.workers.roles import LearnerRole
from tests.cases import ROWS
from tests.ray.stack import Stack
from tests.ray.test_learner import groups

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("local_ray"), pytest.mark.timeout(1500)]

QUICK = [
    "experiment=quickstart",
    "rollout.groups_per_step=8",
    "driver.refill_limit=40",
    "learner.updates_per_rollout=2",
    "learner.reference=true",
    "learner.lr=1e-5",
]
"""A small step, so that the rows which come last still find a policy that is sometimes right."""
KINDS = (
    "gspo",
    "clip_cov",
    "kl_cov",
    "entropy_advantage",
    "entropy_bonus",
    "lp_reg",
    "clip_v",
    "prorl",
    "steer",
)
"""One row of each kind: ratio of rollouts, drawn tokens, penalty, live shape, statistics, scale."""


class Notes:
    """A journal that remembers."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def step(self, step: int, metrics: Mapping[str, float], groups: Any, tokens: Any) -> None:
        self.steps.append({"step": step, **metrics})

    def event(self, kind: str, **fields: Any) -> None:
        """Nothing is asked of these."""

    def skipped(self, step: int, batch: Any, tokens: Any) -> None:
        raise AssertionError(f"the update of step {step} was left out")


def test_every_row_trains_three_steps() -> None:
    config, _ = compose.load_config(QUICK)
    warm_start.ensure_model(config, QUICK)
    asyncio.run(_all_rows(config))


async def _all_rows(config: Any) -> None:
    model = warm_start.resolve_model(config)
    read = dataset.load_dataset(config, model)
    probe = tuple(read.tokenizer.encode("1+1=", add_special_tokens=False))
    first = replace(build_parts(config), objective=build_objective(ROWS["grpo"]))
    m = await actors.start_actors(config, model, first, read.judge, probe, total_updates=10_000)
    draw = Draw(config.sampler.temperature, config.rollout.max_tokens)
    state: Mapping[str, Any] | None = None
    for name, row in ROWS.items():
        objective, notes = build_objective(row), Notes()
        await m.learner.all(
            lambda rank, h, o=objective: h.__ray_call__.remote(lambda own: setattr(own, "objective", o)),
            deadline=60.0,
        )
        roles = Roles(m.generator_role(), m.verifier_role(), m.learner_role(), m.sync, notes)  # type: ignore[arg-type]
        knobs = Knobs(objective, draw, config.learner.updates_per_rollout)
        driver = Driver(
            PromptStream(read.split.training, seed=0), roles, knobs, loop_settings(config), seed=0
        )
        if state:
            driver.restore(state)
        await driver.train(driver.version + 3)
        state = driver.committed
        assert len(notes.steps) == 3, name
        for metrics in notes.steps:
            assert np.isfinite(metrics["update/loss"]) and np.isfinite(metrics["update/grad_norm"]), name
            assert any(k.startswith("objective/") for k in metrics), name
        assert any(metrics["update/grad_norm"] > 0 for metrics in notes.steps), f"{name} never moved"
    await m.stop()
    await m.end()


@pytest.mark.parametrize("name", KINDS)
def test_ranks_change_nothing(stack: Stack, name: str) -> None:
    one, two = (stack.wait(_one_step(stack, name, ranks)) for ranks in (1, 2))
    for key in ("update/loss", "update/grad_norm", "objective/silent_tokens"):
        assert two[key] == pytest.approx(one[key], rel=2e-6, abs=1e-6), key
    counts = [{k: v for k, v in m.items() if k.endswith("_tokens") and "silent" not in k} for m in (one, two)]
    assert counts[0] == counts[1]


async def _one_step(stack: Stack, name: str, ranks: int) -> dict[str, float]:
    """The first update of a step of 6 groups, on as many ranks."""
    config, _ = compose.load_config(
        [f"learner.ranks={ranks}", "learner.reference=true", "learner.max_grad_norm=0.5"]
    )
    objective = build_objective(ROWS[name])
    settings, gang = actors.learner_settings(config, stack.model, 10), await stack.gang(ranks)
    await gang.all(lambda r, h: h.reset.remote(settings, objective), deadline=180.0)
    learner = LearnerRole(gang, 150, 120.0)
    batch = assemble(g := groups(6, seed=0))
    scores = await learner.score(batch, group_index(g))
    tokens = objective.credit(tokens_of(g, [objective.estimate(x) for x in g], scores, 0))
    shift = 0.3 * np.sin(np.arange(len(tokens.row), dtype=np.float32))  # off-policy, so that every gate acts
    tokens = replace(tokens, old_logprobs=tokens.old_logprobs + tokens.old_logprobs.new_tensor(shift))
    return await learner.update(batch, tokens, objective)
