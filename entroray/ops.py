"""Segment arithmetic on the flat token axis, and its floor; knows nothing of RL beyond a mask."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

FLOOR = -1e4
"""Log-prob that stands for -inf, in nats; no gradient passes below it."""


def segment_sum(x: Float[Tensor, " N"], row: Int[Tensor, " N"], num_rows: int) -> Float[Tensor, " B"]:
    """Sum of each row's tokens; 0 for a row with none."""
    return torch.zeros(num_rows, dtype=x.dtype, device=x.device).index_add(0, row, x)


def masked(x: Float[Tensor, " N"], mask: Bool[Tensor, " N"]) -> Float[Tensor, " N"]:
    """`x` where `mask`, else 0; whatever stands outside the mask, NaN included, leaves no trace."""
    return torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device))


def segment_mean(
    x: Float[Tensor, " N"], row: Int[Tensor, " N"], mask: Bool[Tensor, " N"], num_rows: int
) -> Float[Tensor, " B"]:
    """Mean over each row's masked-in tokens; 0 for a row with none."""
    count = segment_sum(mask.to(x.dtype), row, num_rows)
    return segment_sum(masked(x, mask), row, num_rows) / count.clamp(min=1)
