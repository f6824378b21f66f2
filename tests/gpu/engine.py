"""What a proof asks of an engine without Ray: the product's own, in a process of `processes`."""

import hashlib
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from entroray.engine.generator import Generator
from entroray.engine.vllm_request import Request
from entroray.types import Draw, Rollout
from tests.gpu.record import SEED, there

WITHIN = 120.0
"""Seconds that a sample is waited for."""


class Engine:
    """A `Generator`, whose methods are called as if they were this one's."""

    def __init__(self) -> None:
        began = time.perf_counter()
        there("vllm", "LLM")
        self.imported = time.perf_counter() - began
        self.generator: Any = None

    def __getattr__(self, name: str) -> Any:
        if name == "generator" or self.generator is None:
            raise AttributeError(name)
        return getattr(self.generator, name)

    async def begin(self, model: str, dtype: str, longest: int, options: dict[str, Any]) -> dict[str, Any]:
        """Start it; seconds of importing vLLM and of the start, and which of vLLM's runners serves."""
        self.generator = Generator(model, dtype=dtype, max_length=longest, seed=SEED, engine=options)
        seconds = await self.generator.start()
        (runner,) = await self.generator._run(lambda: self.generator.llm.collective_rpc(_runner))
        return {"import_s": self.imported, "start_s": seconds, "runner": runner, **self._chosen()}

    def _chosen(self) -> dict[str, Any]:
        """What vLLM made of its options."""
        config = self.generator.llm.llm_engine.vllm_config
        return {
            "graphs": str(config.compilation_config.cudagraph_mode).rpartition(".")[2],
            "overlap": bool(config.scheduler_config.async_scheduling),
            "threads": torch.get_num_threads(),
        }

    async def fill(self, prompt: Sequence[int], sequences: int, draw: Draw) -> dict[str, Any]:
        """Draw so many samples of one prompt at once: tokens, seconds, and a hash of all that was drawn."""
        began = time.perf_counter()
        rollouts = await self.draw(prompt, sequences, draw)
        took = time.perf_counter() - began
        found = hashlib.sha256(b"".join(r.token_ids.tobytes() for r in rollouts)).hexdigest()[:16]
        first = [int(r.token_ids[0]) for r in rollouts]
        return {"tokens": sum(r.length for r in rollouts), "seconds": took, "hash": found, "first": first}

    async def draw(self, prompt: Sequence[int], sequences: int, draw: Draw) -> list[Rollout]:
        """Samples with seeds from 0 on."""
        request = Request("proof", tuple(prompt), tuple(range(sequences)), draw, WITHIN)
        return await self.generator.sample(request)

    async def rest(self, level: int) -> dict[str, float]:
        """vLLM's sleep at `level`: seconds, and bytes of the card that it frees."""
        return await self.generator._run(lambda: self._timed(lambda: self.generator.llm.sleep(level=level)))

    async def wake(self, *tags: str) -> dict[str, float]:
        """And back: seconds, and bytes that it takes."""
        woken = lambda: self.generator.llm.wake_up(tags=list(tags) or None)
        return await self.generator._run(lambda: self._timed(woken))

    def _timed(self, action: Any) -> dict[str, float]:
        before, began = torch.cuda.mem_get_info()[0], time.perf_counter()
        action()
        torch.cuda.synchronize()
        took = time.perf_counter() - began
        return {"seconds": took, "gib": abs(torch.cuda.mem_get_info()[0] - before) / 2**30}


def _runner(worker: Any) -> str:
    """V2 lies in a package of its own."""
    module = type(worker.model_runner).__module__
    return "V2" if ".worker.gpu.model_runner" in module else "V1"


def prompt(length: int, vocabulary: int) -> tuple[int, ...]:
    """A text of random tokens that both sides read."""
    return tuple(np.random.default_rng(SEED).integers(0, vocabulary, length).tolist())
