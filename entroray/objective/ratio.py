"""Tokens -> how far the policy has moved from the one the step was scored under."""

import torch
from jaxtyping import Float
from torch import Tensor

from entroray.objective.bind import Positive
from entroray.objective.view import log_ratio
from entroray.ops import segment_mean
from entroray.types import Tokens


def token(t: Tokens) -> Float[Tensor, " N"]:
    """Each token's own ratio (PPO, arXiv 1707.06347); log-ratio held within 20 nats as in verl.

    `π / π_old per token`
    """
    return log_ratio(t.logprobs, t.old_logprobs).exp()


def sequence(t: Tokens) -> Float[Tensor, " N"]:
    """One ratio a rollout, the geometric mean of its tokens' (GSPO, arXiv 2507.18071).

    `s = (Π π / π_old)^(1/L) of the rollout, gradient s per token`
    Their token form, sg[s] π / sg[π]: the same as plain GSPO where a rollout has one advantage.
    """
    x = log_ratio(t.logprobs, t.old_logprobs)
    return _rollout_mean(x, t).exp().detach() * torch.exp(x - x.detach())


def clipped_geometric(t: Tokens, *, bound: Positive = 0.4) -> Float[Tensor, " N"]:
    """The geometric mean of a rollout's ratios, each clipped on the side its advantage pushes to (GMPO).

    `(Π min(π / π_old, e^bound))^(1/L) where A > 0; at least e^-bound each where A < 0`
    arXiv 2507.20673; `bound` is of the log-ratio, in nats. verl takes the mean over a micro-batch.
    """
    x = log_ratio(t.logprobs, t.old_logprobs)
    held = torch.where(t.advantages > 0, x.clamp(max=bound), x.clamp(min=-bound))
    return _rollout_mean(held, t).exp()


def _rollout_mean(x: Float[Tensor, " N"], t: Tokens) -> Float[Tensor, " N"]:
    return segment_mean(x, t.row, torch.ones_like(t.row, dtype=torch.bool), len(t.length))[t.row]
