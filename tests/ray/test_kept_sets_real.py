"""Top-p and top-k in a real engine and a real learner: one distribution over one set, and records."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from entroray.engine.generator import Request
from entroray.kept_sets import KeptSets, encode
from entroray.objective import build_objective
from entroray.train.batching import assemble, group_index, tokens_of, unknown_scores
from entroray.types import Draw, Group, Prompt, Rollout, Verdict
from entroray.wiring import actors, compose, dataset
from entroray.workers import cluster
from entroray.workers.roles import LearnerRole
from tests.ray.stack import ROOM, Stack
from tests.ray.test_learner import groups

PROMPT = tuple(int(i) for i in np.random.default_rng(1).integers(0, 250, 20))
JUDGE = "def odd(response, prompt):\n    return float(sum(map(ord, response)) % 2)\n"
HOTTER = {"fn": "by_entropy", "minimum": 1.25, "maximum": 1.25}
DRAWS = {
    "top_k": Draw(1.0, 40, top_k=5, kept=True),
    "top_p": Draw(1.0, 40, top_p=0.8, kept=True),
    "both": Draw(1.2, 40, top_p=0.95, top_k=12, kept=True, min_tokens=4),
    "rule": Draw(1.1, 40, top_p=0.9, top_k=30, kept=True, rule=HOTTER),
    "hot": Draw(1.0, 40, top_p=0.7, kept=True, factor=1.3),
}


async def drawn(m: actors.Actors, how: Draw, seeds: tuple[int, ...]) -> list[Rollout]:
    asked = m.engines.handles[0].sample.remote(Request("q", PROMPT, seeds, how, 100.0))
    return await cluster.settle(asked, deadline=120.0, what="engine")


async def compared(stack: Stack, peaked: str) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """For each draw: |engine's log-prob - learner's|, sizes and masses of the sets."""
    config, _ = compose.load_config([*ROOM, f"model.path={peaked}"])
    m = await stack.actors(config, build_objective(config.objective), dataset.judge_spec(config))
    found = {}
    for name, how in DRAWS.items():
        rollouts = await drawn(m, how, tuple(range(16)))
        heat = how.temperature * how.factor * how.rule.get("minimum", 1.0)
        if name in ("top_k", "top_p"):
            alone = await drawn(m, replace(how, kept=False), tuple(range(16)))  # vLLM cuts by itself
            assert [r.token_ids.tolist() for r in rollouts] == [r.token_ids.tolist() for r in alone]
        assert all((r.notes is None) == (name not in ("rule", "hot")) for r in rollouts)
        group = Group(
            Prompt("q", "", PROMPT, ""),
            tuple(replace(r, temperature=heat) for r in rollouts),
            tuple(Verdict(1.0, True) for _ in rollouts),
        )
        batch = assemble([group])
        scores = await m.learner_role().score(batch, group_index([group]))
        gap = np.abs(scores["logprobs"] - np.concatenate([r.logprobs for r in rollouts]))
        assert batch.kept is not None
        found[name] = gap, batch.kept.sizes, scores["kept_mass"]
        assert (scores["entropy"] <= np.log(batch.kept.sizes) + 1e-6).all()
        assert (scores["entropy"] <= scores["vocabulary_entropy"] + 1).all()
    return found


def test_the_engine_draws_from_what_the_learner_renormalises(stack: Stack, peaked: str) -> None:
    found = stack.wait(compared(stack, peaked))
    for name, (gap, sizes, mass) in found.items():
        assert gap.mean() <= 1e-5 and gap.max() <= 1e-4, f"{name}: {gap.mean():.1e}, {gap.max():.1e}"
        assert sizes.min() >= 1 and mass.max() < 1.0001
    assert set(found["top_k"][1]) == {5} and 5 < found["both"][1].max() <= 12
    assert len(set(found["top_p"][1])) > 5 and found["top_p"][2].min() > 0.7999
    assert found["top_p"][1].max() > 16, "one set at least is written as bits"


@pytest.mark.parametrize(
    "more",
    [
        ("objective=dapo",),
        ("objective=dapo", "sampler=quadrants", "rollout=branching", "learner.score=always"),
    ],
    ids=["plain", "branching"],
)
def test_a_cut_run_starts_at_ratio_one_and_writes_its_sets(
    stack: Stack, peaked: str, tmp_path: Path, more: tuple[str, ...]
) -> None:
    settings = ["experiment=quickstart", f"model.path={peaked}", "run.steps=2", "objective.keep.fn=always"]
    settings += ["learner.lr_high=true", "rollout.groups_per_step=4", "rollout.max_tokens=16"]
    settings += ["++data.settings.size=2000", "data.max_prompt=64", "generator.replicas=1"]
    settings += ["learner.updates_per_rollout=1", "learner.score=auto", "sampler.temperature=0.9"]
    settings += ["sampler.top_p=0.9", "observe.tokens.every=1", "observe.prediction.every=2", *more]
    (tmp_path / "judge.py").write_text(JUDGE)
    settings.append(f"reward.path={tmp_path}/judge.py:odd")
    rows = stack.wait(stack.drive(tmp_path / "run", *settings))
    assert len(rows) == 2
    for row in rows:
        assert row["update/skipped"] == 0 and row["update/grad_norm"] > 0
        assert row["update/ratio_max"] == pytest.approx(1.0, abs=1e-6)
        assert row["kept/size"] > 1 and 0.85 < row["kept/mass"] < 1 and 0 <= row["kept/alone"] < 1
        assert row["entropy/mean"] < row["entropy/vocabulary"]
    if "sampler=quadrants" in more:
        assert rows[0]["sampler/gap"] < 1e-3
    else:
        assert rows[0]["mismatch/max"] < 1e-4 and rows[0]["mismatch/mean_abs"] < 1e-5
    table = pq.read_table(tmp_path / "run" / "tokens" / "step-000001.parquet")
    counted = table.filter(pc.is_null(table["mask_reason"]))
    assert counted["kept_size"].null_count == counted["kept_mass"].null_count == 0
    assert pc.min(counted["kept_size"]).as_py() >= 1


async def two_updates(stack: Stack, ranks: int, stage: int, scored: bool) -> tuple[np.ndarray, float]:
    """Log-probs over sets after two updates of three groups, one rank with fewer micro-batches."""
    told = [f"learner.ranks={ranks}", "learner.token_budget=150", f"learner.zero_stage={stage}"]
    config, _ = compose.load_config([*told, "objective=clamped_entropy"])
    objective = build_objective(config.objective)
    settings, gang = actors.learner_settings(config, stack.model, 10), await stack.gang(ranks)
    await gang.all(lambda r, h: h.reset.remote(settings, objective), deadline=180.0)
    learner = LearnerRole(gang, config.learner.token_budget, 120.0)
    for step in range(2):
        given = [replace(g, rollouts=tuple(map(with_sets, g.rollouts))) for g in groups(3, seed=step)]
        batch, index = assemble(given), group_index(given)
        scores = unknown_scores(batch, objective)
        if scored:
            scores = await learner.score(batch, index)
        tokens = objective.credit(tokens_of(given, [objective.estimate(g) for g in given], scores, step))
        if scored:
            done = await learner.update(batch, tokens, objective)
        else:
            done, scores = await learner.score_and_update(batch, tokens, objective)
        assert done["update/ratio_max"] == 1.0 and (scores["kept_mass"] < 1).all()
    return (await learner.score(batch, index))["logprobs"], done["update/grad_norm"]


def with_sets(rollout: Rollout) -> Rollout:
    """Of each token a set of it and a few others, the last alone in its own."""
    rng = np.random.default_rng(rollout.length)
    sets = [np.unique([t, *rng.integers(0, 250, 9)]) for t in rollout.token_ids[:-1].tolist()]
    sets.append(rollout.token_ids[-1:])
    return replace(rollout, kept=KeptSets.of([*map(len, sets)], [encode(s, 259) for s in sets]))


@pytest.mark.parametrize(("ranks", "stage"), [(1, 3), (2, 1), (2, 3)])
def test_updates_over_sets_are_the_same_on_any_ranks(stack: Stack, ranks: int, stage: int) -> None:
    one, norm = stack.wait(two_updates(stack, 1, 1, True))
    many, other = stack.wait(two_updates(stack, ranks, stage, False))
    np.testing.assert_allclose(many, one, atol=2e-5)
    assert other == pytest.approx(norm, rel=1e-4)
