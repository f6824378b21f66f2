"""What a sync costs beside `load_weights` and finalize of the same tensors: python -m tests.bench.sync_cost

One learner and one engine over Ray, for the model of 0.8 M parameters and for one of 300 M, by turns in one
run: a whole sync as the driver sees it, the pause in which the engine takes no step, and in that engine's own
thread vLLM's `load_weights` and finalize of the same tensors, which lie in its process.
"""

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
import torch

from entroray.config import WarmStartConfig
from entroray.engine.generator import Generator
from entroray.policy.tiny_model import build_tiny_model
from entroray.wiring import actors, compose, dataset
from entroray.wiring.parts import build_parts
from entroray.workers import cluster

LARGE = {"num_hidden_layers": 24, "hidden_size": 1024, "intermediate_size": 2816} | {
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 1024,
}
SIZES: Mapping[str, Mapping[str, int]] = {"0.8 M": WarmStartConfig().size, "300 M": LARGE}
WANTED = {"whole": 2.0, "pause": 1.2}
"""Most that each may be of loading in process."""


class Timed(Generator):
    """An engine that clocks its pauses, and loads what it was sent once more from its own memory."""

    def _open(self) -> None:
        self.opened = time.perf_counter()
        super()._open()

    def _commit(self, version: int, keep_kv: bool) -> tuple[int, str | None]:
        assert self.staged is not None
        if not hasattr(self, "kept"):
            self.kept = [torch.from_numpy(each.copy()) for each in self.staged[1]]
        acknowledged = super()._commit(version, keep_kv)
        self.pause = time.perf_counter() - self.opened
        return acknowledged

    async def last_pause(self) -> float:
        return self.pause

    async def load_here(self) -> float:
        """Seconds of `load_weights` and finalize."""
        return (await self._run(lambda: self.llm.collective_rpc(load_again, args=(self.kept,))))[0]


def load_again(worker: Any, kept: list[torch.Tensor]) -> float:
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

    engine = worker.weight_transfer_engine
    worker.start_weight_update()
    tensors = [
        (name, each.view(getattr(torch, dtype)).view(shape))
        for (name, (dtype, shape)), each in zip(engine.expected.items(), kept, strict=True)
    ]
    with set_current_vllm_config(worker.vllm_config):
        began = time.perf_counter()
        engine.model.load_weights(tensors)
        finalize_layerwise_reload(engine.model, engine.model_config)
        seconds = time.perf_counter() - began
    worker.finish_weight_update()
    return seconds


async def measure(folder: str, rounds: int) -> Mapping[str, list[float]]:
    """Seconds of each round, by what was clocked."""
    config, _ = compose.load_config(["driver.probe.every=0", f"model.path={folder}", "learner.lr=1e-6"])
    parts, judge = build_parts(config), dataset.judge_spec(config)
    m = await actors.start_actors(config, folder, parts, judge, (1, 2, 3), total_updates=1)
    ask = lambda call: cluster.settle(call, deadline=600.0, what="the engine")
    found: dict[str, list[float]] = {"whole": [], "pause": [], "in process": []}
    for version in range(1, rounds + 3):
        began = time.perf_counter()
        await m.sync(version)
        found["whole"].append(time.perf_counter() - began)
        found["pause"].append(await ask(m.engines.handles[0].last_pause.remote()))
        found["in process"].append(await ask(m.engines.handles[0].load_here.remote()))
    await m.sync.compare()
    await m.end()
    return {name: seconds[2:] for name, seconds in found.items()}  # the first rounds warm up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", choices=SIZES)
    asked = parser.parse_args()
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this file
    actors.Generator = Timed  # type: ignore[misc]
    cluster.start(None, cpu_only=True)
    for name, size in SIZES.items():
        if asked.only not in (None, name):
            continue
        with tempfile.TemporaryDirectory() as folder:
            build_tiny_model(Path(folder), size, seed=0)
            found = asyncio.run(measure(folder, asked.rounds))
        base = found["in process"]
        print(f"{name}: load_weights and finalize {1000 * statistics.median(base):.1f} ms")
        for what, most in WANTED.items():
            ratios = [a / b for a, b in zip(found[what], base, strict=True)]
            ms = 1000 * statistics.median(found[what])
            print(
                f"  {what}: {ms:.1f} ms, {statistics.median(ratios):.2f} times ({min(ratios):.2f} to "
                f"{max(ratios):.2f}), at most {most:g} wanted",
                flush=True,
            )
    cluster.stop()


if __name__ == "__main__":
    main()
