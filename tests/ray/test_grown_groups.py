"""Branches and forks on the real stack: what the engine continues is what the learner scores."""

import asyncio
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest
import ray
import torch

from entroray.data.prompts import PromptStream
from entroray.objective import build_objective
from entroray.rollout.plans import branching
from entroray.train.driver import Driver, Roles
from entroray.types import Group, Prompt, Rollout
from entroray.wiring import actors, compose, dataset, rollout_plan, sampler
from entroray.wiring.driver import loop_settings
from entroray.workers import cluster
from entroray.workers.cluster import Share
from entroray.workers.engine_pool import EnginePool
from entroray.workers.generator import Generator, Sampling
from entroray.workers.roles import GeneratorRole

IDS = tuple(int(i) for i in np.random.default_rng(1).integers(0, 250, 20))
PROMPT = Prompt("q", "q", IDS, "")


@pytest.fixture(scope="module")
def engine(local_ray: None, model: str) -> Iterator[Any]:
    config, _ = compose.load_config(["rollout=branching"])
    sizes = {"dtype": "float32", "max_length": 512, "seed": 0, "engine": actors.engine_options(config)}
    handle = cluster.spawn(Generator, Share(0.4, 0.0, 2), model, **sizes)
    asyncio.run(cluster.settle(handle.start.remote(), deadline=240.0, what="engine"))
    yield handle
    ray.kill(handle)


def ask(engine: Any, sampling: Sampling, method: str, *arguments: Any) -> list[Rollout]:
    """What a role of the driver's answers, over this one engine."""

    async def asked() -> list[Rollout]:
        engines = EnginePool(
            [engine], lambda: None, restarts=0, start_deadline=1.0, report=lambda *a, **k: None
        )
        role = GeneratorRole(engines, sampling, 100.0)
        return await getattr(role, method)(PROMPT, *arguments)

    return asyncio.run(asked())


def logprobs(model: str, response: list[int], temperature: float = 1.0) -> torch.Tensor:
    """[L, V] of the policy at every position of a response."""
    from transformers import AutoModelForCausalLM

    policy = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        logits = policy(torch.tensor([[*IDS, *response]])).logits[0, len(IDS) - 1 :]
    return (logits.double() / temperature).log_softmax(-1)


def test_the_first_tokens_are_the_likeliest_that_do_not_end_the_response(engine: Any, model: str) -> None:
    from transformers import AutoTokenizer

    firsts = ask(engine, Sampling(0.7, 9), "first_tokens", 10)
    logp = logprobs(model, [], 0.7)[0]
    logp[AutoTokenizer.from_pretrained(model).eos_token_id] = -torch.inf
    best = logp.log_softmax(-1).topk(10)
    assert [r.token_ids.tolist() for r in firsts] == [[i] for i in best.indices.tolist()]
    stated = np.array([r.logprobs[0] for r in firsts])
    np.testing.assert_allclose(stated, best.values, atol=1e-4)
    assert {(str(r.status), r.limit, r.length) for r in firsts} == {("ok", 1, 1)}


def test_a_branch_has_read_what_it_inherited(engine: Any, model: str) -> None:
    """Its log-probs and entropies are the policy's after the prompt and its parent's tokens, at T = 1."""
    noting = Sampling(1.0, 40).under({"fn": "fixed"})

    async def grown() -> list[Rollout]:
        engines = EnginePool(
            [engine], lambda: None, restarts=0, start_deadline=1.0, report=lambda *a, **k: None
        )
        return await branching(
            GeneratorRole(engines, noting, 100.0), PROMPT, list(range(8)), roots=2, places=2
        )

    members = asyncio.run(grown())
    assert [r.parent for r in members] == [None, None, 0, 0, 0, 1, 1, 1]
    for r in members:
        logp = logprobs(model, r.token_ids.tolist())[:-1]
        stated = logp.gather(-1, torch.tensor(r.token_ids).long()[:, None]).squeeze(-1)
        np.testing.assert_allclose(r.logprobs, stated, atol=1e-4)
        assert r.shaped is not None and r.length <= 40
        np.testing.assert_allclose(r.shaped.entropy, -(logp.exp() * logp).sum(-1), atol=1e-3)
        assert (r.observed >= 0).tolist() == [t < r.inherited for t in range(r.length)]
    again = asyncio.run(grown())
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
QUICK += ["objective=grpo", "objective.estimator.fn=subtree", "++data.settings.size=3000"]


def test_every_plan_trains(model: str, local_ray: None) -> None:
    """Three steps of each on one set of machines; what the engines read is what the learner scores."""
    config, _ = compose.load_config(
        [*QUICK, f"model.path={model}", "data.max_prompt=64", "rollout=branching"]
    )
    for name, steps in asyncio.run(_every_plan(config, model)).items():
        assert len(steps) == 3, name
        for metrics, groups in steps:
            assert metrics["mismatch/max"] < 1e-4 and metrics["lag/max"] == 0, name
            assert np.isfinite(list(metrics.values())).all() and metrics["update/skipped"] == 0, name
            assert all(len(g.rollouts) == 8 for g in groups), name
            if name == "first_token_forks":
                assert all(len({int(r.token_ids[0]) for r in g.rollouts}) == 8 for g in groups)
                assert metrics["branches/forced"] > 0 and "branches/share" not in metrics
            else:
                most = {"branching": 0.5, "tree": 0.75}[name]  # less where a response is too short
                assert 0.9 * most < metrics["branches/share"] <= most
                assert 0 < metrics["branches/inherited"] < 1 and metrics["sampler/gap"] < 1e-4


async def _every_plan(config: Any, model: str) -> dict[str, list[tuple[Mapping[str, float], list[Group]]]]:
    read = dataset.load_dataset(config, model)
    objective, probe = build_objective(config.objective), tuple(read.tokenizer.encode("1+1="))
    m = await actors.start_actors(config, model, objective, read.judge, probe, total_updates=100)
    found, state = {}, None
    for name in ("branching", "tree", "first_token_forks"):
        config.rollout.plan = {"fn": name}
        notes, role = Notes(), m.generator_role(sampler.training_sampling(config, 1.0, read.tokenizer))
        roles = Roles(role, m.verifier_role(), m.learner_role(objective), m.sync, notes)  # type: ignore[arg-type]
        stream, pace = PromptStream(read.split.training, seed=0), loop_settings(config)
        driver = Driver(stream, roles, objective, pace, seed=0, plan=rollout_plan.bind_plan(config))
        if state:
            driver.restore(state)
        await driver.train(driver.version + 3)
        found[name], state = notes.steps, driver.committed
    await m.stop()
    return found


@pytest.mark.slow
def test_the_command_line_grows_groups_and_says_so(model: str, tmp_path: Path) -> None:
    from tests.ray.test_train import entroray, metrics

    small = ["run.steps=2", "rollout.groups_per_step=8", "observe.tokens.every=1", "observe.report=false"]
    small += [
        "evaluate.final=false",
        "++data.settings.size=2000",
        "data.max_prompt=64",
        f"model.path={model}",
    ]
    said = entroray(
        "train", "experiment=quickstart", "generator.replicas=1", "rollout=branching",
        "objective.keep.fn=always", *small, f"run.dir={tmp_path}/run", cache=tmp_path,
    )  # fmt: skip
    assert "groups     branching: 4 from the prompt; the rest from 1 position(s) of each" in said
    assert "advantage A  mean R of it and its branches" in said
    assert all(0.45 < row["branches/share"] <= 0.5 for row in metrics(tmp_path / "run"))
    table = f"'{tmp_path}/run/tokens/*.parquet'"
    query = f"select count(*), sum((mask_reason = 'prefix')::int) from {table} where mask_reason is not null"
    masked, prefix = duckdb.connect().execute(query).fetchone()  # type: ignore[misc]
    assert masked == prefix > 0
