"""A model's weights as bytes and a manifest of them: what the transfer `plasma` sends, hashes and reads."""

import math
from collections.abc import Iterable, Iterator, Mapping
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
Sums = dict[str, int | None]
"""`checksum` of every parameter; None: there is no one value."""
Digest = str | Sums | None
"""Of weights as sent or received: a hash of all, or sums; None: nothing is known of them."""
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ROW = 4096
"""Words of a tensor that are summed by their place in a row."""


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


def checksum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum of a tensor's words, each by its place, modulo 2^64: exact, in whatever order it is added up.

    A scalar where the tensor lies, which nothing waits for; the tensor is read twice, and not copied.
    """
    words = tensor.detach().contiguous().view(-1).view(_WORDS[tensor.element_size()])
    whole = len(words) // _ROW * _ROW
    rows, rest = words[:whole].view(-1, _ROW), words[whole:].long()
    by_column, by_row = rows.sum(0, dtype=torch.int64), rows.sum(1, dtype=torch.int64)
    return _weighed(by_column, 1) + _weighed(by_row, 1_000_003) + _weighed(rest, 7_368_787)


def _weighed(sums: torch.Tensor, factor: int) -> torch.Tensor:
    places = torch.arange(1, len(sums) + 1, device=sums.device)
    return (sums * places).sum() * factor


def read_sums(sums: Mapping[str, torch.Tensor]) -> Sums:
    """Values of `checksum`, read off the card at once."""
    values = torch.stack([*sums.values()]).tolist() if sums else []
    return dict(zip(sums, values, strict=True))
