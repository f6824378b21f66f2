"""What a row's functions are shown of `Tokens`: the tokens inside the mask alone; and how many those are."""

from dataclasses import fields, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from entroray.ops import FLOOR, segment_mean
from entroray.types import PER_ROW, Counts, Tokens


def masked_in(t: Tokens) -> Tokens:
    """The masked-in tokens alone: what stands outside the mask cannot leave a trace, NaN included.

    Of its fields only `row` tells which rollout a token is of: `length` stays that of the whole response.
    """
    index = t.mask.nonzero().squeeze(-1)
    cut: dict = {"extra": {k: v.index_select(0, index) for k, v in t.extra.items()}}
    for f in fields(t):
        value = getattr(t, f.name)
        if isinstance(value, Tensor) and f.name not in PER_ROW:
            value = value.index_select(0, index)
            cut[f.name] = value.clamp(min=FLOOR) if f.name.endswith("logprobs") else value
    return replace(t, **cut)


def scatter_masked(x: Tensor, mask: Bool[Tensor, " N"]) -> Tensor:
    """Undo `masked_in` for one column: 0 or False outside the mask."""
    return torch.zeros(mask.shape, dtype=x.dtype, device=x.device).masked_scatter(mask, x)


def row_mean(x: Float[Tensor, " N"], t: Tokens) -> Float[Tensor, " B"]:
    """Mean of a column over each row's shown tokens."""
    return segment_mean(x, t.row, t.mask, len(t.length))


def count_tokens(t: Tokens) -> Counts:
    """What an update of these rows averages over; a row or prompt counts even if its mask is empty."""
    return Counts(
        tokens=int(t.mask.sum()),
        kept_tokens=int((t.mask & (t.scale != 0)).sum()),
        rollouts=len(t.group),
        prompts=len(t.group.unique()),
    )
