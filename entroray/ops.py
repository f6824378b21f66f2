"""Arithmetic on the flat token axis: segments of it, and what several formulas take of each token."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

FLOOR = -1e4
"""Log-prob that stands for -inf, in nats; no gradient passes below it."""
BOUND = 20.0
"""Largest log-ratio in nats before `exp`, as in verl; no gradient passes beyond it."""


def as_count(product: float, rounded: Callable[[float], int]) -> int:
    """`product` by math.floor or math.ceil; one within a rounding error of a whole number is that number.

    0.29 x 100 is 28.999999999999996 in floats, and 29 here.
    """
    nearest = round(product)
    return nearest if math.isclose(product, nearest, rel_tol=1e-12) else rounded(product)


def token_places(lengths: NDArray, pieces: Sequence[NDArray]) -> list[NDArray[np.int64]]:
    """Places on the flat axis of the tokens of each piece, a choice of rows, where row r has `lengths[r]`."""
    rows = np.concatenate([np.empty(0, np.int64), *pieces])
    own, starts = lengths[rows].astype(np.int64), np.cumsum(lengths, dtype=np.int64) - lengths
    ends = np.cumsum(own)
    places = np.arange(own.sum()) + np.repeat(starts[rows] - (ends - own), own)
    edges = np.concatenate([[0], ends])[np.cumsum([len(piece) for piece in pieces], dtype=np.int64)]
    return np.split(places, edges[:-1])[: len(pieces)]


def segment_sum(x: Float[Tensor, " N"], row: Int[Tensor, " N"], num_rows: int) -> Float[Tensor, " B"]:
    """Sum of each row's tokens; 0 for a row with none."""
    return torch.zeros(num_rows, dtype=x.dtype, device=x.device).index_add(0, row, x)


def segment_mean(
    x: Float[Tensor, " N"], row: Int[Tensor, " N"], mask: Bool[Tensor, " N"], num_rows: int
) -> Float[Tensor, " B"]:
    """Mean over each row's masked-in tokens; 0 for a row with none. NaN outside the mask leaves no trace."""
    count = segment_sum(mask.to(x.dtype), row, num_rows)
    return segment_sum(x.masked_fill(~mask, 0), row, num_rows) / count.clamp(min=1)


def log_ratio(above: Float[Tensor, " N"], below: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Difference of two log-probs in nats, within `BOUND`, so that `exp` of it stays finite."""
    return (above - below).clamp(-BOUND, BOUND)


def covariance(logprobs: Float[Tensor, " N"], advantages: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """(log π - mean)(A - mean) of each token, means over all: the proxy of arXiv 2505.22617, in nats.

    Across positions and rollouts, not within one state, so it ranks tokens and forecasts nothing.
    """
    if not len(logprobs):
        return torch.zeros_like(logprobs)
    return (logprobs - logprobs.mean()) * (advantages - advantages.mean())


def discriminator(logprobs: Float[Tensor, " N"], entropy: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """D = π (log π + H) of each token, in nats: its sign says which way reinforcing it moves the entropy.

    The first-order change is -η A (D - E_p D) (arXiv 2602.03392, 2602.09782).
    """
    return logprobs.exp() * (logprobs + entropy)


def fill_columns(
    *,
    logprobs: Float[Tensor, " N"],
    old_logprobs: Float[Tensor, " N"],
    entropy: Float[Tensor, " N"],
    lengths: Sequence[int],
    advantages: Sequence[float],
    groups: Sequence[int] | None = None,
    **others: Any,
) -> dict[str, Any]:
    """Every field of `Tokens` but its counts, for rows of `lengths` tokens, one behind the other.

    One advantage a row; log-probs and entropy in nats. Without `groups`, which says of what prompt each row
    is, each is of its own. Unless `others` gives the field: every token is trained on, and was drawn by the
    old policy at temperature 1; what nobody knows is NaN.
    """
    length = torch.tensor(lengths)
    row = torch.repeat_interleave(torch.arange(len(lengths)), length)
    one, unknown = torch.ones_like(old_logprobs), old_logprobs.new_full((len(lengths),), torch.nan)
    columns: dict[str, Any] = {
        "row": row,
        "position": torch.arange(len(row)) - (length.cumsum(0) - length)[row],
        "uid": torch.arange(len(row)),
        "mask": one.bool(),
        "logprobs": logprobs,
        "entropy": entropy,
        "varentropy": one * torch.nan,
        "old_logprobs": old_logprobs,
        "behavior_logprobs": old_logprobs,
        "ref_logprobs": None,
        "temperature": one,
        "advantages": one.new_tensor(advantages)[row],
        "scale": one,
        "correction": one,
        "selected": one.bool(),
        "group": torch.arange(len(lengths)) if groups is None else torch.tensor(groups),
        "length": length,
        "reward": unknown,
        "correct": unknown,
        "version": torch.zeros_like(length),
        "step": 1,
    }
    return columns | others


def cut_columns(
    columns: Mapping[str, Any], per_row: Set[str], pieces: Sequence[NDArray[np.int64]]
) -> Iterator[dict[str, Any]]:
    """For each piece, a choice of rows, the tensors of `columns` and of its `extra` there, re-indexed."""
    named = {name: x for name, x in columns.items() if isinstance(x, Tensor)}
    for rows, places in zip(pieces, token_places(columns["length"].numpy(), pieces), strict=True):
        row, token = torch.from_numpy(rows), torch.from_numpy(places)
        cut: dict[str, Any] = {n: x.index_select(0, row if n in per_row else token) for n, x in named.items()}
        cut["extra"] = {name: x.index_select(0, token) for name, x in columns["extra"].items()}
        yield cut | {"row": torch.arange(len(rows)).repeat_interleave(cut["length"])}
