"""Tokens -> a term added to each token's loss, coefficient included; scale and correction do not reach it."""

import torch
from jaxtyping import Float
from torch import Tensor

from entroray.objective.bind import NonNegative, declare
from entroray.objective.view import log_ratio
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


@declare(needs=["entropy_grad"])
def entropy_bonus(t: Tokens, *, coef: NonNegative = 1e-3) -> Float[Tensor, " N"]:
    """Reward hesitation directly, through the gradient of the full-vocabulary entropy.

    `-coef H, H in nats`
    Published sweeps: 1e-3 does nothing, 1e-2 explodes (arXiv 2505.22617); move it by a controller.
    """
    return -coef * t.entropy


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
