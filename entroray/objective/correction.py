"""Tokens of the whole step -> detached weight that corrects for sampler and learner disagreeing.

It multiplies the surrogate, never the penalties; correct once, so a row has one. ρ = π_old / π_sampler. The
denominator keeps the tokens a weight of 0 drops. One that reads no more than old log-probs, row by row, is
made where the update knows them (`scoring.corrected`).
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from entroray.binding import RatioBound, declare
from entroray.objective.masking import row_mean
from entroray.ops import BOUND, log_ratio, segment_sum
from entroray.types import Tokens


@declare(reads=(), neutral=True)
def none(t: Tokens) -> Float[Tensor, " N"]:
    """Trust the sampler's log-probs to be the learner's.

    `1`
    """
    return torch.ones_like(t.old_logprobs)


@declare(reads=["old_logprobs"])
def truncated_importance(t: Tokens, *, cap: RatioBound = 2.0) -> Float[Tensor, " N"]:
    """Token-level truncated importance sampling (TIS; cap 2 as in verl and slime).

    `min(π_old / π_sampler, cap) per token`
    A ratio, not a log-ratio.
    """
    return _log_weight(t).exp().clamp(max=cap)


@declare(reads=["old_logprobs"])
def sequence_product(t: Tokens, *, cap: RatioBound = 2.0) -> Float[Tensor, " N"]:
    """The whole response's importance weight, truncated ("sequence" in verl and NeMo-RL).

    `min(Π_t π_old / π_sampler, cap) on every token of the rollout`
    """
    return segment_sum(_log_weight(t), t.row, len(t.length)).clamp(-BOUND, BOUND).exp().clamp(max=cap)[t.row]


@declare(reads=["old_logprobs"])
def sequence_geometric(t: Tokens, *, cap: RatioBound = 2.0) -> Float[Tensor, " N"]:
    """The response's mean importance weight, truncated ("sequence" in ms-swift).

    `min(exp(mean_t log(π_old / π_sampler)), cap) on every token of the rollout`
    """
    return row_mean(_log_weight(t), t).exp().clamp(max=cap)[t.row]


@declare(reads=["old_logprobs"])
def icepop(t: Tokens, *, low: RatioBound = 0.5, high: RatioBound = 5.0) -> Float[Tensor, " N"]:
    """Drop tokens on which sampler and learner disagree too much (IcePop; 0.5 and 5 as in slime, verl).

    `ρ = π_old / π_sampler where low <= ρ <= high, else 0`
    Bounds are ratios.
    """
    weight = _log_weight(t).exp()
    return weight.masked_fill((weight < low) | (weight > high), 0.0)


@declare(
    reads=["old_logprobs"],
    rollout_tolerance=lambda low, high: max(abs(math.log(low)), abs(math.log(high))),
)
def sequence_mask(t: Tokens, *, low: RatioBound = 0.999, high: RatioBound = 1.002) -> Float[Tensor, " N"]:
    """Drop responses on which sampler and learner disagree too much; ρ per token elsewhere (NeMo-RL).

    `ρ = π_old / π_sampler where low <= exp(mean_t log ρ) <= high, else 0`
    Bounds are ratios; TRL instead drops where the product of ρ is above 3.
    """
    mean = row_mean(_log_weight(t), t).exp()[t.row]
    return _log_weight(t).exp().masked_fill((mean < low) | (mean > high), 0.0)


def _log_weight(t: Tokens) -> Float[Tensor, " N"]:
    return log_ratio(t.old_logprobs, t.behavior_logprobs)
