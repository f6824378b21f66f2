"""Branches and forks on the real stack: what the engine continues is what the learner scores."""

import asyncio
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from entroray.data.prompts import PromptStream
from entroray.objective import build_objective
from entroray.rollout.plans import branching, first_token_forks
from entroray.rollout.splice import cut
from entroray.train.driver import Driver, Knobs, Roles
from entroray.types import REASONS, Draw, Group, MaskReason, Prompt, Rollout
from entroray.wiring import compose, dataset, sampler
from entroray.wiring.driver import loop_settings
from entroray.wiring.parts import build_parts
from entroray.workers.engine_pool import EnginePool
from entroray.workers.roles import GeneratorRole
from tests.ray.stack import Stack, entroray, metrics
from tests.records import query

IDS = tuple(int(i) for i in np.random.default_rng(1).integers(0, 250, 20))
PROMPT = Prompt("q", "q", IDS, "")


@pytest.fixture
def engine(stack: Stack) -> Any:
    return stack.wait(stack.engine())


def alone(engine: Any) -> EnginePool:
    """A pool of one engine, which keeps the weights it started with."""
    sender: Any = SimpleNamespace(silence=0.0)
    settings = {"restarts": 0, "start_deadline": 1.0, "report": lambda *a, **k: None}
    return EnginePool([engine], lambda: None, sender, **settings)


def ask(engine: Any, plan: Any, seeds: list[int], draw: Draw) -> list[Rollout]:
    """What a plan draws from this one engine."""

    async def asked() -> list[Rollout]:
        return await plan(GeneratorRole(alone(engine), 100.0), PROMPT, seeds, draw)

    return asyncio.run(asked())


def logprobs(model: str, response: list[int], temperature: float = 1.0) -> torch.Tensor:
    """[L, V] of the policy at every position of a response."""
    from transformers import AutoModelForCausalLM

    policy = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        logits = policy(torch.tensor([[*IDS, *response]])).logits[0, len(IDS) - 1 :]
    return (logits.double() / temperature).log_softmax(-1)


def test_forks_begin_with_the_top_tokens_that_do_not_end_the_response(engine: Any, model: str) -> None:
    from transformers import AutoTokenizer

    forks = ask(engine, first_token_forks, list(range(10)), Draw(0.7, 9))
    firsts = [cut(r, 1) for r in forks]
    logp = logprobs(model, [], 0.7)[0]
    logp[AutoTokenizer.from_pretrained(model).eos_token_id] = -torch.inf
    best = logp.log_softmax(-1).topk(10)
    assert [r.token_ids.tolist() for r in firsts] == [[i] for i in best.indices.tolist()]
    stated = np.array([r.logprobs[0] for r in firsts])
    np.testing.assert_allclose(stated, best.values, atol=1e-4)
    assert {(r.limit, int(r.observed[0])) for r in firsts} == {(9, REASONS.index(MaskReason.FORCED))}
    assert all(r.length <= 9 and (r.observed[1:] < 0).all() for r in forks)


def test_a_branch_has_read_what_it_inherited(engine: Any, model: str) -> None:
    """Its log-probs and entropies are the policy's after the prompt and its parent's tokens, at T = 1."""
    noted = Draw(1.0, 40, rule={"fn": "fixed"})
    grow = partial(branching, roots=2, places=2)
    members = ask(engine, grow, list(range(8)), noted)
    assert [r.parent for r in members] == [None, None, 0, 0, 0, 1, 1, 1]
    for r in members:
        logp = logprobs(model, r.token_ids.tolist())[:-1]
        stated = logp.gather(-1, torch.tensor(r.token_ids).long()[:, None]).squeeze(-1)
        np.testing.assert_allclose(r.logprobs, stated, atol=1e-4)
        assert r.notes is not None and r.length <= 40
        np.testing.assert_allclose(r.notes.entropy, -(logp.exp() * logp).sum(-1), atol=1e-3)
        assert (r.observed >= 0).tolist() == [t < r.inherited for t in range(r.length)]
    again = ask(engine, grow, list(range(8)), noted)
    assert [r.token_ids.tolist() for r in again] == [r.token_ids.tolist() for r in members]


class Notes:
    """A journal that remembers."""

    def __init__(self) -> None:
        self.steps: list[tuple[Mapping[str, float], list[Group]]] = []

    def step(self, step: int, metrics: Mapping[str, float], groups: Any, tokens: Any) -> None:
        self.steps.append((metrics, list(groups)))

    def event(self, kind: str, **fields: Any) -> None:
        """Nothing is asked of these."""

    def skipped(self, step: int, batch: Any, tokens: Any) -> None:
        raise AssertionError(f"the update of step {step} was left out")


QUICK = ["experiment=quickstart", "rollout.groups_per_step=16", "generator.replicas=1"]
QUICK += [
    "learner.lr_high=true",
    "objective=grpo",
    "objective.estimator.fn=subtree",
    "++data.settings.size=3000",
]


def test_every_plan_trains(stack: Stack) -> None:
    """Three steps of each on one set of machines; what the engines read is what the learner scores."""
    config, _ = compose.load_config(
        [*QUICK, f"model.path={stack.model}", "data.max_prompt=64", "rollout=branching"]
    )
    for name, steps in stack.wait(_every_plan(config, stack)).items():
        assert len(steps) == 3, name
        for row, groups in steps:
            assert row["mismatch/max"] < 1e-4 and row["lag/max"] == 0, name
            assert np.isfinite(list(row.values())).all() and row["update/skipped"] == 0, name
            assert all(len(g.rollouts) == 8 for g in groups), name
            if name == "first_token_forks":
                assert all(len({int(r.token_ids[0]) for r in g.rollouts}) == 8 for g in groups)
                assert row["branches/forced"] > 0 and "branches/share" not in row
            else:
                most = {"branching": 0.5, "tree": 0.75}[name]  # less where a response is too short
                assert 0.9 * most < row["branches/share"] <= most
                assert 0 < row["branches/inherited"] < 1 and row["sampler/gap"] < 1e-4


async def _every_plan(config: Any, stack: Stack) -> dict[str, list[tuple[Mapping[str, float], list[Group]]]]:
    read, objective = dataset.load_dataset(config, stack.model), build_objective(config.objective)
    m = await stack.actors(config, objective, read.judge, updates=100)
    found, state = {}, None
    for name in ("branching", "tree", "first_token_forks"):
        config.rollout.plan = {"fn": name}
        notes, draw = (
            Notes(),
            sampler.training_draw(config.sampler, config.rollout, build_parts(config), read.tokenizer),
        )
        knobs = Knobs(objective, draw, config.learner.updates_per_rollout)
        roles = Roles(m.generator_role(), m.verifier_role(), m.learner_role(), m.sync, notes)  # type: ignore[arg-type]
        stream, pace = PromptStream(read.split.training, seed=0), loop_settings(config)
        driver = Driver(
            stream,
            roles,
            knobs,
            pace,
            seed=0,
            plan=build_parts(config).plan,
        )
        if state:
            driver.restore(state)
        await driver.train(driver.version + 3)
        found[name], state = notes.steps, driver.committed
    return found


@pytest.mark.slow
def test_the_command_line_grows_groups_and_says_so(model: str, tmp_path: Path) -> None:
    small = ["run.steps=2", "rollout.groups_per_step=8", "observe.tokens.every=1", "observe.report=false"]
    small += [
        "evaluate.final=false",
        "++data.settings.size=2000",
        "data.max_prompt=64",
        f"model.path={model}",
    ]
    said = entroray(
        "train", "experiment=quickstart", "learner.lr_high=true", "generator.replicas=1", "rollout=branching",
        "objective.keep.fn=always", "objective.estimator={fn: subtree}", *small, f"run.dir={tmp_path}/run",
    )  # fmt: skip
    assert "groups     branching: 4 from the prompt; the rest from 1 position(s) of each" in said
    assert "advantage A  mean R of it and its branches" in said
    assert all(0.45 < row["branches/share"] <= 0.5 for row in metrics(tmp_path / "run"))
    reasons = query(f"select distinct mask_reason from '{tmp_path}/run/tokens/*.parquet'")
    assert {row["mask_reason"] for row in reasons} == {None, "prefix"}
