"""Branches and forks on the real stack: what the engine continues is what the learner scores."""

import asyncio
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import ray
import torch

from entroray.cli import machine, settings
from entroray.types import Prompt, Rollout
from entroray.workers import cluster
from entroray.workers.adapters import Generators
from entroray.workers.cluster import Share
from entroray.workers.engines import Engines
from entroray.workers.generator import Generator, Sampling

IDS = tuple(int(i) for i in np.random.default_rng(1).integers(0, 250, 20))
PROMPT = Prompt("q", "q", IDS, "")


@pytest.fixture(scope="module")
def engine(local_ray: None, model: str) -> Iterator[Any]:
    config, _ = settings.load([])
    sizes = {"dtype": "float32", "max_length": 512, "seed": 0, "engine": machine.engine_options(config)}
    handle = cluster.spawn(Generator, Share(0.4, 0.0, 2), model, **sizes)
    asyncio.run(cluster.settle(handle.start.remote(), deadline=240.0, what="engine"))
    yield handle
    ray.kill(handle)


def ask(engine: Any, sampling: Sampling, method: str, *arguments: Any) -> list[Rollout]:
    """What a role of the driver's answers, over this one engine."""

    async def asked() -> list[Rollout]:
        engines = Engines([engine], lambda: None, restarts=0, start_deadline=1.0, report=lambda *a, **k: None)
        role = Generators(engines, sampling, 100.0)
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
    assert {(str(r.status), r.limit, r.length) for r in firsts} == {("ok", 9, 1)}
