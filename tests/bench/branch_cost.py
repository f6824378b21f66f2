"""Branches with the prefix cache and without, alone on the machine: python -m tests.bench.branch_cost

Each engine draws responses and then branches of them from half-way. Prompts differ in every round, so that
all a branch can find in the cache is its own family's. The first round warms up; the rest are summed.

It is one engine without a cluster around it. With several, a branch finds its prefix only where its prompt
was read (`Homes` in entroray/workers/engine_pool.py), and after an update of the weights nothing of before.
"""

import argparse
import asyncio
import os
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from entroray.config import WarmStartConfig
from entroray.engine.generator import Generator, Request
from entroray.policy.tiny_model import build_tiny_model
from entroray.types import Draw
from entroray.wiring import actors, compose
from entroray.workers import cluster

ENGINES: Mapping[str, Mapping[str, Any]] = {
    "no cache": {"enable_prefix_caching": False},
    "blocks of 128": {},
    "blocks of 64": {"block_size": 64},
    "blocks of 32": {"block_size": 32},
}
"""vLLM's attention on a CPU takes multiples of 32 only, and 128 where nothing is said."""
SIZES = {"short": (24, 48), "long": (128, 1024)}
"""(prompt, response) tokens."""


class Counting(Generator):
    """An engine that counts what it read, what of that its cache had, and what it drew."""

    def _load(self) -> None:
        self.counts: Counter[str] = Counter()
        super()._load()

    def _deliver(self, waiting: Any, output: Any, notes: Any) -> None:
        self.counts["read"] += len(output.prompt_token_ids)
        self.counts["cached"] += output.num_cached_tokens or 0
        self.counts["drawn"] += len(output.outputs[0].token_ids)
        super()._deliver(waiting, output, notes)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parents", type=int, default=8)
    parser.add_argument("--branches", type=int, default=4, help="of each parent")
    parser.add_argument(
        "--only", type=int, default=0, help="tokens a branch may draw; 0: as many as are left"
    )
    return parser.parse_args()


async def wave(engine: Counting, requests: list[Request]) -> list[list[int]]:
    """What was drawn for each request, one sample each."""
    found: dict[int, list[int]] = {}
    async for ended in engine.sample_all(requests):
        found |= {index: rollouts[0].token_ids.tolist() for index, rollouts in ended.items()}
    return [found[i] for i in range(len(requests))]


async def grow(engine: Counting, size: tuple[int, int], asked: argparse.Namespace, turn: int) -> Counter[str]:
    """Seconds and tokens of one round's branches."""
    prompt, response = size
    rng = np.random.default_rng(turn)
    prompts = [tuple(int(i) for i in rng.integers(3, 250, prompt)) for _ in range(asked.parents)]
    whole = Draw(1.0, response)
    heads = await wave(engine, [Request("q", p, (turn,), whole, 900.0) for p in prompts])
    afters = [tuple(head[: len(head) // 2]) for head in heads]
    engine.counts.clear()
    began = time.perf_counter()
    await wave(
        engine,
        [
            Request("q", p, (7 * n + turn,), limited(whole, len(a), asked.only), 900.0, a)
            for p, a in zip(prompts, afters, strict=True)
            for n in range(asked.branches)
        ],
    )
    return Counter(engine.counts) + Counter({"ms": round(1000 * (time.perf_counter() - began))})


def limited(whole: Draw, there: int, only: int) -> Draw:
    """So that what follows `there` tokens is at most `only` more."""
    return whole if not only else Draw(whole.temperature, there + only)


async def measure(folder: str, asked: argparse.Namespace) -> None:
    config, _ = compose.load_config(["rollout.max_tokens=1024"])
    print(f"{'':8}{'':16}{'seconds':>8}{'read':>9}{'cached':>9}{'drawn':>9}{'computed':>10}")
    for case, size in SIZES.items():
        for name, options in ENGINES.items():
            whole = actors.engine_options(config) | dict(options)
            engine = Counting(folder, dtype="float32", max_length=1536, seed=0, engine=whole)
            await engine.start()
            total: Counter[str] = Counter()
            for turn in range(asked.rounds + 1):
                found = await grow(engine, size, asked, turn)
                total += found if turn else Counter()
            computed = total["read"] - total["cached"] + total["drawn"]
            columns = [f"{total[k]:9,}" for k in ("read", "cached", "drawn")]
            print(f"{case:8}{name:16}{total['ms'] / 1000:8.2f}{''.join(columns)}{computed:10,}", flush=True)


def main() -> None:
    asked = arguments()
    os.environ.update(cluster.environment() | cluster.CPU_ONLY)
    with tempfile.TemporaryDirectory() as folder:
        size = WarmStartConfig().size | {"max_position_embeddings": 1536}
        build_tiny_model(Path(folder), size, seed=0)
        asyncio.run(measure(folder, asked))


if __name__ == "__main__":
    main()
