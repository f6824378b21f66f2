"""Group, its rewards already shaped -> one advantage per rollout."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from entroray.objective.bind import Fraction, Positive, declare
from entroray.types import Group


@declare(min_group=2)
def center(group: Group) -> Float[Tensor, " G"]:
    """Reward minus the group's mean, exactly 0 where all are equal (Dr. GRPO, arXiv 2503.20783).

    `R - mean(R) over the group`
    """
    rewards = group.rewards
    alike = (rewards == rewards[0]).all()
    return torch.where(alike, torch.zeros_like(rewards), rewards - rewards.mean())


@declare(min_group=2)
def zscore(group: Group, *, eps: Positive = 1e-6) -> Float[Tensor, " G"]:
    """Centred, in units of the group's standard deviation (GRPO, arXiv 2402.03300; eps and Bessel of verl).

    `(R - mean(R)) / (std(R) + eps) over the group, Bessel`
    The authors' code returns the bare reward for a group of one; `check_group_size` refuses such a run.
    """
    centred = center(group)
    deviation = (centred.square().sum() / max(len(centred) - 1, 1)).sqrt()
    return centred / (deviation + eps)


@declare(min_group=2)
def leave_one_out(group: Group) -> Float[Tensor, " G"]:
    """Reward minus the mean of the others (RLOO, arXiv 2402.14740).

    `(R - mean(R)) G / (G - 1) over the group`
    """
    size = len(group.rollouts)
    return center(group) * size / max(size - 1, 1)


@declare(min_group=2)
def length_weighted(group: Group) -> Float[Tensor, " G"]:
    """Reward minus the mean weighted by response lengths: the least varying baseline (OPO, arXiv 2505.23585).

    `R - Σ L R / Σ L over the group`
    Made for one update a step, where the ratio is 1.
    """
    rewards, lengths = group.rewards, group.lengths.clamp(min=1e-9)
    alike = (rewards == rewards[0]).all()
    return torch.where(alike, torch.zeros_like(rewards), rewards - (lengths * rewards).sum() / lengths.sum())


@declare(min_group=2)
def quantile(group: Group, *, level: Fraction = 0.4, eps: Positive = 1e-6) -> Float[Tensor, " G"]:
    """Reward minus a quantile of the group's, in standard deviations: only the rare outcome teaches (QAE).

    `(R - Q(level)) / (std(R) + eps) over the group, Q the least reward that level of them do not exceed`
    With rewards of 0 and 1 wrong answers have A = 0 up to a pass rate of 1 - level, and right ones beyond it.
    No code of the authors' is public; a library's interpolating quantile gives fractional baselines.
    """
    rewards = group.rewards
    rank = max(1, math.ceil(level * len(rewards))) - 1
    deviation = center(group).square().sum().div(max(len(rewards) - 1, 1)).sqrt()
    return (rewards - rewards.sort().values[rank]) / (deviation + eps)


def raw(group: Group, *, baseline: float = 0.0) -> Float[Tensor, " G"]:
    """Reward minus a declared constant: REINFORCE with a constant baseline (Williams 1992).

    `R - baseline`
    In units of reward; no comparison inside the group, so a group of one is fine.
    """
    return group.rewards - baseline


def sign(group: Group) -> Float[Tensor, " G"]:
    """+1 for a right answer and -1 for a wrong one, without a baseline (PSR and NSR, arXiv 2506.01347).

    `+1 where correct, else -1`
    Reads `correct`, so shaped rewards do not reach it; the authors' code has rewards of 0 and 1 instead.
    """
    return 2 * group.correct - 1


def constant(group: Group, *, value: float = 1.0) -> Float[Tensor, " G"]:
    """The same advantage whatever the reward: each response is an example to copy (maximum likelihood).

    `value, whatever the reward`
    """
    return torch.full_like(group.rewards, value)
