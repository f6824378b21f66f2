"""What a proof asks of a learner's rank in a process of `processes`, beside an engine in another."""

import os
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from entroray.config import Model
from entroray.types import Group
from tests.gpu import part_d
from tests.gpu.processes import Handle
from tests.gpu.record import SEED, Asked, there

UPDATES = 100
"""Length of a schedule that is constant."""


class Rank:
    """A `LearnerRank`, whose methods are called as if they were this one's."""

    def __init__(self) -> None:
        began = time.perf_counter()
        there("deepspeed")
        self.rank_class, self.settings_class = there(
            "entroray.workers.learner_rank", "LearnerRank", "LearnerSettings"
        )
        self.backend = there("entroray.workers.deepspeed_backend", "DeepSpeedBackend")
        self.imported = time.perf_counter() - began
        self.rank: Any = None
        self.held: Any = None

    def __getattr__(self, name: str) -> Any:
        if name == "rank" or self.rank is None:
            raise AttributeError(name)
        return getattr(self.rank, name)

    def begin(self, asked: Asked, model: Model, transfer: str, lr: float) -> dict[str, Any]:
        """Start it; seconds of importing DeepSpeed and of the start."""
        began = time.perf_counter()
        settings = self.settings_class(part_d.learner(lr=lr), model, transfer, SEED, UPDATES)
        self.rank = self.rank_class(0, settings, part_d.objective(), self.backend)
        self.rank.address = _loopback
        self.rank.start("127.0.0.1", _loopback()[1], 60.0)
        if asked.dry:  # no Ray: what it would keep for the engine goes over the pipe
            there("entroray.workers.transfer").ray = SimpleNamespace(put=lambda payload: payload)
        return {"import_s": self.imported, "start_s": time.perf_counter() - began}

    def reach(self, handles: Sequence[Handle], keep_kv: bool, seconds: float) -> None:
        """Open the transfer to the engines behind these handles."""
        client = there("tests.gpu.client", "Client")
        self.rank.connect(client(handles, 1, seconds, keep_kv))

    def train(self, groups: Sequence[Group]) -> dict[str, float]:
        """One update on these groups, and how far engine and learner are apart on what was drawn."""
        began = time.perf_counter()
        given = part_d.scored(groups, self.rank)
        ours = np.concatenate([tokens.logprobs.numpy() for _, tokens in given])
        drawn = np.concatenate([tokens.behavior_logprobs.numpy() for _, tokens in given])
        gap = ours.astype(np.float64) - drawn
        sums = self.rank.update(given)
        return {
            "loss": float(sums["loss"]),
            "grad_norm": float(sums["grad_norm"]),
            "skipped": float(sums["skipped"]),
            "mean_nats": float(np.abs(gap).mean()),
            "largest_nats": float(np.abs(gap).max()),
            "kl": float((np.exp(gap) - gap - 1).mean()),
            "seconds": time.perf_counter() - began,
        }

    def hold(self, gib: float) -> None:
        """Keep that much of the card, or give it back."""
        self.held = torch.zeros(int(gib * 2**30), dtype=torch.uint8, device=self.rank.device) if gib else None
        if self.rank.device.type == "cuda":
            torch.cuda.empty_cache()

    def break_at(self, share: float, pid: int) -> None:
        """Of the next weights sent, kill process `pid` behind this share of the parameters."""
        sent = self.rank.transfer
        sent.source = _Breaking(sent.source, share, pid)


class _Breaking:
    """A source of weights during whose reading a process dies, once."""

    def __init__(self, source: Any, share: float, pid: int):
        self.source, self.share, self.pid = source, share, pid

    def metadata(self) -> Any:
        return self.source.metadata()

    def __iter__(self) -> Iterator[Any]:
        at = int(self.share * len(self.metadata()))
        for index, pair in enumerate(self.source):
            if index == at:
                os.kill(self.pid, signal.SIGKILL)
            yield pair


def _loopback() -> tuple[str, int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return "127.0.0.1", probe.getsockname()[1]
