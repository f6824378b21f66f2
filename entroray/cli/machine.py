"""Builds the machines a run needs, introduces them to each other, and takes them down."""

import asyncio
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from entroray.config import Config
from entroray.errors import PreflightError
from entroray.objective import Objective
from entroray.workers import cluster
from entroray.workers.adapters import DeepSpeedLearner, Generators, Verifiers
from entroray.workers.checkpoint import Checkpoints
from entroray.workers.cluster import Gang, Pool, Share
from entroray.workers.generator import Generator, Sampling
from entroray.workers.learner import LearnerRank, LearnerSettings
from entroray.workers.sync import GeneratorClient, Probe, WeightSync
from entroray.workers.verifier import Verifier


def shares(config: Config) -> dict[str, tuple[int, Share]]:
    """How many actors of each role, and what each asks of the cluster."""
    cores = os.cpu_count() or 1
    c, g, n = config.cluster, config.generator, config.learner
    gpus = c.gpus_per_generator * g.tensor_parallel
    return {
        "generators": (g.replicas, Share(c.cpus.generator, gpus, g.threads or cores)),
        "learner ranks": (n.ranks, Share(c.cpus.learner, c.gpus_per_learner, n.threads or cores)),
        "verifiers": (config.verifier.replicas, Share(c.cpus.verifier, 0.0, 1)),
    }


def cpu_only(config: Config) -> bool:
    """Whether no role asks for a GPU."""
    return config.cluster.gpus_per_generator == 0 and config.cluster.gpus_per_learner == 0


@dataclass
class Machine:
    """Everything that runs: pools, the gang, and the driver's view of them."""

    config: Config
    generators: Pool
    learner: Gang
    verifiers: Pool
    sync: WeightSync
    facts: dict[str, Any]

    def generator_role(self, sampling: Sampling) -> Generators:
        return Generators(self.generators, sampling, self.config.rollout.deadline)

    def verifier_role(self) -> Verifiers:
        return Verifiers(self.verifiers, self.config.driver.call_deadline)

    def learner_role(self, objective: Objective) -> DeepSpeedLearner:
        n = self.config.learner
        return DeepSpeedLearner(
            self.learner, objective, n.updates_per_rollout, n.token_budget, self.config.driver.call_deadline
        )

    def checkpoints(self, run: Path) -> Checkpoints:
        """Where this run's checkpoints go."""
        keep = self.config.checkpoint.keep
        return Checkpoints(run / "checkpoints", self.learner, keep, self.config.driver.call_deadline)

    async def export(self, folder: str) -> None:
        """The policy in Hugging Face format; the tokenizer is the caller's to add."""
        deadline = self.config.driver.call_deadline
        await self.learner.all(lambda rank, h: h.export.remote(folder), deadline=deadline)

    async def stop(self) -> None:
        """Ranks leave their process group in order; Ray ends the rest."""
        await self.learner.all(lambda rank, h: h.stop.remote(), deadline=60.0)


def learner_settings(config: Config, model: str, total_updates: int) -> LearnerSettings:
    """The learner's share of the configuration."""
    n = config.learner
    return LearnerSettings(
        model=model,
        dtype=config.model.dtype,
        world=n.ranks,
        zero_stage=n.zero_stage,
        lr=n.lr,
        weight_decay=n.weight_decay,
        betas=(n.betas[0], n.betas[1]),
        max_grad_norm=n.max_grad_norm,
        schedule=n.schedule,
        warmup_updates=n.warmup_updates,
        total_updates=total_updates,
        seed=config.seed,
        reference=n.reference,
        gradient_checkpointing=n.gradient_checkpointing,
        attention=config.model.attention,
        transfer=config.generator.transfer,
        deepspeed=n.deepspeed,
    )


def length(config: Config) -> int:
    """Most tokens a prompt and its response may have together."""
    return config.data.max_prompt + config.rollout.max_tokens


def engine_options(config: Config) -> dict[str, Any]:
    """vLLM's options: ours, then the user's `generator.engine` over them."""
    # A prompt in chunks rewinds its sampling seed, which vLLM cannot do on CPU ("does not use offset").
    whole = {"enable_chunked_prefill": False, "max_num_batched_tokens": max(4096, length(config))}
    small = {"enforce_eager": True, "kv_cache_memory_bytes": 256 << 20}
    cpu = small | whole if cpu_only(config) else {}
    ours = {
        "tensor_parallel_size": config.generator.tensor_parallel,
        "weight_transfer_config": {"backend": config.generator.transfer},
        "disable_log_stats": True,
    }
    return ours | cpu | config.generator.engine


async def build(
    config: Config,
    model: str,
    objective: Objective,
    judge: Mapping[str, Any],
    probe: tuple[int, ...],
    *,
    total_updates: int,
    resume: tuple[Path, int] | None = None,
) -> Machine:
    """Start every actor, sync the weights, and compare log-probs on the probe before anything is trained.

    The weights are the model's as version 0, or with `resume` (checkpoint, step) those of that step.
    """
    asked = shares(config)
    settings = learner_settings(config, model, total_updates)
    dtype = config.model.dtype
    limit = max(length(config), len(probe) + 1)
    options = engine_options(config)
    generators = _spawn(
        asked["generators"], Generator, model, dtype=dtype, max_length=limit, seed=config.seed, engine=options
    )
    count, share = asked["learner ranks"]
    ranks = [cluster.spawn(LearnerRank, share, rank, settings, objective) for rank in range(count)]
    v = config.verifier
    limits = {"slots": v.slots, "deadline": config.reward.deadline, "memory_mb": v.memory_mb}
    judges = _spawn(asked["verifiers"], Verifier, judge, **limits)
    pools = Pool("generator", generators), Gang("learner", ranks), Pool("verifier", judges)
    sync, facts = await _introduce(config, *pools, probe, resume)
    return Machine(config, *pools, sync, facts)


def _spawn(asked: tuple[int, Share], cls: type, *args: Any, **kwargs: Any) -> list[Any]:
    count, share = asked
    return [cluster.spawn(cls, share, *args, **kwargs) for _ in range(count)]


async def _introduce(
    config: Config,
    generators: Pool,
    learner: Gang,
    verifiers: Pool,
    probe: tuple[int, ...],
    resume: tuple[Path, int] | None,
) -> tuple[WeightSync, dict[str, Any]]:
    """Gang together, engines ready, transfer open, the first version served and proved."""
    driver, within = config.driver, config.driver.start_deadline

    async def meeting() -> tuple[str, int]:
        return await cluster.settle(
            learner.handles[0].address.remote(), deadline=within, what="learner rank 0"
        )

    async def gang() -> list[dict[str, Any]]:
        host, port = await meeting()
        return await learner.all(lambda r, h: h.start.remote(host, port, within), deadline=within)

    facts, *_ = await asyncio.gather(
        gang(),
        generators.all(lambda h: h.start.remote(), deadline=within),
        verifiers.all(lambda h: h.warm_up.remote(), deadline=within),
    )
    client = GeneratorClient(
        generators.handles,
        config.generator.tensor_parallel,
        driver.call_deadline,
        rendezvous=await meeting(),
        keep_kv=config.generator.keep_kv,
    )
    await learner.all(lambda rank, h: h.connect.remote(client), deadline=within)
    settings = Probe(probe, driver.probe.every, driver.probe.tolerance)
    sync = WeightSync(learner, generators, probe=settings, deadline=driver.call_deadline)
    folder, version = resume or (None, 0)
    if folder:
        await learner.all(lambda rank, h: h.load.remote(str(folder)), deadline=within)
    return sync, facts[0] | await sync(version)


def join(config: Config) -> str:
    """Start or join Ray and check that it is large enough; returns the arithmetic."""
    if not cpu_only(config) and not config.cluster.address and not torch.cuda.is_available():
        raise PreflightError(
            "cluster asks for GPUs but torch sees none on this machine: use cluster=cpu, or give "
            "cluster.address of a Ray cluster that has them"
        )
    cluster.start(config.cluster.address, cpu_only=cpu_only(config))
    return cluster.check_resources(shares(config))
