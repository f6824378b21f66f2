"""What a row's functions are shown of `Tokens`, and the little arithmetic several slots share."""

from dataclasses import fields, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from entroray.ops import FLOOR
from entroray.types import PER_ROW, Counts, Tokens

BOUND = 20.0
"""Largest log-ratio in nats before `exp`, as in verl; no gradient passes beyond it."""


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
    """Undo `visible` for one column: 0 or False outside the mask."""
    return torch.zeros(mask.shape, dtype=x.dtype, device=x.device).masked_scatter(mask, x)


def count_tokens(t: Tokens) -> Counts:
    """What an update of these rows averages over; a row or prompt counts even if its mask is empty."""
    return Counts(
        tokens=int(t.mask.sum()),
        kept_tokens=int((t.mask & (t.scale != 0)).sum()),
        rollouts=len(t.group),
        prompts=len(t.group.unique()),
    )


def covariance(t: Tokens) -> Float[Tensor, " N"]:
    """(log π - mean)(A - mean) of each token, means over all: the proxy of arXiv 2505.22617, in nats.

    Across positions and rollouts, not within one state, so it ranks tokens and forecasts nothing.
    """
    if not len(t.logprobs):
        return torch.zeros_like(t.logprobs)
    return (t.logprobs - t.logprobs.mean()) * (t.advantages - t.advantages.mean())


def log_ratio(above: Float[Tensor, " N"], below: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Difference of two log-probs in nats, within `BOUND`, so that `exp` of it stays finite."""
    return (above - below).clamp(-BOUND, BOUND)


def discriminator(t: Tokens) -> Float[Tensor, " N"]:
    """D = π (log π + H) of each token, in nats: its sign says which way reinforcing it moves the entropy.

    The first-order change is -η A (D - E_p D) (arXiv 2602.03392, 2602.09782).
    """
    return t.logprobs.exp() * (t.logprobs + t.entropy)
