"""What one update does to a softmax, to first order: the identities behind the rows, in float64."""

import pytest
import torch
from torch import Tensor

from entroray.objective import build_objective
from entroray.policy.head import token_stats
from tests.cases import ROWS, tokens

V, STEP = 50, 1e-5
G = torch.Generator().manual_seed(4)
Z = 1.5 * torch.randn(V, generator=G, dtype=torch.float64)
A = torch.randn(V, generator=G, dtype=torch.float64)
P, LOGP = Z.softmax(0), Z.log_softmax(0)
H = -(P * LOGP).sum()
S = P * (LOGP + H)
"""The discriminator of every outcome: its sign says which way reinforcing it moves the entropy."""


def change(dz: Tensor) -> float:
    """The entropy's derivative along dz, by central differences."""
    entropy = lambda z: -(z.softmax(0) * z.log_softmax(0)).sum()
    return float((entropy(Z + STEP * dz) - entropy(Z - STEP * dz)) / (2 * STEP))


def covariance(x: Tensor, y: Tensor) -> float:
    return float((P * (x - (P * x).sum()) * (y - (P * y).sum())).sum())


def onehot(a: int) -> Tensor:
    return torch.eye(V, dtype=torch.float64)[a]


def test_entropy_falls_by_the_covariance_of_log_prob_and_any_change_of_logits():
    for dz in (A, P * A, onehot(7) - P):
        assert change(dz) == pytest.approx(-covariance(LOGP, dz), rel=1e-5)


def test_natural_gradient_ignores_a_constant_in_the_advantage():
    assert change(A) == pytest.approx(-covariance(LOGP, A), rel=1e-5)
    assert covariance(LOGP, A + 3) == pytest.approx(covariance(LOGP, A), rel=1e-12)


def test_vanilla_gradient_needs_the_advantage_centred_under_the_policy():
    centred = A - (P * A).sum()
    expected = sum(P[a] * A[a] * (onehot(a) - P) for a in range(V))  # E[A grad log pi]
    assert torch.allclose(expected, P * centred, rtol=1e-12)
    assert change(expected) == pytest.approx(-covariance(LOGP, P * centred), rel=1e-5)
    assert abs(covariance(LOGP, P * A) / covariance(LOGP, P * centred) - 1) > 0.01, "uncentred it is off"


@pytest.mark.parametrize("a", [int(P.argmax()), int(P.argmin()), 7])
def test_a_sampled_token_moves_the_entropy_by_its_discriminator_less_the_mean(a):
    baseline = float((P * S).sum())
    assert change(onehot(a) - P) == pytest.approx(-float(S[a] - baseline), rel=1e-5)


def test_the_sampled_formula_is_the_vanilla_one_on_average():
    baseline = (P * S).sum()
    mean = float(-(P * A * (S - baseline)).sum())
    assert mean == pytest.approx(-covariance(LOGP, P * (A - (P * A).sum())), rel=1e-10)


@pytest.mark.parametrize(("name", "sign"), [("psr", 1.0), ("nsr", -1.0)])
def test_logits_of_a_right_and_of_a_wrong_sample(name, sign):
    """Right: 1 - p at the sample and -p_v elsewhere; wrong: the opposite, spread by the prior."""
    hidden = Z[None].clone().requires_grad_()
    whole, token = tokens(masked_out=()).take(torch.tensor([1])), torch.tensor([7])
    stats = token_stats(hidden, torch.eye(V, dtype=torch.float64), token, torch.ones(1, dtype=torch.float64))
    row = {key: stats[key] for key in ("logprobs", "entropy")} | {"old_logprobs": stats["logprobs"].detach()}
    t = whole.__class__(**vars(whole) | row | {"advantages": torch.tensor([sign], dtype=torch.float64)})
    objective = build_objective(ROWS[name])
    credited = objective.credit(t)
    live = credited.__class__(**vars(credited) | row)
    (gradient,) = torch.autograd.grad(objective.loss(live), hidden)
    assert torch.allclose(-gradient[0], sign * (onehot(7) - P), rtol=1e-10, atol=1e-14)
    others = torch.arange(V) != 7
    ratio = (-gradient[0] / P)[others]
    assert torch.allclose(ratio, ratio[:1].expand_as(ratio), rtol=1e-9), "in proportion to the prior"
