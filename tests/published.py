"""The gradient that each row's paper gives, written again from the papers, in a few lines each."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from entroray.types import Tokens
from tests.cases import BUILT, N


def gate(a: Tensor, r: Tensor, low: float, high: float, dual: float = torch.inf) -> Tensor:
    return torch.where(a > 0, r <= 1 + high, (r >= 1 - low) & (r <= dual))


@dataclass(frozen=True)
class Case:
    """What a published formula is written in: r, A, row length n, and columns of the tokens, without NaN."""

    name: str
    t: Tokens

    def __getattr__(self, column: str) -> Tensor:
        return torch.where(self.t.mask, getattr(self.t, column), 0.0)

    a = property(lambda self: self.advantages)
    r = property(lambda self: torch.where(self.t.mask, (self.t.logprobs - self.t.old_logprobs).exp(), 1.0))
    p = property(lambda self: torch.where(self.t.mask, self.t.logprobs.exp(), 0.5))
    rho = property(lambda self: (self.logprobs - self.behavior_logprobs).exp())

    @property
    def n(self) -> Tensor:
        return self.per_row(torch.ones(N).double())

    def per_row(self, x: Tensor) -> Tensor:
        """The sum over each row's masked-in tokens, on each token."""
        rows = [torch.where(self.t.mask & (self.t.row == i), x, 0.0).sum() for i in range(6)]
        return torch.stack(rows)[self.t.row]

    @property
    def chosen(self) -> Tensor:
        """Which tokens the row singles out: its own choice, looked at in tests of its own."""
        return BUILT[self.name].credit(self.t).selected

    def group_scored(self, score: Tensor) -> Tensor:
        """(score - mean) / std of the two rows of a group, on each token; `score` is one number a row."""
        out = torch.empty(6).double()
        for pair in ([0, 1], [2, 3], [4, 5]):
            x = score[pair]
            out[pair] = (x - x.mean()) / (x.std() + 1e-6)
        return out[self.t.row]

    def rows(self, x: Tensor) -> Tensor:
        return torch.stack([x[self.t.mask & (self.t.row == i)].sum() for i in range(6)])


def either(where: Tensor, yes: float, no: float) -> Tensor:
    """torch.where of two plain numbers, which would round them to float32."""
    return torch.where(where, torch.tensor(yes, dtype=torch.float64), torch.tensor(no, dtype=torch.float64))


def gmpo(c: Case) -> Tensor:
    d, a = c.r.log(), c.a
    held = torch.where(a > 0, d.clamp(max=0.4), d.clamp(min=-0.4))
    inside = torch.where(a > 0, d <= 0.4, d >= -0.4)
    return (c.per_row(held) / c.n).exp() * inside * a / c.n / 6


def sapo(c: Case) -> Tensor:
    tau = either(c.a > 0, 1.0, 1.05)
    s = torch.sigmoid(tau * (c.r - 1))
    return 4 * c.r * s * (1 - s) * c.a / c.n / 6


def ce_gppo(c: Case) -> Tensor:
    w = c.r.clone()
    w[(c.a > 0) & (c.r > 1.2)] = 1.2
    w[(c.a < 0) & (c.r < 0.8)] = 0.75 * 0.8
    w[(c.a < 0) & (c.r > 10)] = 0.0
    return w * c.a / 24


def dcpo(c: Case) -> Tensor:
    q = c.p / c.r
    low = 0.5 + 0.5 * (1 - 0.64 / q).clamp(min=0).sqrt()
    high = (0.5 + 0.5 * (1 + 0.8 / q).sqrt()).clamp(max=10)
    return c.r * c.a * torch.where(c.a > 0, c.r <= high, c.r >= low) / c.n / 6


def aspo(c: Case) -> Tensor:
    eps = either(c.chosen, 0.4, 0.2)
    inside = torch.where(c.a > 0, c.r <= 1 + eps, c.r >= 1 - eps)
    return torch.where(c.a > 0, 1 / c.r, c.r).clamp(max=3.0) * inside * c.a / 24


def bapo(c: Case) -> Tensor:
    low, high = balance_by_hand(c.t)
    return c.r * c.a * torch.where(c.a > 0, c.r <= high, (c.r >= low) & (c.r <= 3.0)) / 24


def balance_by_hand(t: Tokens) -> tuple[float, float]:
    """BAPO's ladder with the 24 tokens' sums written out."""
    r, a = (t.logprobs - t.behavior_logprobs).exp()[t.mask], t.advantages[t.mask]
    lows, highs = [0.6, 0.65, 0.7, 0.75, 0.8], [1.2 + 0.05 * i for i in range(17)]
    for low, high in [(x, 1.2) for x in lows] + [(0.8, x) for x in highs]:
        pull, push = (r * a)[(a > 0) & (r <= high)].sum(), -(r * a)[(a < 0) & (r >= low)].sum()
        if pull >= 0.5 * (pull + push):
            return low, high
    return 0.8, 2.0


def steer(c: Case) -> Tensor:
    omega = (c.a * (1 - c.p) * (c.logprobs + c.entropy)).abs()
    k = -math.log(0.8) / max(float(omega[c.t.mask].max()), 0.02)
    return torch.exp(-k * omega) * c.r * c.a * gate(c.a, c.r, 0.2, 0.28) / 24


def lean(c: Case) -> Tensor:
    alpha = 0.99 * (float(c.entropy[c.t.mask].mean()) - 0.5)
    weighed = torch.where(c.a > 0, (1 + alpha) * c.a, (1 - alpha) * c.a)
    return c.r * weighed * gate(c.a, c.r, 0.2, 0.2) / 24


def whitened(c: Case) -> Tensor:
    seen = c.a[c.t.mask]
    a = (c.a - seen.mean()) / (seen.var() + 1e-8).sqrt()
    return c.r * a * gate(a, c.r, 0.2, 0.2) / 24


def banded(c: Case) -> Tensor:
    mean = float(c.entropy[c.t.mask].mean())
    assert mean < 0.6, "below the band, reinforced tokens are rejected"
    return torch.where(c.a > 0, 0.0, c.r * c.a * gate(c.a, c.r, 0.2, 0.2)) / 24


def surprised(c: Case) -> Tensor:
    return c.r * c.a * torch.where(c.a > 0, 1 - 0.01 * c.logprobs, 1 + 0.01 * c.logprobs) / 24


def lifted(c: Case) -> Tensor:
    a = c.a + torch.minimum(0.4 * c.entropy, c.a.abs() / 2)
    return c.r * a * gate(a, c.r, 0.2, 0.28) / 24


def judged_by(score: Callable[[Case], Tensor]) -> Callable[[Case], Tensor]:
    def coefficient(c: Case) -> Tensor:
        a = c.group_scored(score(c))
        return c.r * a * gate(a, c.r, 0.2, 0.2) / c.n / 6

    return coefficient


def ppo(c: Case, low: float = 0.2, high: float = 0.2, dual: float = torch.inf) -> Tensor:
    return c.r * c.a * gate(c.a, c.r, low, high, dual)


def sequence(c: Case) -> Tensor:
    return (c.per_row(c.r.log()) / c.n).exp()


def gspo(c: Case) -> Tensor:
    s = sequence(c)
    return s * c.a * gate(c.a, s, 3e-4, 4e-4) / c.n / 6


def dppo(c: Case) -> Tensor:
    moved = c.p - c.behavior_logprobs.exp()
    inside = torch.where(c.a > 0, moved <= 0.15, moved >= -0.15)
    return c.rho.clamp(max=20.0) * inside * c.a / 3000 / 6


def mean_of(column: str) -> Callable[[Case], Tensor]:
    """Minus the mean over each row of a column, or of a statistic of that name."""

    def pick(c: Case) -> Tensor:
        return torch.where(c.t.mask, c.t.extra.get(column, getattr(c.t, column, None)), 0.0)

    return lambda c: -c.rows(pick(c)) / c.rows(torch.ones(N).double())


def by_stage(step: int, steps: int = 100, hold: float = 0.5) -> float:
    """Weight of reinforced tokens: 0 for half of the run, then in a straight line to 1 (arXiv 2511.05993)."""
    return min(1.0, max(0.0, (step - hold * steps) / (steps - hold * steps)))


def by_epoch(step: int, epoch: int = 25, epochs: int = 4) -> float:
    """(e - 1) / (E - 1) in epoch e of E, with epochs of 25 steps (arXiv 2511.05993)."""
    return min(1.0, (step // epoch) / (epochs - 1))


PUBLISHED = {
    "grpo": lambda c: ppo(c) / c.n / 6,
    "dr_grpo": lambda c: ppo(c) / 3000 / 6,
    "rloo": lambda c: c.r * c.a / 6,
    "reinforce": lambda c: c.r * c.a / 6,
    "dapo": lambda c: ppo(c, 0.2, 0.28, 10.0) / 24,
    "cispo": lambda c: c.r.clamp(max=5.0) * c.a / 24,
    "supervised": lambda c: c.a / 24,
    "entropy_bonus": lambda c: ppo(c) / c.n / 6,
    "psr": lambda c: ppo(c) * (c.a > 0) / 24,
    "nsr": lambda c: ppo(c) * (c.a < 0) / 24,
    "w_reinforce": lambda c: ppo(c) * either(c.a > 0, 0.1, 1.0) / 24,
    "clip_cov": lambda c: ppo(c, 1.0, 1.0) * ~c.chosen / 24,
    "random_positive_clip": lambda c: ppo(c) * ~c.chosen / 24,
    "kl_cov": lambda c: (c.r * c.a - c.chosen * c.r.log().sign()) / 24,
    "forking_tokens": lambda c: ppo(c, 0.2, 0.28, 10.0) * c.chosen / 4,
    "reinforce_pp": whitened,
    "opo": lambda c: c.r * c.a / 24,
    "gspo": gspo,
    "gspo_token": gspo,
    "gmpo": gmpo,
    "sapo": sapo,
    "dppo": dppo,
    "ce_gppo": ce_gppo,
    "bapo": bapo,
    "dcpo": dcpo,
    "aspo": aspo,
    "entropy_advantage": lifted,
    "positive_reweighting": lambda c: ppo(c, 0.2, 0.28) * (c.a < 0) / 24,
    "positive_reweighting_stage": lambda c: ppo(c) * either(c.a > 0, by_stage(c.t.step), 1.0) / 24,
    "positive_reweighting_epoch": lambda c: ppo(c) * either(c.a > 0, by_epoch(c.t.step), 1.0) / 24,
    "adaptive_entropy": lambda c: ppo(c) / 24,
    "entropic_pi": lean,
    "entrocraft_band": banded,
    "prorl": lambda c: (ppo(c, 0.2, 0.4) - 1e-3 * (c.logprobs - c.ref_logprobs)) / 24,
    "qae": lambda c: ppo(c, 0.2, 0.28) / 24,
    "repo_r": surprised,
    "adapo": lambda c: ppo(c, 0.2, 0.28) / 24,
    "clip_b": lambda c: ppo(c) * ~c.chosen / (~c.chosen & c.t.mask).sum(),
    "clip_v": lambda c: ppo(c) * ~c.chosen / (~c.chosen & c.t.mask).sum(),
    "steer": steer,
    "clamped_entropy": lambda c: ppo(c) / 24,
    "lp_reg": lambda c: c.r * c.a * (c.r <= 10) / 24,
    "self_certainty": judged_by(mean_of("mean_logprob")),
    "token_entropy": judged_by(mean_of("entropy")),
    "trajectory_entropy": judged_by(lambda c: c.rows(c.old_logprobs)),
    "raise_and_restrain": lambda c: ppo(c, 0.2, 0.28, 10.0) * either(c.a > 0, 0.5, 1.0) * ~c.chosen / 24,
}
"""The coefficient of grad log π in the objective to maximise, written from the papers."""
