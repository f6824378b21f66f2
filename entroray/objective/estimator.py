"""Group, its rewards already shaped -> one advantage per rollout."""

import itertools
import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from entroray.binding import Fraction, Positive, declare
from entroray.errors import ConfigError
from entroray.ops import as_count
from entroray.types import Group, Rollout

SPANS = {"0..1": (0.0, 1.0), "-1..1": (-1.0, 1.0), "any": (-math.inf, math.inf)}


@declare(min_group=2)
def center(group: Group) -> Float[Tensor, " G"]:
    """Reward minus the group's mean, exactly 0 where all are equal (Dr. GRPO, arXiv 2503.20783).

    `R - mean(R) over the group`
    """
    rewards = group.rewards
    uniform_advantage = (rewards == rewards[0]).all()
    return torch.where(uniform_advantage, torch.zeros_like(rewards), rewards - rewards.mean())


@declare(min_group=2, in_deviations=True)
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
    """Reward minus the mean over the group's tokens: the baseline of least variance (OPO, arXiv 2505.23585).

    `R - Σ length R / Σ length over the group`
    """
    weights = group.lengths.clamp(min=1)
    uniform_advantage = (group.rewards == group.rewards[0]).all()
    baseline = (weights * group.rewards).sum() / weights.sum()
    return torch.where(uniform_advantage, torch.zeros_like(group.rewards), group.rewards - baseline)


@declare(min_group=2, in_deviations=True)
def quantile(group: Group, *, k: Fraction = 0.4, eps: Positive = 1e-6) -> Float[Tensor, " G"]:
    """Reward minus a quantile of the group's, in standard deviations (QAE, "quantile advantage estimation").

    `(R - Q) / (std(R) + eps), Q = the least R with at least k of the group at or below it; Bessel`
    With rewards of 0 and 1 only the rarer outcome is trained on. No interpolation, as in the text; the
    one-line library quantile would give fractional baselines at G = 8. k is a fraction.
    """
    rewards = group.rewards
    baseline = rewards.sort().values[max(0, as_count(k * len(rewards), math.ceil) - 1)]
    deviation = (center(group).square().sum() / max(len(rewards) - 1, 1)).sqrt()
    return (rewards - baseline) / (deviation + eps)


@declare(min_group=2, compares_siblings=True, in_deviations=lambda eps: eps is not None)
def subtree(group: Group, *, eps: Positive | None = 1e-6) -> Float[Tensor, " G"]:
    """What a response and its branches are worth beyond the place where it began (TreeRL, arXiv 2506.11902).

    `mean R of it and its branches - mean R of all that hold the tokens it began after; divided by
    std(R) + eps over the group, Bessel`
    Their local advantage, V(node) - V(parent), each V a mean over the leaves below; the division, which
    eps null leaves out, is ours. A response from the prompt began after nothing, so without branches this is
    `zscore`, or `center`. One number a row: a parent's tokens carry its value from its first to its last.
    Before a fork that is a mean over its k branches and itself; beyond it, what it did better than they did
    counts 1 / (1 + k). TreeRL cuts a response at its forks instead, and divides by sqrt(leaves).
    """
    below, beside = _kin(group)
    uniform_advantage = _spread(group.rewards, beside) == 0  # then 0 exactly, however the means were rounded
    gain = (_mean(group.rewards, below) - _mean(group.rewards, beside)).masked_fill(uniform_advantage, 0.0)
    if eps is None:
        return gain
    deviation = (center(group).square().sum() / max(len(gain) - 1, 1)).sqrt()
    return gain / (deviation + eps)


def _mean(rewards: Float[Tensor, " G"], kin: Bool[Tensor, "G G"]) -> Float[Tensor, " G"]:
    """Of the rewards that each row of `kin` marks."""
    return (kin * rewards).sum(-1) / kin.sum(-1)


def _spread(rewards: Float[Tensor, " G"], kin: Bool[Tensor, "G G"]) -> Float[Tensor, " G"]:
    """Range of the rewards that each row of `kin` marks."""
    highest = torch.where(kin, rewards, -math.inf).amax(-1)
    return highest - torch.where(kin, rewards, math.inf).amin(-1)


def _kin(group: Group) -> tuple[Bool[Tensor, "G G"], Bool[Tensor, "G G"]]:
    """below[i, j]: j is i or descends from it. beside[i, j]: j contains the tokens before i's fork."""
    rollouts = group.rollouts
    lines = [_line(rollouts, i) for i in range(len(rollouts))]
    below = [[i in line for line in lines] for i in range(len(rollouts))]
    beside = [
        [_common(rollouts, lines[i], line) >= rollouts[i].inherited for line in lines]
        for i in range(len(rollouts))
    ]
    return torch.tensor(below), torch.tensor(beside)


def _line(rollouts: Sequence[Rollout], index: int) -> list[int]:
    """From the response drawn from the prompt down to `index`."""
    parent = rollouts[index].parent
    return [index] if parent is None else [*_line(rollouts, parent), index]


def _common(rollouts: Sequence[Rollout], a: list[int], b: list[int]) -> int:
    """Tokens that the last of both lines have by descent in common."""
    shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
    if not shared:
        return 0
    parted = [rollouts[line[shared]].inherited for line in (a, b) if len(line) > shared]
    return min(parted, default=rollouts[a[-1]].length)


def _uniform(*, baseline: float, span: str) -> tuple[float, float]:
    """A of a group all wrong and of one all right."""
    return (-1.0 if span == "-1..1" else 0.0) - baseline, 1.0 - baseline


@declare(uniform_advantage=_uniform)
def raw(
    group: Group, *, baseline: float = 0.0, span: Literal["0..1", "-1..1", "any"] = "any"
) -> Float[Tensor, " G"]:
    """Reward minus a declared constant: REINFORCE with a constant baseline (Williams 1992).

    `R - baseline, R in span`
    In units of reward; no comparison inside the group, so a group of one is fine. A reward outside `span`
    is refused: a baseline for 0 and 1 is wrong for -1 and 1.
    """
    low, high = SPANS[span]
    if ((group.rewards < low) | (group.rewards > high)).any():
        raise ConfigError(
            f"estimator `raw` expects rewards in {span} and got {group.rewards.tolist()}: "
            "set objective.estimator.span to what your judge and `rewards` give, and the baseline with it"
        )
    return group.rewards - baseline


@declare(uniform_advantage=lambda: (-1.0, 1.0), needs_uniform_groups=True)
def sign(group: Group) -> Float[Tensor, " G"]:
    """+1 for a right answer and -1 for a wrong one, without a baseline (PSR and NSR, arXiv 2506.01347).

    `+1 where correct, else -1`
    Reads `correct`, so shaped rewards do not reach it; the authors' code has rewards of 0 and 1 instead.
    """
    return 2 * group.correct - 1


@declare(uniform_advantage=lambda value: (value, value))
def constant(group: Group, *, value: float = 1.0) -> Float[Tensor, " G"]:
    """The same advantage whatever the reward: each response is an example to copy (maximum likelihood).

    `value, whatever the reward`
    """
    return torch.full_like(group.rewards, value)
