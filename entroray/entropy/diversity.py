"""How different the responses to one prompt are: n-grams, answers, pass@k."""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from entroray.entropy.accuracy import pass_at_k
from entroray.types import Group

MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
REPEAT = 4
"""Length of the n-grams whose return within one response counts as repetition."""


def distinct(groups: Sequence[Group]) -> dict[str, float]:
    """Distinct n-grams / n-grams of a group, n = 1, 2, 3, mean over groups (distinct-n, arXiv 1510.03055).

    `repetition/share` is the share of a response's own 4-grams that it wrote before, mean over responses
    with any. N-grams do not cross responses; they are told apart by a 64-bit hash.
    """
    ids = np.concatenate([r.token_ids for g in groups for r in g.rollouts] or [np.empty(0, np.int32)])
    row = np.repeat(*_numbered([r.length for g in groups for r in g.rollouts]))
    group = np.repeat(*_numbered([sum(r.length for r in g.rollouts) for g in groups]))
    metrics = {f"distinct/{n}": _share_distinct(ids, row, group, n) for n in (1, 2, 3)}
    metrics["repetition/share"] = 1 - _share_distinct(ids, row, row, REPEAT)
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def _numbered(counts: Sequence[int]) -> tuple[NDArray[np.int64], list[int]]:
    return np.arange(len(counts)), list(counts)


def _share_distinct(ids: NDArray, row: NDArray, within: NDArray, n: int) -> float:
    """Mean over `within` of its share of n-grams that are distinct; NaN where there is no n-gram."""
    starts = max(0, len(ids) - n + 1)
    code = (within[:starts].astype(np.uint64) + np.uint64(1)) * MULTIPLIER
    for offset in range(n):
        code = (code ^ (code >> np.uint64(29)) ^ ids[offset : offset + starts].astype(np.uint64)) * MULTIPLIER
    whole = row[:starts] == row[n - 1 : n - 1 + starts]
    code, within = code[whole], within[:starts][whole]
    _, first = np.unique(code, return_index=True)
    size = int(within[-1]) + 1 if len(within) else 0
    total, seen = (np.bincount(index, minlength=size) for index in (within, within[first]))
    any_ = total > 0
    return float((seen[any_] / total[any_]).mean()) if any_.any() else math.nan


def answers(groups: Sequence[Group]) -> dict[str, float]:
    """Distinct answers in a group, the entropy (nats) of their shares, the share of rollouts with none."""
    given = [[v.answer for v in g.verdicts if v.answer is not None] for g in groups]
    rollouts = sum(len(g.verdicts) for g in groups)
    answered = [Counter(each) for each in given if each]
    metrics = {"answers/missing": 1 - sum(map(len, given)) / rollouts}
    if answered:
        metrics["answers/distinct"] = sum(map(len, answered)) / len(answered)
        metrics["answers/entropy"] = sum(map(_entropy, answered)) / len(answered)
    return metrics


def _entropy(counts: Counter) -> float:
    total = counts.total()
    return sum(c / total * math.log(total / c) for c in counts.values())


def pass_at(groups: Sequence[Group]) -> dict[str, float]:
    """pass@k for k = 1, 2, 4, ... up to the smallest group: 1 - C(n-c, k) / C(n, k) (arXiv 2107.03374).

    Unbiased for each prompt, not for the task where a filter chose the prompts.
    """
    least = min(len(g.verdicts) for g in groups)
    counts = [(len(g.verdicts), sum(v.correct >= 1 for v in g.verdicts)) for g in groups]
    ks = [2**i for i in range(least.bit_length()) if 2**i <= least]
    return {f"pass/{k}": sum(pass_at_k(n, c, k) for n, c in counts) / len(groups) for k in ks}
