"""Tokens -> a term added to each token's loss, coefficient included; scale and correction do not reach it."""

import torch
from jaxtyping import Float
from torch import Tensor

from entroray.binding import Count, Fraction, Nats, NonNegative, declare
from entroray.objective.step_statistics import mean_entropy
from entroray.ops import log_ratio
from entroray.types import Tokens


@declare(needs=["ref_logprobs"])
def kl(t: Tokens, *, coef: NonNegative = 0.04) -> Float[Tensor, " N"]:
    """Distance to the reference policy: k3's value, the reverse KL's own gradient (verl's `k3+`).

    `coef (exp(-x) + x - 1), gradient coef x, x = log π / π_ref in nats`
    k3's own gradient, 1 - exp(-x), is not that of the KL; x is, on-policy (so is k3's with NeMo-RL's score
    term added). 0.04 is GRPO's (arXiv 2402.03300).
    """
    x = _moved(t).detach()
    return coef * (torch.exp(-x) + x - 1 + x * (t.logprobs - t.logprobs.detach()))


@declare(needs=["ref_logprobs"])
def kl_k3(t: Tokens, *, coef: NonNegative = 0.04) -> Float[Tensor, " N"]:
    """Distance to the reference policy as GRPO differentiates it (arXiv 2402.03300, Schulman's k3).

    `coef (exp(-x) + x - 1), x = log π / π_ref in nats`
    x is held within 20 nats; verl also holds the value within 10, which stops the gradient: not here.
    """
    x = _moved(t)
    return coef * (torch.exp(-x) + x - 1)


@declare(needs=["ref_logprobs"], caveat="has the same gradient whatever the reference: choose `kl`")
def kl_k1(t: Tokens, *, coef: NonNegative = 0.04) -> Float[Tensor, " N"]:
    """The log-ratio to the reference itself: its value estimates the KL, its gradient is coef everywhere.

    `coef x, x = log π / π_ref in nats`
    As a loss it only makes sampled tokens rarer, whatever the reference: a control arm, not a KL penalty.
    """
    return coef * _moved(t)


@declare(needs=["ref_logprobs"])
def kl_k2(t: Tokens, *, coef: NonNegative = 0.04) -> Float[Tensor, " N"]:
    """Half the squared log-ratio to the reference (Schulman's k2): on-policy the reverse KL's gradient.

    `coef x² / 2, x = log π / π_ref in nats`
    """
    return coef * _moved(t).square() / 2


@declare(
    needs=["entropy_grad", "whole_step"],
    before=lambda below, **_: {} if below is None else {"step_entropy": mean_entropy},
)
def entropy_bonus(t: Tokens, *, coef: float = 1e-3, below: Nats | None = None) -> Float[Tensor, " N"]:
    """Reward hesitation directly, through the gradient of the full-vocabulary entropy.

    `-coef H, H in nats; only in steps whose mean H at the start is < below nats`
    Published sweeps: 1e-3 does nothing, 1e-2 explodes (arXiv 2505.22617); move it by a controller, which
    may go below 0, where entropy is lowered. `below` is Skywork-OR1's gate; theirs looks at the step before
    and takes -log π for H, here H is exact.
    """
    gate = 1.0 if below is None else (t.extra["step_entropy"] < below).to(t.entropy.dtype)
    return -coef * gate * t.entropy


@declare(needs=["nucleus_entropy:{mass}", "entropy_grad"])
def nucleus_entropy_bonus(t: Tokens, *, coef: float = 1e-3, mass: Fraction = 0.99) -> Float[Tensor, " N"]:
    """Reward hesitation among probable tokens alone, so that no tail is lifted (TRE, arXiv 2602.03635).

    `-coef H of the fewest tokens that hold mass, renormalised, in nats`
    The token that crosses `mass` is in; SIREN has 0.8 and leaves it out. TRE multiplies by log V over the
    log of the number kept, which makes its 1e-3 a larger one.
    """
    return -coef * t.extra[f"nucleus_entropy:{mass}"]


@declare(needs=["top_entropy:{k}", "entropy_grad"])
def top_entropy_bonus(t: Tokens, *, coef: float = 1e-3, k: Count = 2) -> Float[Tensor, " N"]:
    """Reward hesitation among the k likeliest tokens (TRE's top-k form, arXiv 2602.03635).

    `-coef H of the k likeliest tokens, renormalised, in nats`
    TRE multiplies by log V / log k, 17 at k = 2 and V = 152,000.
    """
    return -coef * t.extra[f"top_entropy:{k}"]


@declare(needs=["plausible_logmass:{kappa}", "entropy_grad"], reads_selected=True)
def plausible_kl(t: Tokens, *, coef: NonNegative = 1.0, kappa: Fraction = 0.02) -> Float[Tensor, " N"]:
    """Hold rare but plausible tokens against punishment (Lp-Reg, arXiv 2510.03222).

    `coef KL(q, π) on the selected; q = π without tokens below kappa max π, renormalised; in nats`
    KL(q, π) is -log of the mass q keeps, and its gradient the same whether q is detached or not. q follows
    the current policy, which at r = 1 is the one that the tokens were selected by.
    """
    kl = -t.extra[f"plausible_logmass:{kappa}"]
    return torch.where(t.selected, coef * kl, torch.zeros_like(kl))


@declare(idle_at_one=True, reads_selected=True, restrains=True)
def kl_cov(t: Tokens, *, coef: NonNegative = 1.0) -> Float[Tensor, " N"]:
    """Hold the selected tokens where they were when the step began (KL-Cov, arXiv 2505.22617).

    `coef |log π / π_old| on the selected, in nats`
    The size of the log-ratio, not a KL: its gradient is the sign alone, and 0 where r = 1, so it does nothing
    in the first update of a step. The paper has 1; verl ships 0.1.
    """
    distance = log_ratio(t.logprobs, t.old_logprobs).abs()
    return torch.where(t.selected, coef * distance, torch.zeros_like(distance))


def _moved(t: Tokens) -> Float[Tensor, " N"]:
    assert t.ref_logprobs is not None, "refused by name in Objective"
    return log_ratio(t.logprobs, t.ref_logprobs)
