"""Tokens and ratio r -> loss per token; its gradient is a detached coefficient times that of log π."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from entroray.binding import (
    Epsilon,
    EpsilonBelow,
    Fraction,
    NonNegative,
    Positive,
    Probability,
    RatioAboveOne,
    RatioBelowOne,
    RatioBound,
    declare,
)
from entroray.objective.step_statistics import balanced_high, balanced_low
from entroray.types import Tokens


@declare(idle_at_one=True)
def clip(
    t: Tokens,
    ratio: Float[Tensor, " N"],
    *,
    low: EpsilonBelow = 0.2,
    high: Epsilon = 0.2,
    dual: RatioAboveOne | None = None,
) -> Float[Tensor, " N"]:
    """PPO's pessimistic clip (arXiv 1707.06347); high > low is clip-higher (DAPO, arXiv 2503.14476).

    `-min(r A, clip(r, 1 - low, 1 + high) A); where A < 0 at most dual |A|`
    `low` and `high` are distances of the ratio from 1; `dual` (arXiv 1912.09729) is a ratio, null is off
    (verl: 3, DAPO's script: 10).
    """
    a = t.advantages
    loss = -torch.minimum(ratio * a, ratio.clamp(1 - low, 1 + high) * a)
    return loss if dual is None else torch.where(a < 0, torch.minimum(loss, -dual * a), loss)


@declare(idle_at_one=True)
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


@declare(neutral=True)
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


def soft_gate(
    t: Tokens, ratio: Float[Tensor, " N"], *, rise: Positive = 1.0, fall: Positive = 1.05
) -> Float[Tensor, " N"]:
    """A soft gate on the ratio where PPO has a hard one (SAPO, arXiv 2511.20347).

    `-(4 / τ) σ(τ (r - 1)) A, τ = rise where A > 0, fall elsewhere`
    """
    steep = torch.where(t.advantages > 0, ratio.new_tensor(rise), ratio.new_tensor(fall))
    return -4 / steep * torch.sigmoid(steep * (ratio - 1)) * t.advantages


@declare(idle_at_one=True)
def trust_probability(
    t: Tokens,
    ratio: Float[Tensor, " N"],
    *,
    low: Probability = 0.15,
    high: Probability = 0.15,
    cap: RatioBound = 20.0,
) -> Float[Tensor, " N"]:
    """Gate on the change of probability instead of the ratio (DPPO's total variation; Stable-RL's numbers).

    `-sg[min(r, cap)] A log π; 0 where A > 0 and π - μ > high, or A <= 0 and π - μ < -low; μ = π / r`
    Bounds are probabilities, so rare tokens may move far; μ is whatever the ratio is anchored on.
    """
    moved = t.logprobs.detach().exp() - _anchored(t, ratio)
    outside = torch.where(t.advantages > 0, moved > high, moved < -low)
    weight = ratio.detach().clamp(max=cap).masked_fill(outside, 0.0)
    return -weight * t.advantages * t.logprobs


@declare(idle_at_one=True)
def leaky_clip(
    t: Tokens,
    ratio: Float[Tensor, " N"],
    *,
    low: EpsilonBelow = 0.2,
    high: Epsilon = 0.2,
    leak_low: NonNegative = 0.75,
    leak_high: NonNegative = 1.0,
    dual: RatioAboveOne | None = 10.0,
) -> Float[Tensor, " N"]:
    """PPO's clip with a bounded gradient beyond it (CE-GPPO, arXiv 2509.20712; GPPO at leaks of 1).

    `-sg[w] A log π, w = r; leak_high (1 + high) where A > 0 and r > 1 + high;
    leak_low (1 - low) where A < 0 and r < 1 - low; 0 where A < 0 and r > dual`
    leak_low is 0.75 at 7B, 0.5 at 1.5B: up lowers the entropy; leak_high up raises it. Leaks of 0 are PPO's.
    """
    a, weight = t.advantages, ratio.detach()
    above, below = (a > 0) & (weight > 1 + high), (a < 0) & (weight < 1 - low)
    held = weight.masked_fill(above, leak_high * (1 + high)).masked_fill(below, leak_low * (1 - low))
    if dual is not None:
        held = held.masked_fill((a < 0) & (weight > dual), 0.0)
    return -held * a * t.logprobs


@declare(before={"balanced_low": balanced_low, "balanced_high": balanced_high}, needs=["whole_step"])
def balanced_clip(
    t: Tokens,
    ratio: Float[Tensor, " N"],
    *,
    least_low: RatioBelowOne = 0.6,
    most_low: RatioBelowOne = 0.8,
    least_high: RatioAboveOne = 1.2,
    most_high: RatioAboveOne = 2.0,
    stride: RatioBound = 0.05,
    share: Fraction = 0.5,
    dual: RatioAboveOne | None = 3.0,
) -> Float[Tensor, " N"]:
    """PPO's clip, bounds moved until reinforced tokens carry their share (BAPO, arXiv 2510.18927).

    `-min(r A, clip(r, l, h) A); l from least_low to most_low, then h from least_high to most_high,
    by stride until A > 0 carry share of Σ r |A|; where A < 0 at most dual |A|`
    Bounds are ratios, not distances from 1. They are searched once, at the start of the step, with the
    ratios to the sampler; the authors search in every micro-batch, and their code takes positive over
    negative. With a sampler in step with the learner the search sees A alone and ends at either end.
    """
    low, high, a = t.extra["balanced_low"], t.extra["balanced_high"], t.advantages
    loss = -torch.minimum(ratio * a, torch.minimum(torch.maximum(ratio, low), high) * a)
    return loss if dual is None else torch.where(a < 0, torch.minimum(loss, -dual * a), loss)


@declare(idle_at_one=True)
def clip_by_probability(
    t: Tokens,
    ratio: Float[Tensor, " N"],
    *,
    low: Positive = 0.16,
    high: Positive = 0.2,
    cap: RatioAboveOne = 10.0,
) -> Float[Tensor, " N"]:
    """PPO's clip with bounds that widen for rare tokens (DCPO, arXiv 2509.02333).

    `-min(r A, clip(r, l, h) A), l = 1/2 + sqrt(max(1 - (4 low / q), 0)) / 2,
    h = 1/2 + sqrt(1 + (4 high / q)) / 2, at most cap, q = π / r`
    `low` and `high` bound (r - 1) r q, neither a ratio nor a distance. The README has 0.2, the script 0.28.
    """
    q = _anchored(t, ratio).clamp(min=1e-12)
    bottom = 0.5 + 0.5 * (1 - 4 * low / q).clamp(min=0).sqrt()
    top = (0.5 + 0.5 * (1 + 4 * high / q).sqrt()).clamp(max=cap)
    held = torch.minimum(torch.maximum(ratio, bottom), top)
    return -torch.minimum(ratio * t.advantages, held * t.advantages)


@declare(idle_at_one=True, reads_selected=True)
def mirrored_clip(
    t: Tokens,
    ratio: Float[Tensor, " N"],
    *,
    confident: EpsilonBelow = 0.2,
    hesitant: EpsilonBelow = 0.4,
    cap: RatioAboveOne = 3.0,
) -> Float[Tensor, " N"]:
    """The reciprocal ratio for reinforced tokens, so that the rare weigh more (ASPO, arXiv 2510.06062).

    `-sg[min(w, cap)] A log π, w = 1/r where A > 0, r elsewhere; 0 where PPO's clip by ε is;
    ε = hesitant where selected, confident elsewhere`
    The gate is PPO's on r itself; the cap bounds the weight and leaves its gradient. Our reading of their
    code, whose 0.2, 0.4 and 3 ignore its configuration and whose mask of "high" entropy marks the low.
    """
    a, r = t.advantages, ratio.detach()
    width = torch.where(t.selected, r.new_tensor(hesitant), r.new_tensor(confident))
    outside = torch.where(a > 0, r > 1 + width, r < 1 - width)
    weight = torch.where(a > 0, 1 / r, r).clamp(max=cap).masked_fill(outside, 0.0)
    return -weight * a * t.logprobs


def _anchored(t: Tokens, ratio: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Probability under the ratio's anchor, detached."""
    return t.logprobs.detach().exp() / ratio.detach()
