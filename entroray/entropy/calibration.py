"""Whether the policy is as right as it is sure: collapse shows as over-confidence (arXiv 2511.05993)."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from entroray.types import Group

BINS = 15


def expected_error(confidence: NDArray, correct: NDArray, bins: int = BINS) -> float:
    """ECE: |mean confidence - mean correct| of equally wide bins of [0, 1], weighted by their size.

    (arXiv 1706.04599, 15 bins.) A confidence of 1 belongs to the last bin.
    """
    index = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = np.bincount(index, weights=confidence - correct, minlength=bins)
    return float(np.abs(gaps).sum() / len(confidence))


def brier(confidence: NDArray, correct: NDArray) -> float:
    """Mean squared distance of confidence from correctness (0 or 1)."""
    return float(np.square(confidence - correct).mean())


def consistency(group: Group) -> list[float]:
    """Self-consistency of each rollout: the share of its group with its answer; 0 without an answer."""
    votes = Counter(v.answer for v in group.verdicts if v.answer is not None)
    return [votes[v.answer] / len(group.verdicts) if v.answer is not None else 0.0 for v in group.verdicts]


def calibration(groups: Sequence[Group], mean_logprob: NDArray) -> dict[str, float]:
    """ECE and Brier score over rollouts, of self-consistency and of exp(mean log-prob) [B] as confidence.

    A rollout without response tokens (NaN) has no say in the second.
    """
    correct = np.array([v.correct for g in groups for v in g.verdicts], np.float64)
    share = np.array([c for g in groups for c in consistency(g)], np.float64)
    known = np.isfinite(mean_logprob)
    measured = {"consistency": (share, correct)}
    if known.any():
        measured["logprob"] = (np.exp(mean_logprob[known]), correct[known])
    return {
        f"calibration/{kind}_{name}": score(*pair)
        for name, pair in measured.items()
        for kind, score in (("ece", expected_error), ("brier", brier))
    }
