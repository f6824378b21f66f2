"""One family from folder to export on the real stack: an engine process of its own, one learner for all."""

import asyncio
from collections.abc import Awaitable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from entroray.config import Config
from entroray.engine.generator import Generator
from entroray.objective import build_objective
from entroray.train.batching import assemble, group_index, tokens_of
from entroray.types import Draw, Group, Prompt, Rollout, Verdict
from entroray.wiring import actors, compose
from entroray.workers import cluster
from entroray.workers.cluster import Gang
from entroray.workers.deepspeed_backend import DeepSpeedBackend
from entroray.workers.engine_pool import EnginePool
from entroray.workers.learner_rank import LearnerRank
from entroray.workers.roles import GeneratorRole, LearnerRole
from entroray.workers.sync import WeightSync
from entroray.workers.weight_sender import WeightSender
from tests.families import models

NEW = 16
"""Tokens of a response."""
OVERRIDES = (
    *(
        "data=table",
        "data.task=none.jsonl",
        "objective=grpo",
        "reward.path=none.py:score",
        "learner.lr=0.003",
        "learner.lr_high=true",
    ),
    *(f"data.max_prompt={2 * models.PROMPT_TOKENS}", f"rollout.max_tokens={NEW}", "generator.replicas=1"),
    *("driver.probe.every=1", "driver.probe.tolerance=100", "generator.threads=1", "learner.threads=1"),
    *(f"cluster.cpus.{role}=0.1" for role in ("generator", "learner", "verifier")),
)
SHORT = 120.0
"""Seconds that any one call may take."""


@dataclass
class Trial:
    """What all families share: an event loop and a learner, which begins anew with each."""

    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)
    learner: Gang | None = None

    def run(self, name: str, folder: Path) -> dict[str, Any]:
        """The row of a family: differences in nats, the first ratio, whether its export is read the same."""
        return self._wait(self._row(folder, folder.with_name(f"{name}-trained")))

    def end(self) -> None:
        if self.learner is not None:
            cluster.kill_actors(self.learner.handles)
        self.loop.close()

    def _wait(self, work: Awaitable[Any]) -> Any:
        return self.loop.run_until_complete(asyncio.wait_for(work, 280.0))

    async def _row(self, folder: Path, trained: Path) -> dict[str, Any]:
        config, _ = compose.load_config([*OVERRIDES, f"model.path={folder}"])
        engine, gang = await asyncio.gather(_serve(config, str(folder)), self._learn(config, str(folder)))
        try:
            row = await _one_step(config, engine, gang)
            await gang.all(lambda rank, h: h.export.remote(str(trained)), deadline=SHORT)
        finally:
            cluster.kill_actors([engine])
        for file in folder.glob("*token*"):
            (trained / file.name).write_bytes(file.read_bytes())
        again = await _serve(config, str(trained))
        try:
            served = [await _greedy(again, start) for start in (0, 50)]
        finally:
            cluster.kill_actors([again])
        row["greedy"] = served == [_greedy_here(trained, start) for start in (0, 50)]
        row["names"] = _names(folder) == _names(trained)
        return row

    async def _learn(self, config: Config, model: str) -> Gang:
        settings, objective = actors.learner_settings(config, model, 10), build_objective("grpo")
        if self.learner is None:
            share = actors.resource_shares(config)["learner ranks"][1]
            handle = cluster.spawn(LearnerRank, share, 0, settings, objective, DeepSpeedBackend)
            self.learner = Gang("learner", [handle])
            host, port = await cluster.settle(handle.address.remote(), deadline=SHORT, what="rank 0")
            await self.learner.all(lambda rank, h: h.start.remote(host, port, SHORT), deadline=SHORT)
        else:
            await self.learner.all(lambda rank, h: h.reset.remote(settings, objective), deadline=SHORT)
        return self.learner


async def _serve(config: Config, model: str) -> Any:
    share = actors.resource_shares(config)["generators"][1]
    sizes = {
        "dtype": config.model.dtype,
        "max_length": 128,
        "seed": 0,
        "engine": actors.engine_options(config),
    }
    handle = cluster.spawn(Generator, share, model, **sizes)
    try:
        await cluster.settle(handle.start.remote(), deadline=2 * SHORT, what="the engine")
    except BaseException:
        cluster.kill_actors([handle])
        raise
    return handle


async def _one_step(config: Config, engine: Any, gang: Gang) -> dict[str, Any]:
    sender = WeightSender(gang, config.generator, SHORT)
    pool = EnginePool([engine], _nobody, sender, restarts=0, start_deadline=1.0, report=_silent)
    probe = tuple(models.text(100, start=3).tolist())
    sync, objective = WeightSync(gang, pool, probe, config.driver, SHORT), build_objective("grpo")
    learner = LearnerRole(gang, config.learner.token_budget, SHORT)
    before = (await sync(0))["sync/probe_error"]
    groups = [await _group(GeneratorRole(pool, 60.0), start) for start in (0, 20)]
    batch = assemble(groups)
    scores = await learner.score(batch, group_index(groups))
    drawn = np.concatenate([r.logprobs for g in groups for r in g.rollouts])
    tokens = objective.credit(tokens_of(groups, [objective.estimate(g) for g in groups], scores, 0))
    done = await learner.update(batch, tokens, objective)
    after = (await sync(1))["sync/probe_error"]
    moved = float(np.abs((await learner.score(batch, group_index(groups)))["logprobs"] - drawn).max())
    await pool.close()
    return {
        "sync": max(before, after),
        "mismatch": float(np.abs(scores["logprobs"] - drawn).max()),
        "ratio_max": done["update/ratio_max"],
        "moved": moved,
    }


async def _group(generator: GeneratorRole, start: int) -> Group:
    prompt = Prompt(f"p{start}", "", tuple(models.text(start=start).tolist()), "")
    rollouts = await generator.sample(prompt, range(4), Draw(1.0, NEW))
    return Group(prompt, tuple(rollouts), tuple(Verdict(float(i % 2), bool(i % 2)) for i in range(4)))


async def _greedy(engine: Any, start: int) -> list[int]:
    from entroray.engine.vllm_request import Request

    request = Request("greedy", tuple(models.text(start=start).tolist()), (0,), Draw(0.0, NEW), 60.0)
    found: list[Rollout] = await cluster.settle(
        engine.sample.remote(request), deadline=SHORT, what="a greedy response"
    )
    return found[0].token_ids.tolist()


def _greedy_here(folder: Path, start: int) -> list[int]:
    """The same by transformers, in this process, which holds no engine."""
    from transformers import AutoModelForCausalLM

    ids = models.text(start=start)[None]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    out = model.generate(ids, max_new_tokens=NEW, do_sample=False, eos_token_id=models.END, pad_token_id=0)
    return out[0, ids.shape[1] :].tolist()


def _names(folder: Path) -> list[str]:
    from entroray.policy.safetensors_header import tensor_shapes

    return sorted(tensor_shapes(folder))


def _nobody() -> None:
    raise AssertionError("no engine is replaced here")


def _silent(kind: str, **fields: Any) -> None:
    """Nobody reads what a pool reports here."""
