"""`sample` through Ray beside the same requests in process:

OMP_WAIT_POLICY=passive python -m tests.bench.sample_cost

OpenMP reads that variable as torch is imported; without it the engine in this process would spin.
An engine in this process and one in an actor take turns at the same wave, so that a machine that drifts does
not show as one of them. At most 1.15 is wanted.
"""

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from entroray.config import WarmStartConfig
from entroray.engine.generator import Generator, Request
from entroray.policy.tiny_model import build_tiny_model
from entroray.types import Draw
from entroray.wiring import actors, compose
from entroray.workers import cluster
from entroray.workers.engine_pool import EnginePool
from tests.bench.sampler_cost import PROMPTS


async def seconds(sample: Callable[[Request], Coroutine[Any, Any, Any]], seed: int, tokens: int) -> float:
    """Of one wave, 8 responses of exactly `tokens` tokens to each of 32 prompts."""
    draw, seeds = Draw(1.0, tokens, min_tokens=tokens), tuple(range(seed, seed + 8))
    wave = [Request("q", prompt, seeds, draw, 600.0) for prompt in PROMPTS]
    began = time.perf_counter()
    await asyncio.gather(*map(sample, wave))
    return time.perf_counter() - began


async def measure(folder: str, rounds: int, tokens: int) -> list[tuple[float, float]]:
    """(in process, through Ray) of each round."""
    config, _ = compose.load_config(["generator.engine={max_num_seqs: 1024}"])
    options = {"dtype": "float32", "max_length": 512, "seed": 0, "engine": actors.engine_options(config)}
    share = actors.resource_shares(config)["generators"][1]
    here = Generator(folder, **options)
    nobody: Any = None
    pool = EnginePool(
        [cluster.spawn(Generator, share, folder, **options)],
        *(nobody, nobody),
        restarts=0,
        start_deadline=300.0,
        report=lambda kind, **_: None,
    )
    await asyncio.gather(here.start(), pool.start())
    found = []
    for turn in range(rounds + 1):
        pair = [await seconds(sample, 8 * turn, tokens) for sample in (here.sample, pool.sample)]
        found.append((pair[0], pair[1]))
    await pool.close()
    return found[1:]  # the first round warms up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=64, help="of each response")
    asked = parser.parse_args()
    if os.environ.get("OMP_WAIT_POLICY") != "passive":
        parser.error("start it with OMP_WAIT_POLICY=passive, as actors are")
    os.environ.update(cluster.environment() | cluster.CPU_ONLY)
    cluster.start(None, cpu_only=True)
    with tempfile.TemporaryDirectory() as folder:
        build_tiny_model(Path(folder), WarmStartConfig().size, seed=0)
        found = asyncio.run(measure(folder, asked.rounds, asked.tokens))
    ratios = [through / here for here, through in found]
    here, through = (statistics.median(column) for column in zip(*found, strict=True))
    print(
        f"in process {here:.2f} s, through Ray {through:.2f} s: {statistics.median(ratios):.2f} times "
        f"({min(ratios):.2f} to {max(ratios):.2f}), at most 1.15 wanted"
    )
    cluster.stop()


if __name__ == "__main__":
    main()
