"""Tokens of the whole step -> which get special treatment, decided once, before the update.

The pool is always the whole step on all ranks, where the authors' codes take one micro-batch on one GPU.
A share is of the step's tokens, at least one of those that qualify; ties break by `uid`, and chance is a
hash of the run's seed, the step and `uid`, so neither row order nor a cut has a say.
"""

import hashlib
import math

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from entroray.binding import Deviations, Fraction, declare
from entroray.ops import as_count, covariance, discriminator
from entroray.types import Tokens


@declare(reads=(), neutral=True)
def everything(t: Tokens) -> Bool[Tensor, " N"]:
    """No token is special.

    `all tokens`
    """
    return t.mask


@declare(needs=["whole_step"], reads=["entropy"])
def top_entropy(t: Tokens, *, share: Fraction = 0.2) -> Bool[Tensor, " N"]:
    """Forking tokens: those the policy hesitated over most when the step began (80/20, arXiv 2506.01939).

    `the top share of tokens by H`
    """
    return _lowest(-t.entropy, t.mask, share, t)


@declare(needs=["whole_step"], reads=["logprobs"])
def top_covariance(t: Tokens, *, share: Fraction = 2e-3) -> Bool[Tensor, " N"]:
    """Tokens that lower the entropy most by the paper's proxy (KL-Cov, arXiv 2505.22617).

    `the top share of tokens by (log π - mean)(A - mean)`
    2e-3 is the paper's for 7B, 2e-4 for 32B; its repository writes 0.2 and means percent.
    """
    return _lowest(-covariance(t.logprobs, t.advantages), t.mask, share, t)


@declare(needs=["whole_step"], reads=["logprobs"], wants_deviations=True)
def covariance_band(
    t: Tokens, *, share: Fraction = 2e-4, low: float = 1.0, high: float = 5.0
) -> Bool[Tensor, " N"]:
    """A random few among tokens whose covariance lies in a band (Clip-Cov, arXiv 2505.22617).

    `share of tokens, drawn among low < (log π - mean)(A - mean) < high`
    The bounds are absolute, so they fit advantages in standard deviations and no others.
    """
    c = covariance(t.logprobs, t.advantages)
    return _lowest(_draw(t), (c > low) & (c < high), share, t)


@declare(needs=["whole_step"], reads=())
def random_positive(t: Tokens, *, share: Fraction = 2e-4) -> Bool[Tensor, " N"]:
    """A random few among reinforced tokens: the control arm of Clip-Cov (arXiv 2511.05993).

    `share of tokens, drawn among A > 0`
    Its paper gives no share; this is Clip-Cov's.
    """
    return _lowest(_draw(t), t.advantages > 0, share, t)


@declare(needs=["whole_step"], reads=["entropy"])
def top_entropy_of_rollout(t: Tokens, *, share: Fraction = 0.2) -> Bool[Tensor, " N"]:
    """The tokens of each rollout that the policy hesitated over most (ASPO, arXiv 2510.06062; SIREN).

    `the top share of each rollout's tokens by H`
    """
    order = np.lexsort((t.uid.cpu().numpy(), -t.entropy.cpu().numpy(), t.row.cpu().numpy()))
    length = torch.bincount(t.row, minlength=len(t.length)).cpu()
    rows = t.row.cpu()[order]
    rank = torch.arange(len(order)) - (length.cumsum(0) - length)[rows]
    count = torch.tensor([as_count(share * n, math.ceil) for n in length.tolist()])
    chosen = torch.zeros_like(t.mask)
    chosen[torch.from_numpy(order).to(chosen.device)] = (rank < count[rows]).to(chosen.device)
    return chosen


@declare(needs=["whole_step"], reads=["logprobs", "entropy"])
def low_discriminator(t: Tokens, *, mu: Deviations = 2.5) -> Bool[Tensor, " N"]:
    """Punished tokens that would lower the entropy most (Clip_B, arXiv 2602.03392; mu as in Trinity-RFT).

    `A < 0 and D - mean(D) < -mu std(D), D = π (log π + H)`
    Their code takes π from the sampler and H from the learner; here both are the learner's.
    """
    d = discriminator(t.logprobs, t.entropy)
    return (t.advantages < 0) & (d - _mean(d) < -mu * _deviation(d))


@declare(needs=["whole_step", "mean_discriminator"], reads=["logprobs", "entropy"])
def below_expected(t: Tokens, *, mu: Deviations = 8.5, share: Fraction = 1e-4) -> Bool[Tensor, " N"]:
    """Punished tokens far below the vocabulary's expectation, worst first (Clip_V, arXiv 2602.03392).

    `at most share of tokens, among A < 0 and E_p D - D > mu std(D - E_p D); D = π (log π + H)`
    mu is Trinity-RFT's registered default; its constructor has 2.
    """
    gap = t.extra["mean_discriminator"] - discriminator(t.logprobs, t.entropy)
    return _lowest(-gap, (t.advantages < 0) & (gap > mu * _deviation(gap)), share, t)


@declare(needs=["whole_step", "max_logprob"], reads=["old_logprobs"])
def rare_but_plausible(t: Tokens, *, share: Fraction = 0.01, kappa: Fraction = 0.02) -> Bool[Tensor, " N"]:
    """Punished tokens among the rarest, yet not noise (Lp-Reg, arXiv 2510.03222: 1 % at 14B, 0.5 % at 32B).

    `A < 0 and log π among the lowest share of tokens, and π >= kappa max π`
    """
    plausible = t.old_logprobs >= t.extra["max_logprob"] + math.log(kappa)
    return _lowest(t.old_logprobs, t.mask, share, t) & (t.advantages < 0) & plausible


def _mean(x: Float[Tensor, " N"]) -> Float[Tensor, ""]:
    return x.sum() / max(len(x), 1)


def _deviation(x: Float[Tensor, " N"]) -> Float[Tensor, ""]:
    """Standard deviation over the step's tokens, Bessel; 0 of fewer than two."""
    return ((x - _mean(x)).square().sum() / max(len(x) - 1, 1)).sqrt()


def _lowest(
    key: Float[Tensor, " N"], among: Bool[Tensor, " N"], share: float, t: Tokens
) -> Bool[Tensor, " N"]:
    """The tokens of `among` with the lowest `key`: a share of all, at least one where there are any."""
    count = min(len(key), max(1, as_count(share * len(key), math.floor)))
    if not count:
        return among
    uid, keys = t.uid.cpu().numpy(), key.masked_fill(~among, torch.inf).cpu().numpy()
    last = np.partition(keys, count - 1)[count - 1]
    below, ties = (keys < last, keys == last) if last == last else (keys == keys, keys != keys)  # NaN is last
    tied = np.flatnonzero(ties)
    below[tied[np.argsort(uid[tied], kind="stable")[: count - below.sum()]]] = True
    return torch.from_numpy(below).to(among.device) & among


def _draw(t: Tokens) -> Float[Tensor, " N"]:
    """A number in [0, 1) for each token: SplitMix64 of the run's seed, the step and its uid."""
    key = hashlib.blake2b(f"{t.seed}:{t.step}".encode(), digest_size=8).digest()
    with np.errstate(over="ignore"):
        x = t.uid.cpu().numpy().astype(np.uint64) + np.uint64(int.from_bytes(key, "little"))
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return torch.from_numpy((x ^ (x >> np.uint64(31))) / 2.0**64).to(t.entropy.device)
