"""Rows laid end to end give the updates of padded ones, on real ranks; on a CPU attention is row by row."""

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from ray import cloudpickle

from entroray.objective import build_objective
from entroray.policy.microbatches import plan_microbatches, plan_packed
from entroray.train.batching import assemble, group_index, tokens_of
from entroray.wiring import actors, compose
from entroray.workers.roles import LearnerRole
from tests.ray.stack import Stack
from tests.ray.test_learner import groups

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # ranks cannot import this file
PLANS = {"never": plan_microbatches, "always": plan_packed}


def is_packed(rank: Any) -> bool:
    return bool(rank.packed)


async def two_updates(stack: Stack, pack: str, *told: str) -> tuple[list[Mapping[str, float]], Any]:
    """Metrics of two steps of one update, and the log-probs after them."""
    layout = [f"learner.pack={pack}", "learner.ranks=2", "learner.token_budget=150"]
    config, _ = compose.load_config([*layout, *told])
    objective = build_objective(config.objective)
    settings, gang = actors.learner_settings(config, stack.model, 10), await stack.gang(2)
    await gang.all(lambda r, h: h.reset.remote(settings, objective), deadline=180.0)
    assert (
        await gang.all(lambda r, h: h.__ray_call__.remote(is_packed), deadline=60.0) == [pack == "always"] * 2
    )
    learner = LearnerRole(gang, config.learner.token_budget, 120.0, plan=PLANS[pack])
    metrics = []
    for step in range(2):
        batch, index = assemble(g := groups(3, seed=step)), group_index(g)
        scores = await learner.score(batch, index)
        tokens = objective.credit(tokens_of(g, [objective.estimate(x) for x in g], scores, step))
        metrics.append(await learner.update(batch, tokens, objective))
    return metrics, (await learner.score(batch, index))["logprobs"]


def test_packed_rows_are_updated_as_padded_ones(stack: Stack) -> None:
    """Twelve rows of 4 to 38 tokens on two ranks of ZeRO 3, with a reference and every second layer twice."""
    told = ["learner.zero_stage=3", "objective=prorl", "learner.gradient_checkpointing=true"]
    told.append("learner.gradient_checkpointing_every_n_layers=2")
    padded, last = stack.wait(two_updates(stack, "never", *told))
    packed, ours = stack.wait(two_updates(stack, "always", *told))
    np.testing.assert_allclose(ours, last, rtol=0, atol=2e-5)
    for one, other in zip(packed, padded, strict=True):
        assert one["update/ratio_max"] == 1.0 and one["update/skipped"] == 0
        assert one["update/grad_norm"] == pytest.approx(other["update/grad_norm"], rel=1e-4)
        assert one["update/loss"] == pytest.approx(other["update/loss"], abs=1e-5)
