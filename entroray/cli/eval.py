"""`entroray eval`: held-out accuracy of a model folder, in this process alone: one engine, no Ray."""

import asyncio
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from entroray.cli import bootstrap, machine, material, sampling, settings
from entroray.config import Config
from entroray.errors import ConfigError
from entroray.loop.evaluate import heldout
from entroray.types import Prompt, Rollout
from entroray.workers import cluster
from entroray.workers.generator import Generator, Request, Sampling
from entroray.workers.request import opening
from entroray.workers.verifier import Verifier


@dataclass(frozen=True)
class OneEngine:
    """A generator in this process, as a role."""

    engine: Generator
    sampling: Sampling
    deadline: float

    async def sample(self, prompt: Prompt, seeds: Sequence[int], after: Sequence[int] = ()) -> list[Rollout]:
        request = Request(
            prompt.id, prompt.token_ids, tuple(seeds), self.sampling, self.deadline, tuple(after)
        )
        return await self.engine.sample(request)

    async def first_tokens(self, prompt: Prompt, count: int) -> list[Rollout]:
        return await self.engine.sample(opening(prompt, count, self.sampling, self.deadline))


def main(arguments: list[str]) -> int:
    """`eval [--config=run/config.yaml] [--out=file.json] overrides`; prints the scores as JSON."""
    flags = dict(a.removeprefix("--").split("=", 1) for a in arguments if a.startswith("--") and "=" in a)
    overrides = [a for a in arguments if not a.startswith("--")]
    unknown = flags.keys() - {"config", "out"}
    if unknown:
        raise ConfigError(f"eval knows --config and --out, not {', '.join(sorted(unknown))}")
    given = flags.get("config")
    config = of_run(Path(given), overrides) if given else settings.load(overrides, training=False)[0]
    result = asyncio.run(evaluate(config))
    text = json.dumps(result, indent=2)
    if "out" in flags:
        Path(flags["out"]).write_text(text)
    print(text)
    return 0


def of_run(path: Path, overrides: list[str]) -> Config:
    """The settings a run was made with, and what is said beside them."""
    tree = OmegaConf.merge(
        OmegaConf.structured(Config), OmegaConf.load(path), OmegaConf.from_dotlist(overrides)
    )
    config: Config = OmegaConf.to_object(tree)  # type: ignore[assignment]
    sampling.check(config)
    return config


async def evaluate(config: Config) -> dict[str, Any]:
    """Greedy accuracy and pass@k on the held-out prompts."""
    os.environ.update(cluster.environment() | (cluster.CPU_ONLY if machine.cpu_only(config) else {}))
    model, e = bootstrap.resolve(config), config.evaluate
    read = material.load(config, model)
    prompts = read.split.heldout[: e.prompts]
    limit = machine.length(config)
    options, s = machine.engine_options(config), config.sampler
    shaped = partial(sampling.shaped, tokenizer=read.tokenizer)
    drawn = partial(shaped if e.shaped else sampling.plain, config)
    engine = Generator(model, dtype=config.model.dtype, max_length=limit, seed=0, engine=options)
    v = config.verifier
    verifier = Verifier(read.judge, slots=v.slots, deadline=config.reward.deadline, memory_mb=v.memory_mb)
    try:
        await asyncio.gather(engine.start(), verifier.warm_up())
        role = lambda t: OneEngine(engine, drawn(t), config.rollout.deadline)  # noqa: E731
        measured = await heldout(role, verifier, prompts, temperature=s.temperature, samples=e.samples)
    finally:
        verifier.close()
    return {
        "model": model,
        "prompts": len(prompts),
        "samples": e.samples,
        "temperature": s.temperature,
        "sampler": sampling.describe(s) if e.shaped else "fixed",
        **measured,
    }
