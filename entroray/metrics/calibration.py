"""Is the policy as right as it is confident? Collapse shows as over-confidence (arXiv 2511.05993)."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from entroray.types import Group, Rollout, Verdict

BINS = 15


@dataclass(frozen=True)
class Reliability:
    """A reliability diagram: equally wide bins of [0, 1], means NaN where a bin is empty."""

    edges: NDArray[np.float64]  # [bins + 1]
    count: NDArray[np.int64]  # [bins]
    confidence: NDArray[np.float64]  # [bins] mean
    accuracy: NDArray[np.float64]  # [bins] mean


def expected_error(confidence: NDArray, correct: NDArray, bins: int = BINS) -> float:
    """ECE: |mean confidence - mean correct| of equally wide bins of [0, 1], weighted by their size.

    (arXiv 1706.04599, 15 bins.) A confidence of 1 belongs to the last bin.
    """
    gaps = np.bincount(_bin(confidence, bins), weights=confidence - correct, minlength=bins)
    return float(np.abs(gaps).sum() / len(confidence))


def reliability(confidence: NDArray, correct: NDArray, bins: int = BINS) -> Reliability:
    """The bins of `expected_error`, which is sum of count |confidence - accuracy| / sum of count."""
    index = _bin(confidence, bins)
    count = np.bincount(index, minlength=bins)
    with np.errstate(invalid="ignore"):
        means = [np.bincount(index, x, bins) / count for x in (confidence, correct)]
    return Reliability(np.linspace(0, 1, bins + 1), count, *means)


def _bin(confidence: NDArray, bins: int) -> NDArray[np.int64]:
    return np.minimum((confidence * bins).astype(int), bins - 1)


def auroc(score: NDArray, correct: NDArray) -> float:
    """Probability that a right answer scores above a wrong one, ties counting half; NaN without both.

    Computed from mean ranks (Mann and Whitney).
    """
    right = correct >= 1
    pairs = int(right.sum()) * int((~right).sum())
    if not pairs:
        return math.nan
    rank = mean_ranks(score)
    ones = int(right.sum())
    return float((rank[right].sum() - ones * (ones + 1) / 2) / pairs)


def mean_ranks(x: NDArray) -> NDArray[np.float64]:
    """[n] ranks from 1 for the smallest of `x`; equal values share the mean of their ranks."""
    _, place, count = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]


def brier(confidence: NDArray, correct: NDArray) -> float:
    """Mean squared distance of confidence from correctness (0 or 1)."""
    return float(np.square(confidence - correct).mean())


def consistency(group: Group) -> list[float]:
    """Self-consistency of each rollout: the share of its group with the same answer.

    NaN if the response has no answer or the group has one member.
    """
    votes = Counter(v.answer for v in group.verdicts if v.answer is not None)
    size = len(group.verdicts) if len(group.verdicts) > 1 else math.nan
    return [math.nan if v.answer is None else votes[v.answer] / size for v in group.verdicts]


def calibration(groups: Sequence[Group], mean_logprob: NDArray) -> dict[str, float]:
    """ECE and Brier score over rollouts, with self-consistency and exp(mean log-prob) [B] as confidence.

    Replayed rollouts are left out, and rollouts whose confidence is NaN.
    """
    fresh = [not r.replayed for g in groups for r in g.rollouts]
    groups = [keep_pairs(g, lambda r, _: not r.replayed) for g in groups]
    mean_logprob = mean_logprob[np.array(fresh, bool)]
    correct = np.array([v.correct for g in groups for v in g.verdicts], np.float64)
    share = np.array([c for g in groups for c in consistency(g)], np.float64)
    return {
        f"calibration/{kind}_{name}": score(*pair)
        for name, pair in known({"consistency": share, "logprob": np.exp(mean_logprob)}, correct).items()
        for kind, score in (("ece", expected_error), ("brier", brier))
    }


def known(confidences: Mapping[str, NDArray], correct: NDArray) -> dict[str, tuple[NDArray, NDArray]]:
    """Each confidence [B] where it is finite, with its correctness; one that never is, is left out."""
    there = {name: np.isfinite(confidence) for name, confidence in confidences.items()}
    return {name: (confidences[name][at], correct[at]) for name, at in there.items() if at.any()}


def keep_pairs(group: Group, keep: Callable[[Rollout, Verdict], bool]) -> Group:
    """The group without the rollouts that are not to be kept."""
    kept = [pair for pair in zip(group.rollouts, group.verdicts, strict=True) if keep(*pair)]
    return replace(group, rollouts=tuple(r for r, _ in kept), verdicts=tuple(v for _, v in kept))
