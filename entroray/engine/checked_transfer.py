"""What vLLM's transfers `nccl` and `ipc` lack on an engine: sums of what arrived, an end of every wait."""

import copy
import math
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from entroray.engine.communicator import Communicator, meet
from entroray.engine.interfaces import check_interface
from entroray.engine.weight_bytes import Sums, checksum, read_sums
from entroray.errors import EntrorayError, InfrastructureError
from entroray.planning.deadlines import transfer_deadline

CHECKED = ("nccl", "ipc")


def check_transfers(worker: Any) -> None:
    """Have the worker of an engine check what it receives; `plasma` hashes and needs none of it."""
    worker = getattr(worker, "worker", worker)  # vLLM's wrapper reads through, and does not write
    config = worker.vllm_config.weight_transfer_config
    if config is not None and config.backend in CHECKED:
        worker.weight_transfer_engine = CheckedEngine(worker.weight_transfer_engine)


def check_workers(llm: Any) -> None:
    """Raise what the last meeting or loading of a worker failed by."""
    for error in (error for errors in llm.collective_rpc(failures) for error in errors):
        raise error


def failures(worker: Any) -> list[EntrorayError]:
    """None or one, in a list: vLLM takes an error that is an answer for one that was raised."""
    error = getattr(worker.weight_transfer_engine, "error", None)
    return [] if error is None else [error]


def received(worker: Any) -> Sums | None:
    """Sums of the weights that a worker loaded in its last update; None where they are not summed."""
    sums = getattr(worker.weight_transfer_engine, "sums", None)
    return None if sums is None else read_sums(sums)


def agreed(shards: Sequence[Sums | None]) -> Sums | None:
    """Sums of an engine, each shard of which receives whole weights; None where shards differ."""
    first, *others = shards
    if first is None:
        return None
    return {
        name: value if all(o and o.get(name) == value for o in others) else None
        for name, value in first.items()
    }


class CheckedEngine:
    """vLLM's receiving engine, as its worker calls it. It keeps the `error` that others would raise.

    Of workers that raise vLLM reads answers up to the first error, and the answers that are left as those to
    its next call: an engine of several cards would be lost to one failure.
    """

    def __init__(self, engine: Any):
        self.engine = engine
        self.error: EntrorayError | None = None
        self.sums: dict[str, torch.Tensor] = {}
        """Of the update under way, or the last."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def init_transfer_engine(self, init_info: Any) -> None:
        """Meet the learner; `error` is InfrastructureError if that takes too long."""
        fresh = copy.copy(self.engine)  # one that comes too late is nobody's
        with self._kept():
            if hasattr(fresh, "model_update_group"):
                check_interface("nccl")
            meet(lambda: fresh.init_transfer_engine(init_info))
            if getattr(fresh, "model_update_group", None) is not None:
                fresh.model_update_group = Communicator(fresh.model_update_group)
            self.engine = fresh

    def start_weight_update(self) -> None:
        self.sums = {}
        self.engine.start_weight_update()

    def update_weights(self, update_info: Mapping[str, Any]) -> None:
        """Load what the learner sends; `error` is InfrastructureError if it comes no further."""
        with self._kept(), self._bounded(update_info), self._summing():
            self.engine.update_weights(update_info)

    @contextmanager
    def _kept(self) -> Iterator[None]:
        self.error = None
        try:
            yield
        except EntrorayError as error:
            self.error = error
        except Exception as error:  # boundary: of torch, NCCL and the model
            traceback.print_exc()
            self.error = InfrastructureError(repr(error))

    def _bounded(self, info: Mapping[str, Any]) -> AbstractContextManager[None]:
        group = getattr(self.engine, "model_update_group", None)
        if group is None:
            return nullcontext()
        sizes = (getattr(torch, dtype).itemsize * math.prod(shape) for dtype, shape in _declared(info))
        return group.bounded(transfer_deadline(sum(sizes)))

    @contextmanager
    def _summing(self) -> Iterator[None]:
        engine, model = self.engine, self.engine.model
        engine.model = _Summing(model, self.sums)
        try:
            yield
        finally:
            engine.model = model


def _declared(info: Mapping[str, Any]) -> Iterable[tuple[str, Sequence[int]]]:
    return zip(info["dtype_names"], info["shapes"], strict=True)


class _Summing:
    """A model that sums what it is given to load."""

    def __init__(self, model: Any, sums: dict[str, torch.Tensor]):
        self.model, self.sums = model, sums

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Any:
        given = list(weights)
        self.sums.update((name, checksum(tensor)) for name, tensor in given)
        return self.model.load_weights(given)
