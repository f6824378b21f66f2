"""Weights from learner to engines through vLLM's own weight-transfer API.

On GPUs the built-in `nccl` or `ipc` engines do it; both sides sum every tensor that passes, and NCCL is left
where an engine fails (`engine/checked_transfer.py` has the engine's side). Neither works on CPU, so `plasma`
is registered here by the same interface (`engine/plasma_engine.py` is vLLM's end): rank 0 puts the weights
into Ray's object store (shared memory on a node, a transfer between nodes), every engine on a node reads that
one copy, hashes and checks it while it still generates, then loads from it in one pause. A learner with
`plasma` does not import vLLM, which takes seconds.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import ray
import torch
from torch import nn

from entroray.engine.adapter import ADAPTER
from entroray.engine.communicator import ENTER, START, Communicator, fail, meet
from entroray.engine.weight_bytes import ParamMeta, checksum, describe_weights, digest, pack, read_sums
from entroray.errors import ConfigError, PreflightError, first_line
from entroray.planning.deadlines import transfer_deadline
from entroray.planning.memory import PACKED
from entroray.workers.in_step import InStep
from entroray.workers.weight_sender import GeneratorClient

BACKEND = "plasma"
Rendezvous = Callable[[], tuple[str, int]]


@cache
def register() -> None:
    """Entry point `vllm.general_plugins`: runs in every process that vLLM starts."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    from entroray.engine import cpu_engine

    WeightTransferEngineFactory.register_engine(BACKEND, "entroray.engine.plasma_engine", "PlasmaEngine")
    cpu_engine.register()


class PlasmaTrainer:
    """Learner side: all ranks gather, rank 0 packs, stages and commits."""

    def __init__(self, rank: int, client: GeneratorClient, source: "GatheredSource", info: Mapping[str, Any]):
        """`info` is what engines must know besides the manifest."""
        self.is_sender, self.client, self.source = rank == 0, client, source
        if self.is_sender:
            client.init_weight_transfer_engine({"manifest": describe_weights(source.metadata()), **info})

    def send_weights(self) -> None:
        if not self.is_sender:
            for _ in self.source:  # gathering is collective: every rank takes part, one keeps
                pass
            return
        manifest, payload = pack(list(self.source))
        with ThreadPoolExecutor(1) as beside:
            hashed = beside.submit(digest, payload)
            staged = ray.put(payload)
            self.client.stage(staged, hashed.result(timeout=self.client.deadline))
        self.client.replace_weights({"manifest": manifest})

    def shutdown(self) -> None:
        pass


class GatheredSource:
    """The learner's parameters by name, which its backend makes whole one by one, on all ranks together."""

    def __init__(self, named: Sequence[tuple[str, nn.Parameter]], backend: Any):
        self.named, self.backend = named, backend

    def metadata(self) -> list[Any]:
        return [ParamMeta(name, p.dtype, self.backend.full_shape(p)) for name, p in self.named]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, self.backend.gather(p)) for name, p in self.named)


class CheckedSource(GatheredSource):
    """That sums what passes, and whose passes end on every rank, since ranks gather together."""

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        self.sums: dict[str, torch.Tensor] = {}
        self.left = self._summed(super().__iter__())
        return self.left

    def _summed(self, pairs: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in pairs:
            self.sums[name] = checksum(tensor)
            yield name, tensor

    @contextmanager
    def one_pass(self) -> Iterator[None]:
        """What a failure inside leaves ungathered is gathered all the same: other ranks are at it."""
        self.left = iter(self)
        try:
            yield
        finally:
            for _ in self.left:
                pass


def connect(
    backend: str,
    *,
    rank: int,
    client: GeneratorClient,
    source: GatheredSource,
    rendezvous: Rendezvous,
    adapter: Mapping[str, Any],
) -> Any:
    """The learner's end of transfer `backend` on this rank: plasma, or nccl and ipc (GPUs only).

    `rendezvous` gives an address and port of rank 0, where an NCCL group of it and all engines may meet.
    `adapter` is what peft's files say of an adapter that is sent in place of weights, as plasma sends these.
    """
    if backend in (BACKEND, ADAPTER):
        return PlasmaTrainer(rank, client, source, {"config": adapter} if backend == ADAPTER else {})
    from vllm.distributed.weight_transfer.base import WeightSource
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

    whole = type("VLLMSource", (CheckedSource, WeightSource), {})(source.named, source.backend)
    sizes = [math.prod(m.shape) * m.dtype.itemsize for m in source.metadata()]
    client.size = sum(sizes)
    if backend == "nccl":
        client.limits = {"initialising": START, "loading": transfer_deadline(client.size)}
    asked = _init_info(backend, rank, client, max(sizes), rendezvous)
    met: Future[Any] = Future()
    client.interrupt = partial(fail, met)
    caller = InStep(client) if backend == "ipc" else client
    form = lambda: WeightTransferTrainerFactory.trainer_init(asked, client=caller, source=whole)
    trainer = meet(form, START + ENTER, met)
    client.interrupt = None
    if (group := getattr(trainer, "model_update_group", None)) is not None:
        trainer.model_update_group = held = Communicator(group)
        client.interrupt = lambda error: held.dismiss(first_line(error))
    send = trainer.send_weights

    def send_summed() -> None:
        with whole.one_pass():
            try:
                send()
            except Exception as error:  # boundary: engines that are well would wait for the rest
                if client.interrupt is not None:
                    client.interrupt(error)
                raise
        client.digest = read_sums(whole.sums)

    trainer.send_weights = send_summed
    return trainer


def _init_info(backend: str, rank: int, client: GeneratorClient, largest: int, rendezvous: Rendezvous) -> Any:
    """`largest` is the size of the largest parameter in bytes."""
    if backend == "nccl":
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        host, port = rendezvous()
        if ":" in host:
            raise PreflightError(
                f"generator.transfer=nccl: vLLM meets at IPv4 addresses, and this node is {host} to Ray: "
                "start Ray with --node-ip-address=<its IPv4 address>"
            )
        world = 1 + len(client.handles) * client.tensor_parallel
        # Two buffers of this size are outside vLLM's budget; a larger parameter is sent all the same.
        return NCCLTrainerInitInfo(
            rank=rank,
            master_address=host,
            master_port=port,
            world_size=world,
            packed_buffer_size_bytes=PACKED,
        )
    if backend == "ipc":
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

        # In one buffer after another, not in a second copy of the model; a parameter must fit into one.
        size = max(IPCTrainerInitInfo.packed_buffer_size_bytes, largest)
        return IPCTrainerInitInfo(rank=rank, packed=True, packed_buffer_size_bytes=size)
    raise ConfigError(f"generator.transfer={backend}: choose plasma, nccl, ipc or adapter")
