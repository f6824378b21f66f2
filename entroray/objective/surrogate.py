"""Tokens and ratio r -> loss per token; its gradient is a detached coefficient times that of log π."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from entroray.objective.bind import AboveOne, Fraction, NonNegative, Positive
from entroray.types import Tokens


def clip(
    t: Tokens,
    ratio: Float[Tensor, " N"],
    *,
    low: Fraction = 0.2,
    high: Positive = 0.2,
    dual: AboveOne | None = None,
) -> Float[Tensor, " N"]:
    """PPO's pessimistic clip (arXiv 1707.06347); high > low is clip-higher (DAPO, arXiv 2503.14476).

    `-min(r A, clip(r, 1 - low, 1 + high) A); where A < 0 at most dual |A|`
    `low` and `high` are distances of the ratio from 1; `dual` (arXiv 1912.09729) is a ratio, null is off
    (verl: 3, DAPO's script: 10).
    """
    a = t.advantages
    loss = -torch.minimum(ratio * a, ratio.clamp(1 - low, 1 + high) * a)
    return loss if dual is None else torch.where(a < 0, torch.minimum(loss, -dual * a), loss)


def cispo(
    t: Tokens,
    ratio: Float[Tensor, " N"],
    *,
    cap: Positive = 5.0,
    cap_mode: Literal["absolute", "one_plus_eps"] = "absolute",
    floor: NonNegative | None = None,
) -> Float[Tensor, " N"]:
    """Clip the weight, never the gradient (CISPO, MiniMax-M1, arXiv 2506.13585).

    `-sg[min(r, cap)] A log π; r at least floor; bounds read as cap_mode`
    `absolute`: bounds are ratios (TRL, ms-swift; 5 in ScaleRL's recipe). `one_plus_eps`: distances from 1,
    so r is held in [1 - floor, 1 + cap] (verl, slime). The paper publishes no value and runs without a
    floor; verl's default one of 0.8 is off here.
    """
    relative = cap_mode == "one_plus_eps"
    top = 1 + cap if relative else cap
    bottom = None if floor is None else 1 - floor if relative else floor
    return -ratio.detach().clamp(bottom, top) * t.advantages * t.logprobs


def reinforce(t: Tokens, ratio: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """The policy gradient, importance-weighted and unclipped: REINFORCE wherever r = 1 (Williams 1992).

    `-r A`
    """
    return -ratio * t.advantages


def likelihood(t: Tokens, ratio: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Weighted log-likelihood, blind to the ratio: supervised learning at A = 1 (and verl's `gpg`).

    `-A log π`
    """
    return -t.advantages * t.logprobs
