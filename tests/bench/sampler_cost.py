"""Tokens a second under each sampler against fixed, alone on the machine: python -m tests.bench.sampler_cost

Two engines in this process take turns: one as `sampler=fixed` starts it, one with the logits processor. The
cost is the median over rounds of each round's own ratio, so that a machine that drifts does not show as one.
"""

import argparse
import asyncio
import os
import random
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from entroray.config import WarmStartConfig
from entroray.engine.generator import Generator, Request
from entroray.policy.tiny_model import build_tiny_model
from entroray.types import Draw
from entroray.wiring import actors, compose
from entroray.wiring.parts import build_parts
from entroray.workers import cluster

PROMPTS = [tuple(int(i) for i in np.random.default_rng(n).integers(0, 250, 16)) for n in range(32)]
RULES = {
    "by_entropy": {"fn": "by_entropy"},
    "quadrants": {"fn": "quadrants"},
    "hotter": {"fn": "fixed"},
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=64, help="of each response")
    parser.add_argument("--group", type=int, default=8, help="responses of each of 32 prompts")
    return parser.parse_args()


async def speed(engine: Generator, draw: Draw, group: int, seed: int) -> float:
    """Tokens a second of one wave, all of it asked for at once."""
    seeds = tuple(range(seed, seed + group))
    wave = [Request("q", prompt, seeds, draw, 600.0) for prompt in PROMPTS]
    began, tokens = time.perf_counter(), 0
    async for found in engine.sample_all(wave):
        tokens += sum(r.length for rollouts in found.values() for r in rollouts)
    return tokens / (time.perf_counter() - began)


async def measure(folder: str, rounds: int, tokens: int, group: int) -> Mapping[str, list[float]]:
    """Speeds by sampler, one of each per round."""
    configs = {name: compose.load_config([f"sampler={name}"])[0] for name in ("fixed", "by_entropy")}
    sizes = {"dtype": "float32", "max_length": 512, "seed": 0}
    engines = {}
    for name, config in configs.items():
        options = actors.engine_options(config) | actors.logits_processors(config, build_parts(config))
        engines[name] = Generator(folder, **sizes, engine=options)
        await engines[name].start()
    plain = Draw(1.0, tokens)
    arms = {"fixed": (engines["fixed"], plain), "fixed, processor loaded": (engines["by_entropy"], plain)}
    arms |= {name: (engines["by_entropy"], replace(plain, rule=rule)) for name, rule in RULES.items()}
    found: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(rounds + 1):
        for name, (engine, draw) in random.Random(turn).sample(list(arms.items()), len(arms)):
            found[name].append(await speed(engine, draw, group, seed=turn * group))
    return {name: speeds[1:] for name, speeds in found.items()}  # the first round warms up


def main() -> None:
    asked = arguments()
    os.environ.update(cluster.environment() | cluster.CPU_ONLY)
    with tempfile.TemporaryDirectory() as folder:
        build_tiny_model(Path(folder), WarmStartConfig().size, seed=0)
        found = asyncio.run(measure(folder, asked.rounds, asked.tokens, asked.group))
    for name, speeds in found.items():
        cost = statistics.median(1 - s / f for s, f in zip(speeds, found["fixed"], strict=True))
        print(f"{name:26s}{statistics.median(speeds):9,.0f} tokens/s   cost {100 * cost:5.1f} %")


if __name__ == "__main__":
    main()
