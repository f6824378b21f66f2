"""New weights reach the generators, and both sides prove that they hold the same ones."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from ray.exceptions import RayTaskError

from entroray.errors import InfrastructureError, SyncError
from entroray.workers.cluster import Gang, wait
from entroray.workers.engine_pool import EnginePool


@dataclass
class GeneratorClient:
    """vLLM's weight-sync client over generator actors: every call reaches all, within a deadline.

    Lives on learner rank 0 and is driven by the transfer engine chosen in `generator.transfer`.
    """

    handles: Sequence[Any]
    tensor_parallel: int
    deadline: float
    keep_kv: bool = False
    rendezvous: tuple[str, int] = ("", 0)
    """Address and port where an NCCL group of learner rank 0 and all engines may meet; rank 0 fills it in."""
    version: int = 0
    sent: str | None = None
    acknowledged: list[tuple[int, str | None]] = field(default_factory=list)

    def init_weight_transfer_engine(self, info: Mapping[str, Any]) -> None:
        self._all([h.init_weight_transfer_engine.remote(i) for h, i in self._ranked(info)], "initialising")

    def stage(self, payload: Any, sent: str) -> None:
        """Every engine pulls `payload` (an ObjectRef) and hashes it while it still generates."""
        received = self._all([h.stage.remote(payload) for h in self.handles], "staging")
        wrong = [i for i, r in enumerate(received) if r != sent]
        if wrong:
            raise SyncError(f"weights of version {self.version} arrived damaged at generators {wrong}")
        self.sent = sent

    def start_weight_update(self) -> None:
        self._all([h.start_weight_update.remote() for h in self.handles], "pausing")

    def update_weights(self, info: Any) -> None:
        self._all([h.update_weights.remote(info) for h in self.handles], "loading")

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        keep = self.keep_kv and self.version > 0  # version 0 begins a run: what is cached is another's
        calls = [h.finish_weight_update.remote(self.version, keep) for h in self.handles]
        self.acknowledged = [tuple(a) for a in self._all(calls, "committing")]

    def _ranked(self, info: Mapping[str, Any]) -> list[tuple[Any, dict[str, Any]]]:
        """Each engine's ranks follow those of the one before it in an NCCL group."""
        offset = lambda i: {"rank_offset": 1 + i * self.tensor_parallel}
        ranked = "rank_offset" in info
        return [(h, {**info, **(offset(i) if ranked else {})}) for i, h in enumerate(self.handles)]

    def _all(self, calls: Sequence[Any], doing: str) -> list[Any]:
        return wait(calls, deadline=self.deadline, what=f"{doing} weights of version {self.version}")


@dataclass(frozen=True)
class SyncProbe:
    """A fixed text on which engines and learner must give the same log-probs (T=1)."""

    token_ids: tuple[int, ...]
    every: int
    """Compare at start and at every version that this divides."""
    tolerance: float
    """Largest difference allowed, nats: 1e-3 in FP32; bf16 needs about 0.1."""


class WeightSync:
    """The driver's view of a sync: versions and hashes acknowledged, log-probs compared, newcomers served."""

    def __init__(
        self,
        learner: Gang,
        engines: EnginePool,
        client: Callable[[Sequence[Any]], GeneratorClient],
        *,
        probe: SyncProbe,
        deadline: float,
        transfer: str = "plasma",
    ):
        self.transfer = transfer
        self.learner, self.engines, self.client = learner, engines, client
        self.probe, self.deadline = probe, deadline
        self.reached: list[Any] = []
        """The engines that the learner knows."""
        self.compared = False
        self.turn = asyncio.Lock()
        engines.mend = self.mend

    async def __call__(self, version: int) -> dict[str, float]:
        """Serve `version` everywhere; SyncError when an engine holds something else."""
        while not await self._served(version):
            await self.engines.arrived()
        check = not self.compared or (self.probe.every and version % self.probe.every == 0)
        self.compared = True
        return {"sync/probe_error": await self.compare()} if check else {}

    async def _served(self, version: int) -> bool:
        """Whether `version` is served by all; False when an engine was lost on the way."""
        async with self.turn:
            if not await self._ready():
                return False
            try:
                await self._connect()
                sent = self.learner.all(lambda rank, h: h.sync.remote(version), deadline=self.deadline)
                answers = await sent
            except SyncError:
                raise
            except (InfrastructureError, RayTaskError) as error:
                if self.transfer == "nccl":
                    raise _gang_lost(version, error) from error
                if not isinstance(error, InfrastructureError) or await self._all_well():
                    raise
                return False
            self._check(version, *answers[0])
            self.engines.admit(self.reached)
            return True

    async def _connect(self) -> None:
        """Introduce the learner to the engines there are now, when they are not those it knows."""
        there = self.engines.there()
        if there != self.reached:
            client = self.client(there)
            await self.learner.all(lambda rank, h: h.connect.remote(client), deadline=self.deadline)
            self.reached = there

    def forget(self) -> None:
        """Introduce learner and engines to each other again at the next sync: the learner was rebuilt."""
        self.reached = []

    async def _all_well(self) -> bool:
        """Ask every engine whether its weights are complete; drop those that fail.

        True when none was dropped.
        """
        self.reached = []
        return await self._none_lost()

    async def _none_lost(self) -> bool:
        before = self.engines.handles
        await self.engines.all(lambda h: h.whole.remote(), deadline=self.deadline, what="asked how it is")
        return before == self.engines.handles

    async def _ready(self) -> bool:
        """Whether every engine answers, where ranks would wait in a collective for one that does not."""
        return self.transfer == "plasma" or await self._none_lost()

    async def mend(self) -> None:
        """Bring newcomers the weights served now; while the learner is past them, the next sync will."""
        async with self.turn:
            await self._ready()
            there = self.engines.there()
            client = self.client(there)
            answers = await self.learner.all(lambda rank, h: h.resend.remote(client), deadline=self.deadline)
            if answers[0] is not None:
                self.reached = there
                self._check(None, *answers[0])
                self.engines.admit(there)

    def _check(
        self, version: int | None, sent: str | None, acknowledged: Sequence[tuple[int, str | None]]
    ) -> None:
        for index, (served, received) in enumerate(acknowledged):
            if version not in (None, served) or received != sent:
                raise SyncError(
                    f"generator {index} acknowledged version {served} ({received}) after a sync "
                    f"to version {version} ({sent})"
                )
        if len(acknowledged) != len(self.reached):
            raise SyncError(f"{len(acknowledged)} of {len(self.reached)} generators took version {version}")

    async def compare(self) -> float:
        """Largest log-prob difference (nats) on the probe between any engine and the learner."""
        ids = self.probe.token_ids
        ask = self.learner.all(lambda rank, h: h.prompt_logprobs.remote(ids), deadline=self.deadline)
        ours = np.asarray((await ask)[0])
        theirs = await self.engines.all(
            lambda h: h.prompt_logprobs.remote(ids), deadline=self.deadline, what="scoring the probe text"
        )
        gaps = [float(np.abs(np.asarray(t) - ours).max()) for t in theirs]
        wrong = [i for i, gap in enumerate(gaps) if not gap <= self.probe.tolerance]
        if wrong:
            raise SyncError(
                f"generators {wrong} give other log-probs than the learner on the probe text: "
                f"{max(gaps):.4f} nats apart, {self.probe.tolerance:g} allowed (driver.probe.tolerance). "
                "Their weights differ, or their precision does"
            )
        return max(gaps, default=0.0)


def _gang_lost(version: int, error: Exception) -> InfrastructureError:
    """Ranks and engines stand in a broadcast that cannot be left: asking any of them would wait again."""
    said = str(error).strip().partition("\n")[0]
    return InfrastructureError(
        f"the weights of version {version} did not get through (generator.transfer=nccl): {said}. The "
        "learner is lost with them: go on from the last checkpoint with the same command and run.resume=auto"
    )
