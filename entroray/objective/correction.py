"""Tokens of the whole step -> detached weight that corrects for sampler and learner disagreeing.

It multiplies the surrogate, never the penalties; correct once, so a row has one.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from entroray.objective.bind import Positive
from entroray.objective.view import log_ratio
from entroray.types import Tokens


def none(t: Tokens) -> Float[Tensor, " N"]:
    """Trust the sampler's log-probs to be the learner's.

    `1`
    """
    return torch.ones_like(t.old_logprobs)


def truncated_importance(t: Tokens, *, cap: Positive = 2.0) -> Float[Tensor, " N"]:
    """Token-level truncated importance sampling (TIS; cap 2 as in verl and slime).

    `min(π_old / π_sampler, cap) per token`
    A ratio, not a log-ratio.
    """
    return log_ratio(t.old_logprobs, t.behavior_logprobs).exp().clamp(max=cap)
