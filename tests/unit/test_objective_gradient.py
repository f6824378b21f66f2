"""The gradient of every row is its paper's coefficient times that of log π, on and off policy, in float64."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from entroray.objective import build
from entroray.types import Tokens
from tests.cases import FULL, ROWS, WHOLE, close, gate, tokens, update

every_row = pytest.mark.parametrize("name", ROWS)

PUBLISHED = {
    "grpo": lambda a, r, n: r * a * gate(a, r, 0.2, 0.2) / n / 6,
    "dr_grpo": lambda a, r, n: r * a * gate(a, r, 0.2, 0.2) / 3000 / 6,
    "rloo": lambda a, r, n: r * a / 6,
    "reinforce": lambda a, r, n: r * a / 6,
    "dapo": lambda a, r, n: r * a * gate(a, r, 0.2, 0.28, 10.0) / 24,
    "cispo": lambda a, r, n: r.clamp(max=5.0) * a / 24,
    "supervised": lambda a, r, n: a / 24,
    "entropy_bonus": lambda a, r, n: r * a * gate(a, r, 0.2, 0.2) / n / 6,
    "psr": lambda a, r, n: r * a * (a > 0) * gate(a, r, 0.2, 0.2) / 24,
    "nsr": lambda a, r, n: r * a * (a < 0) * gate(a, r, 0.2, 0.2) / 24,
    "w_reinforce": lambda a, r, n: r * torch.where(a > 0, 0.1 * a, a) * gate(a, r, 0.2, 0.2) / 24,
    "clip_cov": lambda a, r, n: r * a * ~CHOSEN["clip_cov"](a) * gate(a, r, 1.0, 1.0) / 24,
    "random_positive_clip": lambda a, r, n: (
        r * a * ~CHOSEN["random_positive_clip"](a) * gate(a, r, 0.2, 0.2) / 24
    ),
    "kl_cov": lambda a, r, n: (r * a - CHOSEN["kl_cov"](a) * r.log().sign()) / 24,
    "gspo": lambda a, r, n: seq(r.log()).exp() * a * gate(a, seq(r.log()).exp(), 3e-4, 4e-4) / n / 6,
    "gmpo": lambda a, r, n: (
        seq(torch.where(a > 0, r.log().clamp(max=0.4), r.log().clamp(min=-0.4))).exp()
        * torch.where(a > 0, r.log() <= 0.4, r.log() >= -0.4)
        * a
        / n
        / 6
    ),
    "reinforce_pp": lambda a, r, n: r * white(a) * gate(white(a), r, 0.2, 0.2) / 24,
    "opo": lambda a, r, n: r * a / 24,
    "ce_gppo": lambda a, r, n: (
        torch.where(a > 0, r.clamp(max=1.2), torch.where(r < 0.8, 0.75 * 0.8, r * (r <= 10))) * a / 24
    ),
    "dcpo": lambda a, r, n: (
        r * a * torch.where(a > 0, r <= dynamic(4 * 0.2), r >= dynamic(-4 * 0.16)) / n / 6
    ),
    "entropy_advantage": lambda a, r, n: (
        r * (a + torch.minimum(0.4 * NOW[0].entropy, a.abs() / 2)) * gate(a, r, 0.2, 0.28) / 24
    ),
    "qae": lambda a, r, n: r * a * gate(a, r, 0.2, 0.28, 10.0) / 24,
    "steer": lambda a, r, n: (
        r * a * 0.8 ** (bend(a) / bend(a).nan_to_num().max()) * gate(a, r, 0.2, 0.28) / 24
    ),
    "clip_b": lambda a, r, n: (
        r * a * ~CHOSEN["clip_b"](a) * gate(a, r, 0.2, 0.2) / (24 - CHOSEN["clip_b"](a).sum())
    ),
    "rare_and_confident": lambda a, r, n: (
        r * torch.where(a > 0, a / 2, a) * ~CHOSEN["rare_and_confident"](a) * gate(a, r, 0.2, 0.28, 10.0) / 24
    ),
    "forking_tokens": lambda a, r, n: r * a * CHOSEN["forking_tokens"](a) * gate(a, r, 0.2, 0.28, 10.0) / 4,
}
"""The coefficient of grad log π in the objective to maximise: advantage, ratio, masked length of the row."""


def seq(x: Tensor) -> Tensor:
    """The mean over the masked-in tokens of each token's row."""
    t = NOW[0]
    return torch.stack([x[t.mask & (t.row == row)].mean() for row in t.row])


def white(a: Tensor) -> Tensor:
    seen = a[NOW[0].mask]
    return (a - seen.mean()) / (seen.var() + 1e-8).sqrt()


def dynamic(four: float) -> Tensor:
    return (0.5 + 0.5 * (1 + four / NOW[0].old_logprobs.exp()).clamp(min=0).sqrt()).clamp(max=10.0)


def bend(a: Tensor) -> Tensor:
    t = NOW[0]
    return (a * (1 - t.logprobs.exp()) * (t.logprobs + t.entropy)).abs()


def chosen_by(name: str) -> Callable[[Tensor], Tensor]:
    """Which tokens a row singles out: its own choice, looked at in tests of their own below."""
    return lambda a: build(ROWS[name]).credit(replace(NOW[0], advantages=a)).selected


NOW: list[Tokens] = []
"""The tokens the gradient is being compared on."""
CHOSEN = {name: chosen_by(name) for name, row in ROWS.items() if row["select"]["fn"] != "everything"}


@every_row
@pytest.mark.parametrize("drift", [0.0, 3.0], ids=["on_policy", "off_policy"])
def test_the_gradient_is_the_published_one(name, drift):
    objective, t = build(ROWS[name]), tokens(drift=drift)
    NOW[:] = [t]
    _, gradient, _ = update(objective, objective.credit(t), WHOLE)
    r = (t.logprobs - t.old_logprobs).exp()
    n = torch.tensor([float(sum(t.mask[t.row == row])) for row in t.row]).double()
    expected = torch.where(t.mask, -PUBLISHED[name](t.advantages, r, n), 0.0)
    assert close(gradient, expected)
    pulled = (
        t.mask
        & (objective.credit(t).advantages > 0)
        & ~(objective.credit(t).selected & bool(objective.penalties))
    )
    assert (gradient[pulled] <= 0).all(), "reinforced tokens must become likelier"


def test_the_gradient_of_all_slots_at_once():
    objective, t = build(FULL), tokens()
    _, gradient, entropy_gradient = update(objective, objective.credit(t), WHOLE)
    n = torch.tensor([float(sum(t.mask[t.row == row])) for row in t.row]).double()
    a = torch.where(t.advantages > 0, 0.1 * t.advantages, t.advantages)
    r, rho = ((x - y).exp() for x, y in ((t.logprobs, t.old_logprobs), (t.old_logprobs, t.behavior_logprobs)))
    x = t.logprobs - t.ref_logprobs
    policy = rho.clamp(max=2.0) * 0.7 * r * a * gate(a, r, 0.2, 0.28, 10.0)
    expected = (-policy + 0.04 * x + 0.04 * (1 - torch.exp(-x))) / n / 24
    assert close(gradient, torch.where(t.mask, expected, 0.0))
    assert close(entropy_gradient, torch.where(t.mask, -0.001 / n / 24, 0.0))
    assert (rho[t.mask] > 2).any() and (rho[t.mask] < 2).any()
