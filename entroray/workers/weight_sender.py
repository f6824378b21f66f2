"""The learner's weights on their way to generators, through vLLM's weight-transfer API."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from entroray.config import GeneratorConfig
from entroray.engine.communicator import LOOK_AT, START
from entroray.engine.served_version import stamp_version, version_of
from entroray.engine.weight_bytes import Digest
from entroray.errors import InfrastructureError, SyncError
from entroray.planning.deadlines import transfer_deadline
from entroray.workers.cluster import Gang, wait


@dataclass(frozen=True)
class Delivery:
    """What learner rank 0 sent, and what arrived."""

    version: int
    digest: Digest
    """Of what was sent."""
    acknowledged: tuple[tuple[int, Digest], ...]
    """Version served and digest of what was received, of each engine."""
    size: int = 0
    """Bytes, where that is known."""

    def verify(self, engines: int) -> None:
        """SyncError unless `engines` engines serve what was sent."""
        for index, (version, digest) in enumerate(self.acknowledged):
            if (version, digest) != (self.version, self.digest):
                raise SyncError(
                    f"generator {index} acknowledged version {version} after a sync to version "
                    f"{self.version}: {_difference(self.digest, digest)}"
                )
        if len(self.acknowledged) != engines:
            raise SyncError(f"{len(self.acknowledged)} of {engines} generators took version {self.version}")


def _difference(sent: Digest, received: Digest) -> str:
    if not (isinstance(sent, Mapping) and isinstance(received, Mapping)):
        return f"it received {received}, and {sent} was sent"
    names = [*sent, *(received.keys() - sent.keys())]
    wrong = [name for name in names if sent.get(name, "nothing") != received.get(name, "nothing")]
    return f"{len(wrong)} of {len(sent)} tensors are not those that were sent, first {', '.join(wrong[:3])}"


@dataclass
class GeneratorClient:
    """vLLM's `VLLMWeightSyncClient` over generator actors: every call reaches all, within a deadline.

    Lives on learner rank 0, where the transfer engine of `generator.transfer` makes the calls.
    """

    handles: Sequence[Any]
    tensor_parallel: int
    deadline: float
    keep_kv: bool
    version: int = field(default=0, init=False)
    digest: Digest = field(default=None, init=False)
    acknowledged: tuple[tuple[int, Digest], ...] = field(default=(), init=False)
    size: int = field(default=0, init=False)
    limits: Mapping[str, float] = field(default_factory=dict, init=False)
    """Deadlines of actions that have their own."""
    interrupt: Callable[[BaseException], object] | None = field(default=None, init=False)
    """Ends the wait of the thread that meets the engines in a collective, once their call has failed."""

    def deliver(self, version: int, send_weights: Callable[[], None]) -> Delivery:
        """Have the transfer engine's `send_weights`, which takes and returns nothing, send `version`."""
        self.version, self.digest, self.acknowledged = version, None, ()
        send_weights()
        return Delivery(version, self.digest, self.acknowledged, self.size)

    def init_weight_transfer_engine(self, init_info: Mapping[str, Any]) -> None:
        calls = [h.init_weight_transfer_engine.remote(i) for h, i in self._ranked(init_info)]
        self._all_met(calls, "initialising")

    def stage(self, payload: Any, digest: str) -> None:
        """Every engine pulls `payload` (an ObjectRef) and hashes it while it still generates."""
        received = self._all([h.stage.remote(payload) for h in self.handles], "staging")
        wrong = [i for i, r in enumerate(received) if r != digest]
        if wrong:
            raise SyncError(f"weights of version {self.version} arrived damaged at generators {wrong}")
        self.digest = digest

    def replace_weights(self, update_info: Any) -> None:
        """The three calls below in one, so that engines rest no longer than they load what is staged."""
        calls = [h.replace_weights.remote(update_info, self.version, self._keeps_kv()) for h in self.handles]
        self.acknowledged = tuple(tuple(a) for a in self._all(calls, "replacing"))

    def start_weight_update(self) -> None:
        self._all([h.start_weight_update.remote() for h in self.handles], "pausing")

    def update_weights(self, update_info: Any) -> None:
        self._all_met([h.update_weights.remote(update_info) for h in self.handles], "loading")

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        calls = [h.finish_weight_update.remote(self.version, self._keeps_kv()) for h in self.handles]
        self.acknowledged = tuple(tuple(a) for a in self._all(calls, "committing"))

    def _keeps_kv(self) -> bool:
        return self.keep_kv and version_of(self.version) > 0  # 0 begins a run: what is cached is another's

    def _ranked(self, info: Mapping[str, Any]) -> list[tuple[Any, dict[str, Any]]]:
        """Each engine's ranks follow those of the one before it in an NCCL group."""
        offset = lambda i: {"rank_offset": 1 + i * self.tensor_parallel}
        ranked = "rank_offset" in info
        return [(h, {**info, **(offset(i) if ranked else {})}) for i, h in enumerate(self.handles)]

    def _all(self, calls: Sequence[Any], action: str) -> list[Any]:
        limit = self.limits.get(action, self.deadline)
        return wait(calls, deadline=limit, what=f"{action} weights of version {self.version}")

    def _all_met(self, calls: Sequence[Any], action: str) -> list[Any]:
        try:
            return self._all(calls, action)
        except Exception as error:  # boundary: who meets them in a collective would wait for ever
            late = action in self.limits and isinstance(error.__cause__, TimeoutError)
            told = InfrastructureError(f"{error}: {LOOK_AT}") if late else error
            if self.interrupt is not None:
                self.interrupt(told)
            raise told from error.__cause__


class WeightSender:
    """Has the learner send its weights to engines, and verifies that each of them took the same ones."""

    def __init__(self, learner: Gang, generator: GeneratorConfig, deadline: float):
        self.learner, self.generator, self.deadline = learner, generator, deadline
        self.attempt = 0
        """Of the run: how often its learner was started anew."""
        self.connected: list[Any] = []
        """The engines that the learner has a client for."""
        self.size = 0
        """Bytes of the weights last sent, where known."""

    @property
    def silence(self) -> float:
        """Seconds in which a sync may keep an engine's thread in NCCL."""
        return max(START, transfer_deadline(self.size)) if self.generator.transfer == "nccl" else 0.0

    @property
    def longest(self) -> float:
        """Seconds that a turn of an engine may take in a sync; in the first, of unknown size, `deadline`."""
        return max(START, transfer_deadline(self.size)) if self.size else self.deadline

    async def send(self, handles: list[Any], version: int | None = None) -> bool:
        """Send the weights as `version`; SyncError if an engine took something else.

        Without `version`, send those last sent once more; False if the learner has updated them since.
        """
        g = self.generator
        if handles != self.connected:
            self.connected = []
            client = GeneratorClient(handles, g.tensor_parallel, self.deadline, bool(g.keep_kv))
            await self.learner.all(lambda rank, h: h.connect.remote(client), deadline=self.deadline)
        self.connected = [] if g.transfer == "nccl" else handles  # a group that is left is not met again
        stamp = None if version is None else stamp_version(self.attempt, version)
        deliveries = await self.learner.all(lambda rank, h: h.sync.remote(stamp), deadline=self.deadline)
        self.connected = handles
        if deliveries[0] is None:
            return False
        self.size = deliveries[0].size
        deliveries[0].verify(len(handles))
        return True

    def disconnect(self) -> None:
        """Connect anew before the next send: the learner was rebuilt."""
        self.connected = []
