"""Tokens of the whole step -> which get special treatment, decided once, before the update.

The pool is always the whole step on all ranks, where the authors' codes take one micro-batch on one GPU.
A share is of the step's tokens, at least one of those that qualify; ties break by `uid`, and chance is a
hash of step and `uid`, so neither row order nor a cut has a say.
"""

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from entroray.objective.bind import Fraction, Positive, declare
from entroray.objective.view import covariance
from entroray.types import Tokens


def everything(t: Tokens) -> Bool[Tensor, " N"]:
    """No token is special.

    `all tokens`
    """
    return t.mask


@declare(needs=["whole_step"])
def top_entropy(t: Tokens, *, share: Fraction = 0.2) -> Bool[Tensor, " N"]:
    """Forking tokens: those the policy hesitated over most when the step began (80/20, arXiv 2506.01939).

    `the top share of tokens by H`
    """
    return _lowest(-t.entropy, t.mask, share, t)


@declare(needs=["whole_step"])
def top_covariance(t: Tokens, *, share: Fraction = 2e-3) -> Bool[Tensor, " N"]:
    """Tokens that lower the entropy most by the paper's proxy (KL-Cov, arXiv 2505.22617).

    `the top share of tokens by (log π - mean)(A - mean)`
    2e-3 is the paper's for 7B, 2e-4 for 32B; its repository writes 0.2 and means percent.
    """
    return _lowest(-covariance(t), t.mask, share, t)


@declare(needs=["whole_step"])
def covariance_band(
    t: Tokens, *, share: Fraction = 2e-4, low: float = 1.0, high: float = 5.0
) -> Bool[Tensor, " N"]:
    """A random few among tokens whose covariance lies in a band (Clip-Cov, arXiv 2505.22617).

    `share of tokens, drawn among low < (log π - mean)(A - mean) < high`
    The bounds are absolute, so they fit advantages in standard deviations and no others.
    """
    c = covariance(t)
    return _lowest(_draw(t), (c > low) & (c < high), share, t)


@declare(needs=["whole_step"])
def random_positive(t: Tokens, *, share: Fraction = 2e-4) -> Bool[Tensor, " N"]:
    """A random few among reinforced tokens: the control arm of Clip-Cov (arXiv 2511.05993).

    `share of tokens, drawn among A > 0`
    Its paper gives no share; this is Clip-Cov's.
    """
    return _lowest(_draw(t), t.advantages > 0, share, t)


@declare(needs=["whole_step"])
def confident_mistakes(t: Tokens, *, deviations: Positive = 2.5) -> Bool[Tensor, " N"]:
    """Punished tokens so unlikely that pushing them down lowers the entropy (Clip_B, arXiv 2602.03392).

    `tokens with A < 0 and D - mean(D) < -deviations std(D), D = π (log π + H)`
    The other tail than Clip-Cov's. std is of all tokens of the step, without Bessel's correction.
    """
    if not len(t.logprobs):
        return t.mask
    d = t.logprobs.exp() * (t.logprobs + t.entropy)
    return (t.advantages < 0) & (d - d.mean() < -deviations * d.std(correction=0))


def _lowest(
    key: Float[Tensor, " N"], among: Bool[Tensor, " N"], share: float, t: Tokens
) -> Bool[Tensor, " N"]:
    """The tokens of `among` with the lowest `key`: a share of all, at least one where there are any."""
    count = max(1, int(share * len(key)))
    uid, keys = t.uid.cpu().numpy(), key.masked_fill(~among, torch.inf).cpu().numpy()
    chosen = torch.zeros_like(among)
    chosen[torch.from_numpy(np.lexsort((uid, keys))[:count]).to(among.device)] = True
    return chosen & among


def _draw(t: Tokens) -> Float[Tensor, " N"]:
    """A number in [0, 1) for each token: SplitMix64 of its step and uid."""
    with np.errstate(over="ignore"):
        x = t.uid.cpu().numpy().astype(np.uint64) + np.uint64(t.step) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return torch.from_numpy((x ^ (x >> np.uint64(31))) / 2.0**64).to(t.entropy.device)
