"""Tokens and ratio r -> loss per token; its gradient is a detached coefficient times that of log π."""

from dataclasses import replace
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


def clip_with_entropy(
    t: Tokens,
    ratio: Float[Tensor, " N"],
    *,
    low: Fraction = 0.2,
    high: Positive = 0.28,
    alpha: NonNegative = 0.4,
    kappa: AboveOne = 2.0,
) -> Float[Tensor, " N"]:
    """PPO's clip of advantages raised where the policy hesitates now (arXiv 2506.14758).

    `-min(r A', clip(r, 1 - low, 1 + high) A'), A' = A + min(alpha H, |A| / kappa), H in nats, detached`
    Weakens punishment as it strengthens praise; above 1, `kappa` keeps the sign of A. alpha 0.4 is for GRPO,
    0.1 for PPO. There is no code of the authors'; a reimplementation uses kappa 1.
    """
    raised = t.advantages + torch.minimum(alpha * t.entropy.detach(), t.advantages.abs() / kappa)
    return clip(replace(t, advantages=raised), ratio, low=low, high=high)


def gradient_preserving(
    t: Tokens,
    ratio: Float[Tensor, " N"],
    *,
    low: Fraction = 0.2,
    high: Positive = 0.2,
    tail_low: NonNegative = 0.75,
    tail_high: NonNegative = 1.0,
    dual: AboveOne = 10.0,
) -> Float[Tensor, " N"]:
    """Bounded gradients beyond the clip instead of none (CE-GPPO, arXiv 2509.20712; GPPO with both tails 1).

    `-sg[k] A log π, k = r; A > 0: tail_high (1 + high) beyond it; A < 0: tail_low (1 - low), 0 above dual`
    tail_low 0.75 is theirs for 7B, 0.5 for 1.5B.
    """
    a, r = t.advantages, ratio.detach()
    k = torch.where((a > 0) & (r > 1 + high), r.new_tensor(tail_high * (1 + high)), r)
    k = torch.where((a < 0) & (r < 1 - low), r.new_tensor(tail_low * (1 - low)), k)
    k = torch.where((a < 0) & (r > dual), r.new_tensor(0.0), k)
    return -k * a * t.logprobs


def dynamic_clip(
    t: Tokens,
    ratio: Float[Tensor, " N"],
    *,
    low: Fraction = 0.16,
    high: Positive = 0.2,
    cap: AboveOne = 10.0,
) -> Float[Tensor, " N"]:
    """A clip that is wider for rarer tokens (DCPO, arXiv 2509.02333).

    `-min(r A, clip(r, (1 + √(1 - 4 low/q)) / 2, (1 + √(1 + 4 high/q)) / 2, at most cap) A), q = π_old`
    Where 1 - 4 low/q is negative, 0 stands for it.
    Their advantages, smoothed by a prompt's own history, are not part of this. Their script has high 0.28.
    """
    q = t.old_logprobs.exp().clamp(min=1e-12)
    below = 0.5 + 0.5 * (1 - 4 * low / q).clamp(min=0).sqrt()
    above = (0.5 + 0.5 * (1 + 4 * high / q).sqrt()).clamp(max=cap)
    a = t.advantages
    return -torch.minimum(ratio * a, torch.minimum(torch.maximum(ratio, below), above) * a)


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
