"""LoRA on the real stack: every stage of ZeRO on two ranks; engines that serve it merged, and alone."""

import asyncio
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ray import cloudpickle

from entroray.config import Config
from entroray.engine.generator import Generator, Request
from entroray.objective import build_objective
from entroray.train.batching import assemble, group_index, tokens_of
from entroray.types import Draw
from entroray.wiring import actors, compose, dataset
from entroray.workers import cluster
from entroray.workers.engine_pool import EnginePool
from entroray.workers.learner_rank import LearnerSettings
from entroray.workers.roles import LearnerRole
from entroray.workers.weight_sender import WeightSender
from tests.ray.stack import ROOM, Stack, drawing
from tests.ray.test_learner import groups

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # ranks cannot import this file
LOW = ["learner=lora", "learner.lora.rank=4", "learner.lr=0.02", "learner.lr_high=true", "objective=prorl"]
LOW += ["learner.reset_after=0"]
LONG = tuple(int(i) for i in np.random.default_rng(0).integers(0, 250, 300))
"""Longer than two blocks of 128 tokens, so that a prefix cache has something to keep."""


def settings_of(stack: Stack, *overrides: str) -> LearnerSettings:
    config, _ = compose.load_config(["learner.ranks=2", *LOW, *overrides])
    return actors.learner_settings(config, stack.model, 10)


async def steps(stack: Stack, settings: LearnerSettings, saved: Path) -> list[dict[str, Any]]:
    """Three updates, the last once more from what was saved before it; of each its metrics and log-probs.

    The objective has a penalty, whose reference is the base.
    """
    objective, gang = build_objective(compose.load_config(LOW)[0].objective), await stack.gang(2)
    learner, ids = LearnerRole(gang, 150, 120.0), list(range(40))
    reset = lambda r, h: h.reset.remote(settings, objective)
    await gang.all(reset, deadline=180.0)

    async def step(number: int) -> dict[str, Any]:
        batch = assemble(g := groups(4, seed=number))
        scores = await learner.score(batch, group_index(g), 1)
        tokens = objective.credit(tokens_of(g, [objective.estimate(x) for x in g], scores, number))
        metrics = await learner.update(batch, tokens, objective, 1)
        ranks = await gang.all(lambda r, h: h.prompt_logprobs.remote(ids), deadline=60.0)
        return {
            **metrics,
            "ranks": ranks,
            "reference": scores["ref_logprobs"],
            "logprobs": scores["logprobs"],
        }

    found = [await step(0), await step(1)]
    await gang.all(lambda r, h: h.save.remote(str(saved)), deadline=60.0)
    found.append(await step(2))
    await gang.all(reset, deadline=180.0)
    await gang.all(lambda r, h: h.load.remote(str(saved)), deadline=60.0)
    return [*found, await step(2)]


@pytest.fixture(scope="module")
def in_float32(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    settings = settings_of(stack, "learner.zero_stage=0")
    return stack.wait(steps(stack, settings, tmp_path_factory.mktemp("lora") / "saved"))


def stored_bytes(saved: Path) -> int:
    return sum(file.stat().st_size for file in saved.rglob("*.safetensors"))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_stage_trains_an_adapter_alike_and_resumes_bit_for_bit(
    stack: Stack, in_float32: list[dict[str, Any]], stage: int, tmp_path: Path
) -> None:
    settings = settings_of(stack, f"learner.zero_stage={stage}")
    found = stack.wait(steps(stack, settings, tmp_path / "saved"))
    for ours, theirs in zip(found, in_float32, strict=True):
        for key in ("update/loss", "update/grad_norm", "update/entropy"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-6), key
        one, two = ours["ranks"]
        assert one == two
        np.testing.assert_allclose(one, theirs["ranks"][0], atol=1e-4)
    assert np.abs(np.subtract(found[2]["ranks"][0], found[0]["ranks"][0])).max() > 0.01, "weights moved"
    assert found[3]["ranks"] == found[2]["ranks"] and found[3]["update/loss"] == found[2]["update/loss"]
    trained = sum(4 * sum(pair) for pair in 2 * [(128, 128), (96, 96)])
    assert stored_bytes(tmp_path / "saved") < 40 * 4 * trained * 3, "the base is in no checkpoint"


def test_the_reference_is_the_base_whatever_was_trained(in_float32: list[dict[str, Any]]) -> None:
    first, *_, last = in_float32
    np.testing.assert_array_equal(first["reference"], first["logprobs"])
    assert np.abs(last["reference"] - last["logprobs"]).max() > 0.01
    assert last["update/loss"] == in_float32[2]["update/loss"], "and after a resumption"


def configured(stack: Stack, *overrides: str) -> Config:
    own = [*ROOM, f"model.path={stack.model}", *LOW, "driver.probe.tolerance=1e-4", *overrides]
    return compose.load_config(own)[0]


async def train_a_little(m: actors.Actors, objective: Any, seed: int) -> None:
    learner = m.learner_role()
    batch = assemble(g := groups(4, seed=seed))
    scores = await learner.score(batch, group_index(g), 1)
    tokens = objective.credit(tokens_of(g, [objective.estimate(x) for x in g], scores, seed))
    for _ in range(3):
        await learner.update(batch, tokens, objective, 1)


async def serve(m: actors.Actors, config: Config) -> list[float]:
    """Largest differences (nats) of engine and learner before and after updates, and how far these went."""
    m = replace(m, sync=replace(m.sync, probe_ids=LONG))
    objective, ids = build_objective(config.objective), m.sync.probe_ids
    ask = lambda: m.learner.all(lambda r, h: h.prompt_logprobs.remote(ids), deadline=60.0)
    first, found = await ask(), [await m.sync.compare()]
    for version in (1, 2):
        await train_a_little(m, objective, version)
        await m.sync(version)
        found.append(await m.sync.compare())
    return [*found, float(np.abs(np.subtract(first[0], (await ask())[0])).max())]


def test_merged_weights_served_are_the_learners(stack: Stack) -> None:
    config = configured(stack)

    async def run() -> list[float]:
        m = await stack.actors(config, build_objective(config.objective), dataset.judge_spec(config))
        return await serve(m, config)

    *gaps, moved = stack.wait(run())
    print("merged", gaps, moved)
    assert max(gaps) <= 1e-4 and moved > 0.01


@pytest.fixture(scope="module")
def adapted(stack: Stack) -> Iterator[actors.Actors]:
    """The shared rank, with an engine of this module's own that serves adapters."""
    config = configured(stack, "generator.transfer=adapter")

    async def start() -> actors.Actors:
        m = await stack.machine()
        share, options = actors.resource_shares(config)["generators"][1], actors.engine_options(config)
        told = {"dtype": "float32", "max_length": 512, "seed": 0, "engine": options}
        engine = cluster.spawn(Generator, share, stack.model, **told)
        sender = WeightSender(m.learner, config.generator, 60.0)
        fixed = {"restarts": 0, "start_deadline": 120.0, "report": lambda kind, **_: None}
        pool = EnginePool([engine], lambda: None, sender, **fixed)
        await pool.start()
        own = replace(m, engines=pool)
        objective = build_objective(config.objective)
        return await own.reset(config, stack.model, objective, total_updates=100)

    m = stack.wait(start())
    yield m
    cluster.kill_actors(m.engines.all_handles)


def test_an_adapter_served_is_the_learners(stack: Stack, adapted: actors.Actors) -> None:
    *gaps, moved = stack.wait(serve(adapted, adapted.config))
    print("adapter", gaps, moved)
    assert max(gaps) <= 1e-4 and moved > 0.01


def test_a_request_in_flight_goes_on_with_the_next_adapter_and_knows_which_drew_what(
    stack: Stack, adapted: actors.Actors
) -> None:
    m, objective = adapted, build_objective(adapted.config.objective)
    request = Request("long", LONG, (1, 2), Draw(1.0, 150), deadline=60.0)

    async def run() -> tuple[list[Any], list[Any]]:
        await m.sync(7)
        await train_a_little(m, objective, 3)
        sampling = asyncio.ensure_future(m.engines.sample(request))
        await drawing(m.engines.handles[0])
        await m.sync(8)
        drawn = await sampling
        rows = [[*LONG, *r.token_ids.tolist()] for r in drawn]
        asked = [
            await m.learner.all(lambda r, h, row=row: h.prompt_logprobs.remote(row), deadline=60.0)
            for row in rows
        ]
        return drawn, [np.asarray(a[0])[len(LONG) - 1 :] for a in asked]

    drawn, scored = stack.wait(run())
    for rollout, own in zip(drawn, scored, strict=True):
        new = rollout.versions == 8
        assert set(rollout.versions.tolist()) == {7, 8}, "the sync met it in flight"
        np.testing.assert_allclose(rollout.logprobs[new], own[new], atol=1e-4)
        assert np.abs(rollout.logprobs[~new] - own[~new]).max() > 1e-3


def exported(rank: Any, folder: str) -> None:
    rank.export(folder)


def test_an_exported_adapter_is_read_by_peft_and_by_an_engine(
    stack: Stack, adapted: actors.Actors, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    stack.wait(adapted.export(str(tmp_path / "adapter")))
    ids = list(adapted.sync.probe_ids)
    asked = adapted.learner.all(lambda r, h: h.prompt_logprobs.remote(ids), deadline=60.0)
    wanted = stack.wait(asked)[0]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(stack.model), tmp_path / "adapter")
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    theirs = logits.gather(-1, torch.tensor(ids)[1:, None])[:, 0]
    np.testing.assert_allclose(theirs.numpy(), wanted, atol=1e-4)
    described = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == stack.model
