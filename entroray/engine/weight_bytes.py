"""A model's weights as bytes and a manifest of them: what the transfer `plasma` sends, hashes and reads."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xxhash

from entroray.errors import SyncError


@dataclass(frozen=True)
class ParamMeta:
    """A parameter as vLLM's class of this name describes it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


Manifest = dict[str, list[Any]]
"""[data type, shape] of every parameter, in the order of their bytes."""
Payload = list[np.ndarray]
"""The bytes of every parameter."""


def describe_weights(weights: Iterable[ParamMeta]) -> Manifest:
    """The manifest of these parameters."""
    return {w.name: [str(w.dtype).removeprefix("torch."), list(w.shape)] for w in weights}


def check_manifest(received: Manifest, expected: Manifest) -> None:
    """SyncError naming parameters that are missing, unknown or of another shape or type."""
    names = received.keys() | expected.keys()
    if wrong := sorted(name for name in names if received.get(name) != expected.get(name)):
        raise SyncError(
            f"received weights are not the model's: {len(wrong)} parameters differ, first {wrong[:3]}: "
            f"expected {[expected.get(k) for k in wrong[:3]]}, got {[received.get(k) for k in wrong[:3]]}"
        )


def digest(payload: Payload) -> str:
    """Hash of weights as sent or received, one after another: against damage, not against malice."""
    found = xxhash.xxh3_128()
    for each in payload:
        found.update(each.data)
    return found.hexdigest()


def pack(weights: list[tuple[str, torch.Tensor]]) -> tuple[Manifest, Payload]:
    """The bytes of all weights, on the CPU; those that lie there already are not copied."""
    manifest = describe_weights(ParamMeta(name, t.dtype, tuple(t.shape)) for name, t in weights)
    return manifest, [t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy() for _, t in weights]


def void_weights(worker: Any) -> None:
    """NaN in place of what weights were dropped: one that no update brings makes no plausible tokens."""
    for weight in worker.get_model().parameters():
        weight.data.fill_(torch.nan if weight.is_floating_point() else 0)


def unpack(manifest: Manifest, payload: Payload) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights whose bytes these are, without a copy: they may be read, not written."""
    described = [(name, getattr(torch, dtype), shape) for name, (dtype, shape) in manifest.items()]
    sizes = [math.prod(shape) * dtype.itemsize for _, dtype, shape in described]
    if sizes != [each.nbytes for each in payload]:
        received = sum(each.nbytes for each in payload)
        raise SyncError(f"weights received hold {received} bytes, their manifest says {sum(sizes)}")
    for (name, dtype, shape), each in zip(described, payload, strict=True):
        yield name, torch.from_numpy(each).view(dtype).view(shape)
