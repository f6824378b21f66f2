"""Without a scoring pass the same weights, metrics and columns, bit for bit, on the real stack."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from entroray.objective import build_objective, corrected, correction, why_scored
from entroray.train.batching import assemble, group_index, tokens_of, unknown_scores, with_scores
from entroray.types import Tokens
from entroray.wiring import actors, compose
from entroray.workers.roles import LearnerRole
from tests.ray.stack import Stack
from tests.ray.test_learner import groups

REWARDED = "def odd(response, prompt):\n    return float(len(response) % 2)\n"
ADAPTER = "learner.lora.rank=4"
CHECKPOINTED = "learner.gradient_checkpointing=true"


async def five_updates(
    stack: Stack, scored: bool, ranks: int, *overrides: str
) -> tuple[list[Mapping[str, float]], list[Tokens], np.ndarray]:
    """Metrics and tokens of five steps, the third of them with a gradient that is not finite; last log-probs.

    Response lengths from 1 to 29 in micro-batches of 150 tokens, an odd number of them on two ranks.
    """
    told = [f"learner.ranks={ranks}", "learner.token_budget=150", "learner.max_grad_norm=0.5", *overrides]
    config, _ = compose.load_config(told)
    objective = replace(
        build_objective(config.objective), correction=partial(correction.sequence_geometric, cap=1.1)
    )
    assert not why_scored(objective)
    settings, gang = actors.learner_settings(config, stack.model, 10), await stack.gang(ranks)
    await gang.all(lambda r, h: h.reset.remote(settings, objective), deadline=180.0)
    learner = LearnerRole(gang, config.learner.token_budget, 120.0)
    metrics, seen = [], []
    for step in range(5):
        batch, index = assemble(g := groups(3, seed=step)), group_index(g)
        scores = await learner.score(batch, index) if scored else unknown_scores(batch, objective)
        tokens = objective.credit(tokens_of(g, [objective.estimate(x) for x in g], scores, step))
        if step == 2:
            tokens = replace(tokens, advantages=tokens.advantages * torch.nan)
        if scored:
            metrics.append(await learner.update(batch, tokens, objective))
        else:
            found, scores = await learner.score_and_update(batch, tokens, objective)
            metrics.append(found)
            tokens = corrected(objective, with_scores(tokens, scores))
        seen.append(tokens)
    return metrics, seen, (await learner.score(batch, index))["logprobs"]


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (1, ("learner.zero_stage=0",)),
        (1, ("learner.zero_stage=3", CHECKPOINTED)),
        (2, ("learner.zero_stage=1", "objective=prorl")),
        (2, ("learner.zero_stage=2",)),
        (2, ("learner.zero_stage=3",)),
        (2, ("learner.zero_stage=3", CHECKPOINTED, "objective=prorl", "learner.reset_after=0", ADAPTER)),
        (1, ("model.dtype=bfloat16", "objective=entropy_advantage")),
    ],
)
def test_updates_that_score_their_own_tokens_are_those_of_tokens_scored_before(
    stack: Stack, ranks: int, overrides: tuple[str, ...]
) -> None:
    first = stack.wait(five_updates(stack, True, ranks, *overrides))
    alone = stack.wait(five_updates(stack, False, ranks, *overrides))
    assert [m["update/skipped"] for m in first[0]] == [0, 0, 1, 0, 0]
    assert {m["update/ratio_max"] for i, m in enumerate(alone[0]) if i != 2} == {1.0}
    np.testing.assert_array_equal(first[2], alone[2])
    for ours, theirs in zip(alone[0], first[0], strict=True):
        np.testing.assert_equal(dict(ours), dict(theirs))  # NaN is NaN
    for mine, other in zip(alone[1], first[1], strict=True):
        for name, column in {**vars(mine), **mine.extra}.items():
            if isinstance(column, torch.Tensor):
                expected = getattr(other, name, other.extra.get(name))
                assert torch.equal(column.nan_to_num(9), expected.nan_to_num(9)), name
        assert mine.logprobs.isfinite().all() and mine.correction.max() < 1.1001


def test_a_run_has_the_same_weights_however_it_scores_and_is_looked_at(stack: Stack, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(REWARDED)
    told = ["experiment=quickstart", f"model.path={stack.model}", f"reward.path={tmp_path}/mine.py:odd"]
    told += [
        "learner.lr_high=true",
        "objective=grpo",
        "objective.correction={fn: truncated_importance}",
        "run.steps=5",
    ]
    told += ["rollout.groups_per_step=4", "rollout.max_tokens=12", "++data.settings.size=2000"]
    told += ["data.max_prompt=64", "generator.replicas=1", "learner.updates_per_rollout=1"]
    ways = {
        "auto": ["observe.prediction.every=0", "observe.diagnosis.every=0", "observe.tokens.every=0"],
        "always": ["learner.score=always"],
        "watched": ["observe.prediction.every=2", "observe.diagnosis.every=1", "observe.tokens.every=1"],
    }

    async def run(name: str) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
        rows = await stack.drive(tmp_path / name, *told, *ways[name])
        exported = tmp_path / f"{name}-model"
        await (await stack.gang(1)).all(lambda r, h: h.export.remote(str(exported)), deadline=60.0)
        return rows, load_file(exported / "model.safetensors")

    auto, always, watched = (stack.wait(run(name)) for name in ways)
    assert any(row["update/grad_norm"] > 0 for row in auto[0])
    for rows, weights in (always, watched):
        assert all(torch.equal(weights[name], auto[1][name]) for name in auto[1])
        for row, mine in zip(rows, auto[0], strict=True):
            differ = {name for name in mine.keys() & row.keys() if mine[name] != row[name]}
            timed = {"seconds", "idle", "sync", "tokens", "time"}
            assert {name.partition("/")[0] for name in differ} <= timed, differ
    predicted = ["entropy/realised_change" in row for row in watched[0]]
    assert predicted == [True, False, True, False, True]


@pytest.mark.parametrize("row", ["grpo", "clamped_entropy"])
def test_a_rank_without_a_row_gathers_as_often_as_the_others(stack: Stack, row: str) -> None:
    """Under ZeRO 3, with seven rows that stand alone, and losses that read one head's output or several."""
    told = ["learner.ranks=2", "learner.token_budget=1", "learner.zero_stage=3", f"objective={row}"]
    config, _ = compose.load_config(told)
    objective = build_objective(config.objective)

    async def updated() -> Mapping[str, float]:
        settings, gang = actors.learner_settings(config, stack.model, 10), await stack.gang(2)
        await gang.all(lambda r, h: h.reset.remote(settings, objective), deadline=180.0)
        learner = LearnerRole(gang, config.learner.token_budget, 60.0)
        first, second = groups(2, seed=0)
        g = [replace(first, rollouts=first.rollouts[:3], verdicts=first.verdicts[:3]), second]
        batch, index = assemble(g), group_index(g)
        scores = await learner.score(batch, index)
        tokens = objective.credit(tokens_of(g, [objective.estimate(x) for x in g], scores, 0))
        return await learner.update(batch, tokens, objective)

    metrics = stack.wait(updated())
    assert metrics["update/skipped"] == 0 and metrics["update/ratio_max"] == 1.0
