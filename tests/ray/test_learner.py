"""DeepSpeed on 1 and 2 ranks, ZeRO 0 to 3: the same data gives the same losses, norms and weights.

The ranks are processes of the session; what they train is built anew for every test.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from entroray.objective import Objective, build_objective
from entroray.train.batching import assemble, group_index, tokens_of
from entroray.types import Group, Prompt, Rollout, Status, Verdict
from entroray.wiring import actors, compose
from entroray.workers.roles import LearnerRole
from tests.ray.stack import Stack


def groups(count: int, seed: int, *, shortest: int = 1, reward: float | None = None) -> list[Group]:
    """Groups of 4 with lengths and rewards that differ, so that every normaliser matters."""
    rng = np.random.default_rng(seed)

    def one(i: int) -> Group:
        prompt = Prompt(f"p{i}", "", tuple(rng.integers(0, 250, rng.integers(3, 9)).tolist()), "")
        rollouts, verdicts = [], []
        for j in range(4):
            n = shortest if j == 0 else int(rng.integers(1, 30))
            ids = rng.integers(0, 250, n).astype(np.int32)
            logprobs = rng.normal(-5, 0.1, n).astype(np.float32)
            zero = np.zeros(n, np.int32)
            rollouts.append(Rollout(prompt.id, ids, logprobs, zero, "", 1.0, 32))
            right = float(j % 2) if reward is None else reward
            verdicts.append(Verdict(right, bool(right)))
        return Group(prompt, tuple(rollouts), tuple(verdicts))

    return [one(i) for i in range(count)]


@asynccontextmanager
async def a_gang(
    stack: Stack, ranks: int, stage: int, row: str = "grpo"
) -> AsyncIterator[tuple[LearnerRole, Objective]]:
    """A learner at the first weights, two updates a step."""
    overrides = [f"learner.ranks={ranks}", f"learner.zero_stage={stage}", "learner.updates_per_rollout=2"]
    overrides.append(f"objective={row}")
    config, _ = compose.load_config([*overrides, "learner.token_budget=150", "learner.max_grad_norm=0.5"])
    objective = build_objective(config.objective)
    settings, gang = actors.learner_settings(config, stack.model, 10), await stack.gang(ranks)
    await gang.all(lambda r, h: h.reset.remote(settings, objective), deadline=180.0)
    yield LearnerRole(gang, config.learner.token_budget, 120.0), objective


async def two_steps(stack: Stack, ranks: int, stage: int) -> tuple[list[dict[str, float]], np.ndarray]:
    """Two consecutive steps of different token counts, two updates each; metrics and final log-probs."""
    metrics: list[dict[str, float]] = []
    async with a_gang(stack, ranks, stage) as (learner, objective):
        for step, count in enumerate((6, 5)):
            batch = assemble(g := groups(count, seed=step))
            scores = await learner.score(batch, group_index(g), 2)
            tokens = objective.credit(tokens_of(g, [objective.estimate(x) for x in g], scores, step))
            metrics.append(await learner.update(batch, tokens, objective, 2))
        final = (await learner.score(batch, group_index(g), 2))["logprobs"]
    return metrics, np.asarray(final)


@pytest.fixture(scope="module")
def reference(stack: Stack) -> Any:
    return stack.wait(two_steps(stack, 1, 1))


@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (1, 2), (1, 3), (2, 0), (2, 1), (2, 2), (2, 3)])
def test_ranks_and_stages_change_nothing(reference: Any, stack: Stack, ranks: int, stage: int) -> None:
    expected, final = reference
    metrics, logprobs = stack.wait(two_steps(stack, ranks, stage))
    for ours, theirs in zip(metrics, expected, strict=True):
        for key in ("update/loss", "update/grad_norm", "update/entropy", "objective/silent_tokens"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-6), key
    np.testing.assert_allclose(logprobs, final, atol=1e-4)


def test_the_first_ratio_of_a_step_is_one(reference: Any) -> None:
    """Only its second update may move away from the scored policy."""
    assert reference[0][0]["update/kl"] < 0.1
    assert reference[0][0]["update/grad_norm"] > 0.5, "clipping must act, or the test misses it"


@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (2, 1), (1, 3)])
def test_a_gradient_that_is_not_finite_changes_nothing_on_any_rank(
    stack: Stack, ranks: int, stage: int
) -> None:
    async def run() -> tuple[list[dict[str, float]], list[Any]]:
        async with a_gang(stack, ranks, stage) as (learner, objective):
            batch = assemble(g := groups(4, seed=0))
            scores = await learner.score(batch, group_index(g), 2)
            tokens = objective.credit(tokens_of(g, [objective.estimate(x) for x in g], scores, 0))
            poisoned = torch.full_like(tokens.advantages, float("nan"))
            seen, metrics = [scores["logprobs"]], []
            for advantages in (poisoned, tokens.advantages):
                given = replace(tokens, advantages=advantages)
                metrics.append(await learner.update(batch, given, objective, 2))
                seen.append((await learner.score(batch, group_index(g), 2))["logprobs"])
            return metrics, seen

    metrics, (before, poisoned, after) = stack.wait(run())
    assert [m["update/skipped"] for m in metrics] == [2.0, 0.0]
    np.testing.assert_array_equal(before, poisoned)
    assert np.isfinite(after).all() and np.abs(after - before).max() > 1e-5


@pytest.mark.parametrize("odd", [{"shortest": 0}, {"reward": 1.0}, {"reward": 0.0, "shortest": 0}])
def test_empty_responses_and_equal_rewards_are_never_an_error(stack: Stack, odd: dict[str, Any]) -> None:
    async def run() -> dict[str, float]:
        async with a_gang(stack, 1, 1) as (learner, objective):
            batch = assemble(g := groups(4, seed=0, **odd))
            cut = [replace(x, rollouts=[replace(r, status=Status.TRUNCATED) for r in x.rollouts]) for x in g]
            scores = await learner.score(batch, group_index(cut), 2)
            tokens = objective.credit(tokens_of(cut, [objective.estimate(x) for x in cut], scores, 0))
            return await learner.update(batch, tokens, objective, 2)

    metrics = stack.wait(run())
    assert metrics["update/skipped"] == 0 and np.isfinite(metrics["update/loss"])
    assert (metrics["update/grad_norm"] > 0) == ("reward" not in odd)


@pytest.mark.parametrize(("ranks", "stage"), [pytest.param(1, 1, marks=pytest.mark.slow), (2, 3)])
def test_an_anchored_learner_begins_anew_where_it_is(
    stack: Stack, ranks: int, stage: int, tmp_path: Path
) -> None:
    """The reference becomes the policy, moments are gone, and a checkpoint brings that reference back."""
    folder, saved, g = str(tmp_path / "anchor"), str(tmp_path / "saved"), groups(4, seed=0)
    batch = assemble(g)

    async def step(learner: LearnerRole, objective: Objective) -> dict[str, np.ndarray]:
        scores = await learner.score(batch, group_index(g), 2)
        tokens = objective.credit(tokens_of(g, [objective.estimate(x) for x in g], scores, 0))
        await learner.update(batch, tokens, objective, 2)
        return dict(await learner.score(batch, group_index(g), 2))

    async def run() -> list[dict[str, np.ndarray]]:
        async with a_gang(stack, ranks, stage, "prorl") as (learner, objective):
            seen = [await step(learner, objective)]
            await learner.gang.all(lambda r, h: h.export.remote(folder), deadline=60.0)
            await learner.gang.all(lambda r, h: h.anchor.remote(folder), deadline=120.0)
            seen += [dict(await learner.score(batch, group_index(g), 2)), await step(learner, objective)]
            await learner.gang.all(lambda r, h: h.save.remote(saved), deadline=60.0)
        async with a_gang(stack, ranks, stage, "prorl") as (learner, objective):
            await learner.gang.all(lambda r, h: h.load.remote(saved), deadline=60.0)
            return [*seen, dict(await learner.score(batch, group_index(g), 2))]

    before, anchored, after, resumed = stack.wait(run())
    np.testing.assert_array_equal(before["logprobs"], anchored["logprobs"])
    np.testing.assert_allclose(anchored["ref_logprobs"], anchored["logprobs"], atol=1e-6)
    assert np.abs(before["ref_logprobs"] - before["logprobs"]).max() > 1e-3
    for name in ("logprobs", "ref_logprobs"):
        np.testing.assert_allclose(resumed[name], after[name], atol=1e-6)
