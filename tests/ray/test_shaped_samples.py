"""Samplers in a real engine: what is drawn, what is noted, also when requests are pre-empted."""

import asyncio
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from entroray.engine.generator import Generator, Request
from entroray.metrics import token_entropy
from entroray.rollout import reshape
from entroray.types import Draw, Rollout
from entroray.wiring import actors, compose
from entroray.wiring.parts import build_parts
from entroray.wiring.sampler import MINIMUM
from entroray.workers import cluster
from entroray.workers.cluster import Share
from tests.composed import configured
from tests.ray.stack import Stack

PROMPT = tuple(int(i) for i in np.random.default_rng(1).integers(0, 250, 20))
RAMP = {"fn": "by_entropy", "minimum": 0.6, "maximum": 1.8, "start": 1.0, "full": 3.0}
CORNERS = {"fn": "quadrants", "low_entropy": 1.0, "high_entropy": 2.0, "low_varentropy": 5.0}
CORNERS |= {"high_varentropy": 6.45}
"""Thresholds that the positions of the model below fall on both sides of: H 0.4 to 3.2 nats, V 2.8 to 7.1."""
SAMPLERS = {
    "ramp": Draw(0.9, 4, rule=RAMP),
    "corners": Draw(1.0, 4, rule=CORNERS | {"certain": 0.9, "lost": 1.5}),
    "hot": Draw(1.0, 4, factor=1.4),
    "shipped": Draw(1.0, 4, rule=configured("sampler=by_entropy").sampler.rule),
}


class Watched(Generator):
    """An engine that counts requests coming back into the batch with tokens of their own: pre-empted ones."""

    def _load(self) -> None:
        from entroray.engine.logits_processor import Shaping

        self.back, plain = 0, Shaping.update_state

        def counting(processor: Any, update: Any) -> None:
            self.back += sum(len(tokens) > 0 for *_, tokens in (update.added if update else ()))
            plain(processor, update)

        Shaping.update_state = counting  # type: ignore[method-assign]
        super()._load()

    async def watched(self) -> tuple[int, int]:
        """(requests that came back, requests whose notes are still held)."""
        from entroray.engine.logits_processor import NOTES

        return self.back, len(NOTES.slots)


@pytest.fixture(scope="module")
def engine(local_ray: None, peaked: str) -> Iterator[Any]:
    """This module's own, with room for ten blocks of 128 tokens: four long requests do not fit at once."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this file
    config, _ = compose.load_config(["sampler=by_entropy"])
    noting = actors.logits_processors(config, build_parts(config))
    small = {"kv_cache_memory_bytes": 10 * 65536, "max_num_seqs": 64}
    options = actors.engine_options(config) | noting | small
    share = Share(0.4, 0.0, 2)
    handle = cluster.spawn(Watched, share, peaked, dtype="float32", max_length=512, seed=0, engine=options)
    ask(handle.start.remote())
    yield handle
    ray.kill(handle)


def ask(reference: Any) -> Any:
    return asyncio.run(cluster.settle(reference, deadline=240.0, what="engine"))


def sample(engine: Any, how: Draw, count: int, first: int = 0) -> list[Rollout]:
    seeds = tuple(range(first, first + count))
    return ask(engine.sample.remote(Request("q", PROMPT, seeds, how, 200.0)))


def logits(model: str, responses: np.ndarray) -> torch.Tensor:
    """[n, L, V] in float64 of the policy at every position of equally long responses."""
    from transformers import AutoModelForCausalLM

    whole = np.concatenate([np.tile(PROMPT, (len(responses), 1)), responses], 1)
    policy = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        return policy(torch.from_numpy(whole).long()).logits[:, len(PROMPT) - 1 : -1].double()


def expected(z: torch.Tensor, how: Draw) -> tuple[torch.Tensor, torch.Tensor]:
    """(log b, temperature) of the distribution a sampler says it draws from."""
    flat = (z / how.temperature).flatten(0, -2)
    rule = reshape.build_rule(how.rule)
    factor = rule(*token_entropy(flat, 1.0)).factor * how.factor
    logb = reshape.reshape_logits(flat, factor).log_softmax(-1)
    return logb.view_as(z), (factor * how.temperature).view(z.shape[:-1])


def deviations(a: torch.Tensor, b: torch.Tensor) -> float:
    """How many standard errors two means are apart."""
    return float((a.mean() - b.mean()).abs() / (a.var() / len(a) + b.var() / len(b)).sqrt())


@pytest.mark.parametrize("name", SAMPLERS)
def test_what_is_drawn_is_what_is_stated(engine: Any, peaked: str, name: str) -> None:
    """Chi-square of 4000 first tokens over cells of at least five, by Wilson and Hilferty's normal form."""
    drawn = sample(engine, SAMPLERS[name], 4000)
    first = np.array([r.token_ids[0] for r in drawn])
    z = logits(peaked, np.array([drawn[0].token_ids[:1]]))
    logb, temperature = expected(z, SAMPLERS[name])
    want = logb[0, 0].exp().numpy() * len(first)
    got = np.bincount(first, minlength=len(want))
    large = want >= 5
    cells = np.append(want[large], want[~large].sum()), np.append(got[large], got[~large].sum())
    statistic, k = ((cells[1] - cells[0]) ** 2 / cells[0]).sum(), large.sum()
    assert k > 20
    normal = ((statistic / k) ** (1 / 3) - (1 - 2 / (9 * k))) / math.sqrt(2 / (9 * k))
    assert normal < 3.7, f"chi-square {statistic:.1f} of {k} degrees"
    assert float(temperature) != pytest.approx(1.0, abs=0.02), "a sampler that does nothing shows nothing"


def test_every_note_is_of_its_own_position(engine: Any, peaked: str) -> None:
    for how in (*SAMPLERS.values(), Draw(1.0, 4, rule=CORNERS)):
        rollouts = sample(engine, how, 64)
        ids = np.array([r.token_ids for r in rollouts])
        z = logits(peaked, ids)
        entropy, varentropy = token_entropy((z / how.temperature).flatten(0, 1), 1.0)
        logb, temperature = expected(z, how)
        noted = [r.notes for r in rollouts if r.notes]
        assert len(noted) == 64
        column = lambda name, of=noted: np.array([getattr(s, name) for s in of])
        np.testing.assert_allclose(column("entropy"), entropy.view(64, 4), atol=1e-4)
        np.testing.assert_allclose(column("varentropy"), varentropy.view(64, 4), atol=1e-3)
        np.testing.assert_allclose(column("temperature"), temperature, atol=1e-4)
        stated = logb.gather(-1, torch.from_numpy(ids).long()[..., None]).squeeze(-1)
        np.testing.assert_allclose(np.array([r.logprobs for r in rollouts]), stated, atol=1e-4)


@pytest.mark.slow
def test_weighted_estimates_agree_with_plain_ones(engine: Any, peaked: str) -> None:
    """The mean of -ln pi over whole responses of four tokens, weighted by the product of pi / b."""
    plain = sample(engine, Draw(1.0, 4), 3000, first=10_000)

    def logpi(rollouts: list[Rollout]) -> torch.Tensor:
        found = torch.zeros(len(rollouts), dtype=torch.float64)
        for length in {r.length for r in rollouts}:  # some end early
            rows = [i for i, r in enumerate(rollouts) if r.length == length]
            ids = np.array([rollouts[i].token_ids for i in rows])
            logp = logits(peaked, ids).log_softmax(-1)
            found[rows] = logp.gather(-1, torch.from_numpy(ids).long()[..., None]).squeeze(-1).sum(-1)
        return found

    truth = -logpi(plain)
    for name in ("corners", "hot", "shipped"):
        rollouts = sample(engine, SAMPLERS[name], 3000)
        pi = logpi(rollouts)
        logb = torch.tensor([r.logprobs.sum(dtype=np.float64) for r in rollouts])
        weighted = (pi - logb).exp() * -pi
        assert deviations(weighted, truth) < 4, name
        assert deviations(-pi, truth) > 4, f"{name}: unweighted must be visibly wrong"


def test_notes_survive_pre_emption_and_are_drained_once(engine: Any, peaked: str) -> None:
    before, _ = ask(engine.watched.remote())
    rollouts = sample(engine, Draw(1.0, 240, rule=RAMP), 8)
    after, held = ask(engine.watched.remote())
    assert after > before, "nothing was pre-empted, so this shows nothing"
    assert held == 0
    for r in rollouts:
        z = logits(peaked, r.token_ids[None])
        entropy, _ = token_entropy(z[0], 1.0)
        logb, temperature = expected(z, Draw(1.0, 240, rule=RAMP))
        assert r.notes is not None and r.length == 240
        np.testing.assert_allclose(r.notes.entropy, entropy, atol=1e-3)
        np.testing.assert_allclose(r.notes.temperature, temperature[0], atol=1e-3)
        stated = logb[0].gather(-1, torch.tensor(r.token_ids).long()[:, None]).squeeze(-1)
        np.testing.assert_allclose(r.logprobs, stated, atol=1e-3)


def test_rows_of_one_batch_keep_to_their_own_sampler(engine: Any) -> None:
    """Fixed, greedy, shaped and inserting requests at once draw what they draw alone."""
    greedy, fixed = Draw(0.0, 12), Draw(1.0, 12)
    wide = CORNERS | {"low_varentropy": 6.6, "high_varentropy": 6.6}
    put = Draw(1.0, 12, rule=wide, insert=33)
    draws = (greedy, fixed, replace(fixed, rule=RAMP), put)
    alone = [sample(engine, s, 6) for s in draws]

    async def together() -> list[list[Rollout]]:
        asked = [engine.sample.remote(Request("q", PROMPT, tuple(range(6)), s, 100.0)) for s in draws]
        return await asyncio.gather(*(cluster.settle(a, deadline=120.0, what="engine") for a in asked))

    for apart, mixed in zip(alone, asyncio.run(together()), strict=True):
        assert [r.token_ids.tolist() for r in apart] == [r.token_ids.tolist() for r in mixed]
    assert all(r.notes is None for r in (*alone[0], *alone[1]))
    assert len({tuple(r.token_ids) for r in alone[0]}) == 1
    for r in alone[3]:
        assert r.notes is not None and 0 < r.notes.inserted.sum() <= 1
        assert set(r.token_ids[r.notes.inserted]) == {33} and (r.logprobs[r.notes.inserted] == 0).all()


def test_an_aborted_request_leaves_no_notes(engine: Any) -> None:
    late = ask(engine.sample.remote(Request("q", PROMPT, (1, 2), SAMPLERS["ramp"], 0.0)))
    assert {str(r.status) for r in late} == {"timeout"}
    sample(engine, Draw(1.0, 4), 1)
    assert ask(engine.watched.remote())[1] == 0


@pytest.mark.parametrize("name", ["fixed", "quadrants"])
def test_a_weighted_run_starts_at_ratio_one_and_the_engine_measures_what_the_learner_does(
    stack: Stack, peaked: str, tmp_path: Path, name: str
) -> None:
    settings = ["experiment=quickstart", f"model.path={peaked}", "run.steps=1", "objective.keep.fn=always"]
    settings += [
        "learner.lr_high=true",
        "rollout.groups_per_step=8",
        "rollout.max_tokens=12",
        "++data.settings.size=2000",
        "data.max_prompt=64",
    ]
    settings += ["generator.replicas=1", "learner.updates_per_rollout=1", f"sampler={name}"]
    settings += ["learner.score=always"]
    (row,) = stack.wait(stack.drive(tmp_path / name, *settings))
    assert row["update/ratio_max"] == pytest.approx(1.0, abs=1e-6)
    if name == "fixed":
        assert row["mismatch/max"] < 1e-3 and row["importance/mean"] == pytest.approx(1, abs=1e-5)
    else:
        assert row["sampler/gap"] < 1e-3 and row["mismatch/max"] > 0.01


def test_the_engine_draws_at_no_lower_temperature_than_we_allow() -> None:
    from vllm.sampling_params import SamplingParams

    assert SamplingParams(temperature=MINIMUM).temperature == MINIMUM
    assert SamplingParams(temperature=0.9 * MINIMUM).temperature == MINIMUM
