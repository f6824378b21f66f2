"""Tokens -> how far the policy has moved from the one the step was scored under, or sampled from."""

import torch
from jaxtyping import Float
from torch import Tensor

from entroray.binding import LogRatioBound, declare
from entroray.objective.masking import row_mean
from entroray.ops import log_ratio
from entroray.types import Tokens


def token(t: Tokens) -> Float[Tensor, " N"]:
    """Each token's own ratio (PPO, arXiv 1707.06347); log-ratio held within 20 nats as in verl.

    `π / π_old per token`
    """
    return _moved(t).exp()


@declare(anchor="sampler")
def sampler(t: Tokens) -> Float[Tensor, " N"]:
    """Each token's ratio to the sampler itself, so that no correction may stand beside it (DPPO, SkyRL).

    `π / π_sampler per token`
    """
    return log_ratio(t.logprobs, t.behavior_logprobs).exp()


@declare(per_rollout=True, shares_gradient=True)
def sequence(t: Tokens) -> Float[Tensor, " N"]:
    """The rollout's geometric mean of ratios, on each of its tokens (GSPO, arXiv 2507.18071).

    `s = exp(mean_t log π / π_old) of the rollout`
    All tokens of a rollout share its gradient, so advantages must not differ inside it; verl holds the mean
    within 10 nats, here each log-ratio is within 20.
    """
    return row_mean(_moved(t), t)[t.row].exp()


@declare(per_rollout=True)
def sequence_token(t: Tokens) -> Float[Tensor, " N"]:
    """The rollout's mean ratio with each token's own gradient (GSPO-token, arXiv 2507.18071).

    `s = sg[exp(mean_t log π / π_old)] π / sg[π]`
    """
    moved = _moved(t)
    return row_mean(moved.detach(), t)[t.row].exp() * (t.logprobs - t.logprobs.detach()).exp()


@declare(per_rollout=True, shares_gradient=True, idle_at_one=True)
def clipped_geometric(
    t: Tokens, *, low: LogRatioBound = 0.4, high: LogRatioBound = 0.4
) -> Float[Tensor, " N"]:
    """Geometric mean of token ratios, each clipped first on the side A pushes to (GMPO, arXiv 2507.20673).

    `exp(mean_t of log π / π_old, at most high where A > 0, at least -low where A < 0)`
    Bounds are log-ratios in nats, unlike every other row's; verl's `geo_mean` averages over a micro-batch.
    """
    moved = _moved(t)
    held = torch.where(t.advantages > 0, moved.clamp(max=high), moved.clamp(min=-low))
    return row_mean(held, t)[t.row].exp()


def _moved(t: Tokens) -> Float[Tensor, " N"]:
    return log_ratio(t.logprobs, t.old_logprobs)
