"""Tools and mixtures on the real stack: what the engine drew is what the learner scores; runs of both."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from entroray.engine.generator import Request
from entroray.policy.tokenizer import byte_tokenizer, encode_frame, response_text
from entroray.rollout.tool_turns import Syntax, ToolTurns
from entroray.train.batching import assemble, group_index
from entroray.types import Answer, Draw, Group, MaskReason, Prompt, Rollout, Status, Verdict
from entroray.workers import cluster
from tests.ray.stack import Stack, entroray, metrics
from tests.ray.test_learner import a_gang
from tests.records import query

PROMPT = Prompt("q", "", tuple(int(i) for i in np.random.default_rng(1).integers(0, 250, 20)), "")
LIMIT = 200
SMALL = [
    *("objective=grpo", "run.steps=3", "rollout.groups_per_step=8", "generator.replicas=1"),
    *("learner.updates_per_rollout=2", "observe.tokens.every=1"),
    *("evaluate.prompts=32", "evaluate.final=false"),
    *("model.warm_start.band=[0.0,1.0]", "model.warm_start.check_every=40"),
]
RULE = {"fn": "by_entropy", "minimum": 0.6, "maximum": 1.8, "start": 1.0, "full": 3.0}


class Engine:
    """One engine as a role, and a tool that answers every call with its length."""

    def __init__(self, handle: Any):
        self.handle = handle
        self.read: list[tuple[int, ...]] = []

    async def sample(
        self, prompt: Prompt, seeds: Sequence[int], draw: Draw, after: Sequence[int] = ()
    ) -> list[Rollout]:
        self.read.append(tuple(after))
        asked = Request("q", prompt.token_ids, tuple(seeds), draw, 100.0, tuple(after))
        return await cluster.settle(self.handle.sample.remote(asked), deadline=150.0, what="engine")

    async def answer(self, prompt: Prompt, calls: Sequence[str]) -> list[Answer]:
        return [Answer(f"={len(call)};") for call in calls]


def test_the_learner_scores_what_the_engine_drew_over_all_turns(stack: Stack) -> None:
    """Of a random model, for which a call ends by chance: `]`, one token in 260."""
    tokenizer = byte_tokenizer()
    decode, encode = response_text(tokenizer, ()), encode_frame(tokenizer)
    plain, engine = Draw(1.0, LIMIT, stop=("]",)), stack.wait(stack.engine())

    async def conversed(draw: Draw) -> tuple[list[Rollout], list[tuple[int, ...]]]:
        one = Engine(engine)
        turns = ToolTurns(one, one, Syntax("[", "]"), 3, encode, decode)
        return await turns.sample(PROMPT, range(64), draw), one.read

    async def scored() -> list[tuple[list[Rollout], list[tuple[int, ...]], Any]]:
        found = []
        async with a_gang(stack, 1, 1) as (learner, _):
            for draw in (plain, replace(plain, rule=RULE)):
                rollouts, read = await conversed(draw)
                halves = (tuple(rollouts[:32]), tuple(rollouts[32:]))
                groups = [Group(PROMPT, half, (Verdict(0.0, False),) * 32) for half in halves]
                scores = await learner.score(assemble(groups), group_index(groups))
                found.append((rollouts, read, scores))
        return found

    fixed, shaped = stack.wait(scored())
    for rollouts, read, scores in (fixed, shaped):
        drawn = np.concatenate([r.observed for r in rollouts]) < 0
        calls = [[s for s in r.spans if s.why is MaskReason.TOOL] for r in rollouts]
        assert any(len(c) > 1 for c in calls) and 30 < (~drawn).sum() < drawn.sum()
        assert all(r.length <= LIMIT and r.status in (Status.OK, Status.TRUNCATED) for r in rollouts)
        whole = {
            tuple(r.token_ids[: s.stop].tolist()) for r, c in zip(rollouts, calls, strict=True) for s in c
        }
        assert set(read[1:]) <= whole, "each turn reads the ids of those before it"
        if rollouts[0].notes is None:
            behaviour = np.concatenate([r.logprobs for r in rollouts])
            np.testing.assert_allclose(behaviour[drawn], scores["logprobs"][drawn], atol=1e-4)
        else:
            noted = np.concatenate([r.notes.entropy for r in rollouts if r.notes])
            np.testing.assert_allclose(noted[drawn], scores["entropy"][drawn], atol=1e-3)
            assert np.isnan(noted[~drawn]).all()


@pytest.mark.slow
def test_a_run_with_a_calculator(tmp_path: Path) -> None:
    """With a lag: the tool's tokens are masked as the tool's, and all others are what the engine drew."""
    folder = tmp_path / "run"
    said = entroray(
        "train",
        "experiment=calculator",
        "driver=async",
        f"run.dir={folder}",
        *SMALL,
    )
    assert "tool       calculator, called as [...]" in said
    rows = metrics(folder)
    assert [r["step"] for r in rows] == [1, 2, 3] and all(r["tool/calls"] > 0.2 for r in rows)
    assert rows[0]["mismatch/max"] < 1e-4 and max(r["lag/max"] for r in rows) <= 1
    table = f"'{folder}/tokens/*.parquet'"
    counted = query(f"select mask_reason, count(*) as n from {table} group by 1")
    by_reason = {row["mask_reason"]: row["n"] for row in counted}
    assert by_reason["tool"] > 50 and by_reason[None] > by_reason["tool"]
    largest = query(f"select max(abs(logprob_behavior)) as x from {table} where mask_reason = 'tool'")
    assert largest == [{"x": 0.0}]
    words = json.loads((folder / "tokens" / "vocabulary.json").read_text())
    ids = query(f"select distinct token_id from {table} where mask_reason = 'tool'")
    assert {words[str(row["token_id"])] for row in ids} <= set("-.0123456789e+")


@pytest.mark.slow
def test_a_run_of_a_mixture(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    sizes = [
        "data.parts.chain_sum.settings.size=2000",
        "data.parts.countdown.settings.size=600",
        "generator.threads=1",
    ]
    sizes += ["evaluate.every=1", "evaluate.samples=2"]
    given = [x for x in SMALL if not x.startswith("run.steps")]
    entroray("train", "data=mixture", "run.steps=2", f"run.dir={folder}", *given, *sizes)
    rows = metrics(folder)
    assert len(rows) == 2
    for row in rows:
        drawn = [d for d in ("chain_sum", "countdown") if f"groups/share:{d}" in row]  # a step may lack one
        assert drawn and sum(row[f"groups/share:{d}"] for d in drawn) == pytest.approx(1)
        mean = sum(row[f"correct/mean:{d}"] * row[f"groups/share:{d}"] for d in drawn)
        assert mean == pytest.approx(row["correct/mean"])
        assert all(row[f"entropy/mean:{d}"] > 0 for d in drawn)
        for d in ("chain_sum", "countdown"):
            assert 0 <= row[f"eval/greedy:{d}"] <= 1
            assert row[f"eval/pass@1:{d}"] <= row[f"eval/pass@2:{d}"]
