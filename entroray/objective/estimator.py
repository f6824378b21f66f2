"""Group, its rewards already shaped -> one advantage per rollout."""

import torch
from jaxtyping import Float
from torch import Tensor

from entroray.objective.bind import Positive, declare
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
