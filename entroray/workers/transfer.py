"""Weights from learner to engines through vLLM's own weight-transfer API.

On GPUs the built-in `nccl` or `ipc` engines do it. Neither works on CPU, so `plasma` is registered here
by the same interface: rank 0 packs the weights into Ray's object store (shared memory on a node, a
transfer between nodes), every engine pulls, hashes and checks them while it still generates, then commits.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Self

import numpy as np
import ray
import torch
from torch import nn
from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    WeightSource,
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory

from entroray.errors import ConfigError, SyncError

BACKEND = "plasma"


@cache
def register() -> None:
    """Entry point `vllm.general_plugins`: runs in every process that vLLM starts."""
    WeightTransferEngineFactory.register_engine(BACKEND, __name__, "PlasmaEngine")
    WeightTransferTrainerFactory.register_engine(BACKEND, __name__, "PlasmaTrainer")


@dataclass(frozen=True)
class Manifest:
    """What a packed buffer holds, in order."""

    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]

    def check_against(self, other: "Manifest") -> None:
        """SyncError naming every parameter that is missing, unknown or of another shape or type."""
        mine, theirs = self._rows(), other._rows()
        if mine != theirs:
            wrong = sorted(k for k in mine.keys() | theirs.keys() if mine.get(k) != theirs.get(k))
            raise SyncError(
                f"received weights are not the model's: {len(wrong)} parameters differ, first {wrong[:3]}: "
                f"expected {[theirs.get(k) for k in wrong[:3]]}, got {[mine.get(k) for k in wrong[:3]]}"
            )

    def _rows(self) -> dict[str, tuple]:
        rows = zip(self.names, self.dtypes, self.shapes, strict=True)
        return {name: (dtype, tuple(shape)) for name, dtype, shape in rows}


def digest(payload: np.ndarray) -> str:
    """Hash of packed weights as received."""
    return hashlib.blake2b(payload.data, digest_size=16).hexdigest()


def pack(weights: list[tuple[str, torch.Tensor]]) -> tuple[Manifest, np.ndarray]:
    """One flat byte buffer of all weights, on the CPU."""
    manifest = Manifest(
        names=[name for name, _ in weights],
        dtypes=[str(t.dtype).removeprefix("torch.") for _, t in weights],
        shapes=[list(t.shape) for _, t in weights],
    )
    flat = [t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy() for _, t in weights]
    return manifest, np.concatenate(flat)


def unpack(manifest: Manifest, payload: np.ndarray) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of a packed buffer, copied out of it."""
    offset = 0
    for name, dtype_name, shape in zip(manifest.names, manifest.dtypes, manifest.shapes, strict=True):
        dtype = getattr(torch, dtype_name)
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        yield name, torch.from_numpy(payload[offset : offset + size].copy()).view(dtype).view(shape)
        offset += size
    if offset != len(payload):
        raise SyncError(f"weights received hold {len(payload)} bytes, their manifest says {offset}")


@dataclass
class PlasmaInit(WeightTransferInitInfo):
    """No rendezvous: the manifest of a whole model, against which every update is checked."""

    manifest: dict[str, Any]


@dataclass
class PlasmaUpdate(WeightTransferUpdateInfo):
    """One whole model: its manifest and its bytes."""

    manifest: dict[str, Any]
    payload: np.ndarray


class PlasmaEngine(WeightTransferEngine[PlasmaInit, PlasmaUpdate]):
    """Engine side: load a packed buffer by vLLM's layerwise reload (CPU linear weights are pre-packed)."""

    init_info_cls = PlasmaInit
    update_info_cls = PlasmaUpdate

    def init_transfer_engine(self, init_info: PlasmaInit) -> None:
        self.expected = Manifest(**init_info.manifest)

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # The base class waits for an accelerator here; the copy below is done when it returns.
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: PlasmaUpdate) -> None:
        manifest = Manifest(**update_info.manifest)
        manifest.check_against(self.expected)
        model: Any = self.model
        model.load_weights(unpack(manifest, update_info.payload))

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)
        self._refresh_tied_head()

    def _refresh_tied_head(self) -> None:
        """A tied head has nothing of its own to load, but on CPU keeps a packed copy of the old weights."""
        head: Any = getattr(self.model, "lm_head", None)
        tied = getattr(self.model_config.hf_text_config, "tie_word_embeddings", False)
        if tied and head is not None:
            head.quant_method.process_weights_after_loading(head)

    def shutdown(self) -> None:
        pass


@dataclass
class PlasmaTrainerInit(TrainerInitInfo):
    """Which learner rank this is; rank 0 sends."""

    backend: ClassVar[str] = BACKEND


class PlasmaTrainer(TrainerWeightTransferEngine[PlasmaTrainerInit]):
    """Learner side: all ranks gather, rank 0 packs, stages and commits."""

    init_info_cls = PlasmaTrainerInit

    @classmethod
    def trainer_init(
        cls, init_info: PlasmaTrainerInit, *, client: Any, source: WeightSource | None = None
    ) -> Self:
        if source is None:
            raise ValueError("plasma sends whole models: it needs a WeightSource")
        engine = cls(client=client, source=source, is_sender=init_info.is_sender)
        if engine.is_sender:
            metadata = source.metadata()
            manifest = Manifest(
                names=[m.name for m in metadata],
                dtypes=[str(m.dtype).removeprefix("torch.") for m in metadata],
                shapes=[list(m.shape) for m in metadata],
            )
            client.init_weight_transfer_engine({"manifest": vars(manifest)})
        return engine

    def send_weights(self) -> None:
        assert self.source is not None
        if not self.is_sender:
            for _ in self.source:  # gathering is collective: every rank takes part, one keeps
                pass
            return
        manifest, payload = pack(list(self.source))
        staged = ray.put(payload)
        self.client.stage(staged, digest(payload))  # type: ignore[attr-defined]
        self.client.start_weight_update()
        self.client.update_weights({"manifest": vars(manifest)})
        self.client.finish_weight_update()


class GatheredSource(WeightSource):
    """A module's parameters under Hugging Face names, whole on every rank whatever the ZeRO stage."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.tied = getattr(module.config, "tie_word_embeddings", False)

    def _named(self) -> list[tuple[str, nn.Parameter]]:
        named = self.module.named_parameters()  # a tied head is listed once, as the embedding
        return [(n, p) for n, p in named if not (self.tied and n == "lm_head.weight")]

    def metadata(self) -> list[ParamMeta]:
        shape = lambda p: tuple(getattr(p, "ds_shape", p.shape))
        return [ParamMeta(n, p.dtype, shape(p)) for n, p in self._named()]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters

        for name, parameter in self._named():
            with GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                yield name, parameter.detach().clone()


def connect(backend: str, *, rank: int, client: Any, module: nn.Module) -> TrainerWeightTransferEngine:
    """The learner's end of `backend` on this rank: plasma, or nccl and ipc (GPUs only; unproved here)."""
    register()
    source = GatheredSource(module)
    largest = max(math.prod(m.shape) * m.dtype.itemsize for m in source.metadata())
    return WeightTransferTrainerFactory.trainer_init(
        _init_info(backend, rank, client, largest), client=client, source=source
    )


def _init_info(backend: str, rank: int, client: Any, largest: int) -> TrainerInitInfo:
    """`largest` is the size of the largest parameter in bytes."""
    if backend == BACKEND:
        return PlasmaTrainerInit(rank=rank)
    if backend == "nccl":
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        host, port = client.rendezvous
        world = 1 + len(client.handles) * client.tensor_parallel
        return NCCLTrainerInitInfo(rank=rank, master_address=host, master_port=port, world_size=world)
    if backend == "ipc":
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

        # In one buffer after another, not in a second copy of the model; a parameter must fit into one.
        size = max(IPCTrainerInitInfo.packed_buffer_size_bytes, largest)
        return IPCTrainerInitInfo(rank=rank, packed=True, packed_buffer_size_bytes=size)
    raise ConfigError(f"generator.transfer={backend}: choose plasma, nccl or ipc")
