"""An engine and a rank of the learner in two processes without Ray, as parts f and g have them."""

import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from entroray.config import Cluster, Config, GeneratorConfig, Model
from entroray.types import Draw, Group, Prompt, Verdict
from tests.gpu import shapes
from tests.gpu.engine import prompt
from tests.gpu.part_e import EAGER, GRAPHS, Kind, environment
from tests.gpu.processes import Process
from tests.gpu.record import BROKE, Asked, Check, NotThereError, at_most, measured, there

NATS = 0.05
"""Most that engine and learner may be apart on a text, in the mean."""
LR = 1e-3
"""Random weights move with it by more than both sides' rounding."""
KV = 8 << 30
"""Bytes of keys and values: what a learner leaves of a card by turns."""
CONNECT, SEND = 60.0, 60.0
"""Seconds for a transfer to open, and for weights to be sent."""
START, DRY_START = 90.0, 200.0
"""Seconds for a process to import its libraries and start; on the CPU all parts do so at once."""


@dataclass
class Pair:
    """Both processes, and what they were started with."""

    asked: Asked
    transfer: str
    environments: tuple[Mapping[str, str], Mapping[str, str]] = ({}, {})
    """Of the engine and of the rank, besides those of a run."""
    sleeps: bool = False
    engine: Any = None
    rank: Any = None
    temporary: Any = field(default_factory=tempfile.TemporaryDirectory)
    version: int = 0
    decoding: Mapping[str, Any] = field(default_factory=lambda: GRAPHS)
    ready: bool = False
    """Whether both have started."""

    @property
    def size(self) -> str:
        return "served" if self.asked.dry else "1.5B"

    @property
    def model(self) -> Model:
        dtype = "float32" if self.asked.dry else "bfloat16"
        return Model(path=str(Path(self.temporary.name, "model")), dtype=dtype)

    @property
    def start_within(self) -> float:
        return DRY_START if self.asked.dry else START

    def options(self) -> dict[str, Any]:
        """vLLM's, as a run with these settings gives them."""
        engine_options = there("entroray.wiring.actors", "engine_options")
        share = 0.0 if self.asked.dry else 0.5
        own = {"kv_cache_memory_bytes": 16 << 20 if self.asked.dry else KV, **self.decoding}
        generator = GeneratorConfig(transfer=self.transfer, sleep=self.sleeps, engine=own)
        cluster = Cluster(gpus_per_generator=share, gpus_per_learner=share)
        return engine_options(Config(model=self.model, generator=generator, cluster=cluster))

    def start(self) -> Iterator[Check]:
        """The engine first, which measures the card as it starts, while the rank imports DeepSpeed."""
        began = time.perf_counter()
        self.start_processes()
        path = Path(self.model.path)
        shapes.served_folder(self.size, path, weights=True, device=self.asked.device)
        if self.asked.card:
            torch.cuda.empty_cache()
        yield measured("a model was written", seconds=time.perf_counter() - began)
        yield from self.begin_engine()
        begun = self.rank.call("begin", self.asked, self.model, self.transfer, LR, seconds=self.start_within)
        yield measured("the rank started", **begun)
        self.ready = True

    def start_processes(self) -> None:
        self.renew_engine()
        self.rank = Process("tests.gpu.rank:Rank", environment(Kind({}, self.environments[1]), self.asked))

    def renew_engine(self) -> None:
        """Another process in its place, which imports vLLM."""
        if self.engine is not None:
            self.engine.end()
        self.engine = Process(
            "tests.gpu.engine:Engine", environment(Kind({}, self.environments[0]), self.asked)
        )

    def begin_engine(self) -> Iterator[Check]:
        """With CUDA graphs; where that fails, without, so that the rest is seen."""
        if self.asked.dry:
            self.decoding = {}
        longest = 128 if self.asked.dry else 2048
        start = lambda: self.engine.call(
            "begin", self.model.path, self.model.dtype, longest, self.options(), seconds=self.start_within
        )
        try:
            yield measured("the engine started", **start())
        except Exception as error:  # boundary: whatever vLLM raises
            if self.decoding != GRAPHS:
                raise
            yield Check("the engine started with CUDA graphs", BROKE, {}, f"{error!r}"[:500])
            self.decoding = EAGER
            self.renew_engine()
            yield measured("the engine started without them", **start())

    def connect(self) -> None:
        """Open the transfer."""
        self.rank.call("reach", [self.engine.handle], False, SEND, seconds=CONNECT)

    def sync(self) -> float:
        """Send the next version, which the engine must acknowledge; seconds it took."""
        began = time.perf_counter()
        delivery = self.rank.call("sync", self.version, seconds=SEND)
        delivery.verify(1)
        self.version += 1
        return time.perf_counter() - began

    def text(self) -> tuple[int, ...]:
        """What both sides score."""
        return prompt(24 if self.asked.dry else 256, shapes.SIZES[self.size]["vocab_size"])

    def logprobs(self) -> tuple[np.ndarray, np.ndarray]:
        """Of the engine and of the rank."""
        asked = [p.handle.prompt_logprobs.remote(self.text()) for p in (self.engine, self.rank)]
        ours, theirs = (np.asarray(answer.result(SEND)) for answer in asked)
        return ours, theirs

    def compare(self, label: str) -> Check:
        """Both on one text."""
        ours, theirs = self.logprobs()
        apart = np.abs(ours - theirs)
        probabilities = float(np.abs(np.exp(ours) - np.exp(theirs)).max())
        mean = at_most(f"{label}: mean nats between engine and learner", NATS, mean=float(apart.mean()))
        numbers = {**mean.numbers, "largest_nats": float(apart.max()), "largest_probability": probabilities}
        return mean._replace(numbers=numbers)

    def groups(self) -> list[Group]:
        """Four prompts, eight samples of each by the engine, right by the parity of their first token."""
        length, longest, members = (4, 8, 4) if self.asked.dry else (64, 256, 8)
        found = []
        for index in range(4):
            ids = prompt(length + index, 256)
            drawn = self.engine.call("draw", ids, members, Draw(1.0, longest), seconds=SEND)
            verdicts = [Verdict(float(r.token_ids[0] % 2), bool(r.token_ids[0] % 2)) for r in drawn]
            found.append(Group(Prompt(f"p{index}", "", ids, ""), tuple(drawn), tuple(verdicts)))
        return found

    def free(self) -> float:
        """GiB of the card."""
        return torch.cuda.mem_get_info()[0] / 2**30

    def restart(self) -> "Pair":
        """Ready, as at the end of an earlier step that a call before this one has done."""
        if self.engine is None:
            for check in self.start():
                print(f"once more: {check.name}", flush=True)
            self.connect()
            self.sync()
        if not self.ready:
            raise NotThereError("engine and rank did not both start")
        return self

    def end(self) -> None:
        for process in (self.engine, self.rank):
            if process is not None:
                process.end()
        self.temporary.cleanup()
