"""Tokens of the whole step -> new advantages, in the order given.

Most are applied once, before the update. Those declared `live` read the current policy: they are applied
again in every update, detached, to what the others left.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from entroray.binding import AboveOne, Fraction, Nats, NonNegative, Positive, Probability, declare
from entroray.objective.masking import row_mean
from entroray.ops import segment_sum
from entroray.types import Tokens


def _weigh(advantage: float, *, positive: float, negative: float) -> float:
    return advantage * (positive if advantage > 0 else negative)


@declare(reads=(), weighs=_weigh, neutral=lambda positive, negative: positive == negative == 1)
def by_sign(t: Tokens, *, positive: NonNegative = 0.1, negative: NonNegative = 1.0) -> Float[Tensor, " N"]:
    """Weigh reinforced and punished tokens apart (W-REINFORCE, arXiv 2506.01347; NSR at positive 0).

    `A (positive where A > 0, negative where A < 0)`
    The authors' code drops the other half of the batch in PSR and NSR; here it stays in the denominator.
    """
    return torch.where(t.advantages > 0, positive * t.advantages, negative * t.advantages)


@declare(reads=(), needs=["whole_step"], uniform_advantage=lambda **_: (-1.0, 1.0))
def whiten(t: Tokens, *, eps: Positive = 1e-8) -> Float[Tensor, " N"]:
    """Centred and scaled over all tokens of the step (REINFORCE++, arXiv 2501.03262; Bessel as in verl).

    `(A - mean(A)) / sqrt(var(A) + eps) over the step's tokens, Bessel`
    The authors' code whitens one rank's share of the batch; here it is the step.
    """
    if not len(t.advantages):
        return t.advantages
    centred = t.advantages - t.advantages.mean()
    variance = centred.square().sum() / max(len(centred) - 1, 1)
    return centred / (variance + eps).sqrt()


@declare(live=True, reads=["entropy"])
def add_entropy(t: Tokens, *, alpha: NonNegative = 0.4, kappa: AboveOne = 2.0) -> Float[Tensor, " N"]:
    """Lift A where the policy hesitates, never past a change of sign (arXiv 2506.14758).

    `A + min(alpha H, |A| / kappa), H in nats of the current policy, detached`
    alpha is 0.4 with GRPO and 0.1 with PPO, for advantages in standard deviations. It strengthens reinforced
    and weakens punished tokens: no entropy bonus.
    """
    return t.advantages + torch.minimum(alpha * t.entropy, t.advantages.abs() / kappa)


@declare(live=True, reads=["logprobs"])
def surprise_weighted(t: Tokens, *, zeta: NonNegative = 0.01) -> Float[Tensor, " N"]:
    """Weigh rare reinforced tokens up and rare punished ones down (REPO-R, arXiv 2603.11682).

    `A (1 - (zeta log π) where A > 0, max(0, 1 + (zeta log π)) elsewhere), log π current, detached`
    The paper doubles and halves zeta by the entropy and gives no start; 0.01 is ours. Its second factor turns
    negative where zeta |log π| > 1: held at 0 here.
    """
    up, down = 1 - zeta * t.logprobs, (1 + zeta * t.logprobs).clamp(min=0)
    return t.advantages * torch.where(t.advantages > 0, up, down)


@declare(
    needs=["whole_step"],
    reads=["entropy"],
    uniform_advantage=lambda **_: (-1.0, 1.0),
    needs_uniform_groups=True,
    steers_entropy=True,
)
def entropy_band(t: Tokens, *, low: Nats = 0.6, high: Nats = 0.7) -> Float[Tensor, " N"]:
    """Reject what would push the entropy further out of a band (Entrocraft, arXiv 2604.26326).

    `A; 0 where mean(H) > high and A < 0; 0 where mean(H) < low and A > 0; means in nats over the step`
    Algorithm 1 removes rejected rollouts; their code, and this, keeps them in the denominator. Their code
    also changes to raw +1 and -1 outside the band; this keeps A. They anneal the band to (0.1, 0.2).
    """
    if not len(t.entropy):
        return t.advantages
    mean = float(t.entropy.mean())
    wrong = t.advantages < 0 if mean > high else t.advantages > 0 if mean < low else t.advantages.isnan()
    return t.advantages.masked_fill(wrong, 0.0)


@declare(
    needs=["whole_step"],
    reads=["entropy", "logprobs"],
    by_token=lambda above, **_: above > 0,
    steers_entropy=lambda gain, **_: gain > 0,
)
def lean(
    t: Tokens,
    *,
    target: Nats = 0.5,
    gain: NonNegative = 0.99,
    integral: float = 0.0,
    clamp: Fraction = 0.9,
    above: Probability = 0.0,
) -> Float[Tensor, " N"]:
    """Weigh signs by how far the entropy is from a target (EntroPIC, arXiv 2511.15248).

    `A (1 + α where A > 0, 1 - α where A < 0) where π >= above;
    α = gain (mean(H) - target) + integral, within ±clamp`
    In nats over the step. `integral` is the sum a controller carries (K_i 0.01); the target is ours. The
    paper acts on probable tokens and gives no bound: `above` 0 is all, as in Entrocraft's reimplementation,
    which also leaves α without a clamp.
    """
    if not len(t.entropy):
        return t.advantages
    alpha = min(clamp, max(-clamp, gain * (float(t.entropy.mean()) - target) + integral))
    weight = torch.where(
        t.advantages > 0, t.advantages.new_tensor(1 + alpha), t.advantages.new_tensor(1 - alpha)
    )
    return t.advantages * torch.where(
        t.logprobs >= math.log(above) if above else t.mask, weight, torch.ones_like(weight)
    )


@declare(
    needs=["whole_step", "mean_logprob"],
    reads=(),
    min_group=2,
    uniform_advantage=lambda **_: (-1.0, 1.0),
)
def self_certainty(t: Tokens, *, eps: Positive = 1e-6) -> Float[Tensor, " N"]:
    """The model's own confidence in place of a reward: a control arm (Intuitor, arXiv 2505.19590).

    `(c - mean(c)) / (std(c) + eps) over the group, c = -mean_t mean_v log p_v, whatever the reward`
    KL(uniform, p) less log V, which standardising takes away. It lowers entropy.
    """
    return _standardised(-row_mean(t.extra["mean_logprob"], t), t, eps)


@declare(needs=["whole_step"], reads=["entropy"], min_group=2, uniform_advantage=lambda **_: (-1.0, 1.0))
def low_entropy(t: Tokens, *, eps: Positive = 1e-6) -> Float[Tensor, " N"]:
    """Low token entropy in place of a reward: a control arm (RENT, arXiv 2505.22660; arXiv 2506.17219).

    `(c - mean(c)) / (std(c) + eps) over the group, c = -mean_t H, whatever the reward`
    """
    return _standardised(-row_mean(t.entropy, t), t, eps)


@declare(needs=["whole_step"], reads=["old_logprobs"], min_group=2, uniform_advantage=lambda **_: (-1.0, 1.0))
def trajectory_likelihood(t: Tokens, *, eps: Positive = 1e-6) -> Float[Tensor, " N"]:
    """The response's own log-prob in place of a reward: a control arm (trajectory entropy, arXiv 2506.17219).

    `(c - mean(c)) / (std(c) + eps) over the group, c = Σ_t log π_old, whatever the reward`
    """
    return _standardised(segment_sum(t.old_logprobs, t.row, len(t.length)), t, eps)


def _standardised(score: Float[Tensor, " B"], t: Tokens, eps: float) -> Float[Tensor, " N"]:
    """Each row's score less its group's mean, in the group's deviations (Bessel), on its tokens."""
    group: Int[Tensor, " B"] = t.group.unique(return_inverse=True)[1]
    prompts = int(group.max()) + 1 if len(group) else 0
    size = segment_sum(torch.ones_like(score), group, prompts)
    centred = score - (segment_sum(score, group, prompts) / size)[group]
    variance = segment_sum(centred.square(), group, prompts) / (size - 1).clamp(min=1)
    return (centred / (variance.sqrt()[group] + eps))[t.row]
