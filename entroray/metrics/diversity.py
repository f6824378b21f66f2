"""Diversity of the responses to one prompt: n-grams, answers, pass@k."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from entroray.metrics.pass_at_k import pass_at_k, powers_of_two
from entroray.types import Group, MaskReason, Verdict

MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
REPEAT = 4
"""Length of the n-grams that count as repetition if they return within one response."""


@dataclass(frozen=True)
class Loops:
    """A response loops if its last n tokens, `shortest` to `longest`, stand there `count` times in a row."""

    count: int
    shortest: int = 1
    longest: int = 16

    def __call__(self, token_ids: Sequence[int] | NDArray[np.int32]) -> bool:
        """Whether `token_ids` end in such a loop."""
        ids = np.asarray(token_ids)
        for n in range(self.shortest, min(self.longest, len(ids) // self.count) + 1):
            tail = ids[-n * self.count :].reshape(self.count, n)
            if (tail == tail[0]).all():
                return True
        return False


def distinct(groups: Sequence[Group]) -> dict[str, float]:
    """Distinct n-grams / n-grams of a group, n = 1, 2, 3, mean over groups (distinct-n, arXiv 1510.03055).

    `repetition/share` is the share of a response's own 4-grams that it wrote before, mean over responses
    with any. Only tokens that the policy drew count; n-grams cross neither responses nor observations, and
    are compared by a 64-bit hash.
    """
    rollouts = [r for g in groups for r in g.rollouts]
    own = np.concatenate([np.empty(0, bool), *(r.observed < 0 for r in rollouts)])
    ids = np.concatenate([np.empty(0, np.int32), *(r.token_ids for r in rollouts)])[own]
    number = lambda counts: np.repeat(np.arange(len(counts)), counts)[own]
    row = number([r.length for r in rollouts])
    group = number([sum(r.length for r in g.rollouts) for g in groups])
    stretch = row + np.cumsum(~own)[own]  # rises from row to row, and at every observation
    metrics = {f"distinct/{n}": _share_distinct(ids, stretch, group, n) for n in (1, 2, 3)}
    metrics["repetition/share"] = 1 - _share_distinct(ids, stretch, row, REPEAT)
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def _share_distinct(ids: NDArray, stretch: NDArray, within: NDArray, n: int) -> float:
    """Mean over `within` of the share of distinct n-grams, each in one stretch; NaN without n-grams."""
    starts = max(0, len(ids) - n + 1)
    code = (within[:starts].astype(np.uint64) + np.uint64(1)) * MULTIPLIER
    for offset in range(n):
        code = (code ^ (code >> np.uint64(29)) ^ ids[offset : offset + starts].astype(np.uint64)) * MULTIPLIER
    inside = stretch[:starts] == stretch[n - 1 : n - 1 + starts]
    code, within = code[inside], within[:starts][inside]
    _, first = np.unique(code, return_index=True)
    size = int(within[-1]) + 1 if len(within) else 0
    total, seen = (np.bincount(index, minlength=size) for index in (within, within[first]))
    any_ = total > 0
    return float((seen[any_] / total[any_]).mean()) if any_.any() else math.nan


def answers(groups: Sequence[Group]) -> dict[str, float]:
    """Distinct answers in a group, the entropy (nats) of their shares, the share of rollouts without one.

    Replayed rollouts are left out.
    """
    fresh = [[v for r, v in zip(g.rollouts, g.verdicts, strict=True) if not r.replayed] for g in groups]
    given = [[v.answer for v in verdicts if v.answer is not None] for verdicts in fresh]
    rollouts = sum(map(len, fresh))
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

    `groups` are every draw (`Group.draws`). Only independent draws count: no second draws, branches, replayed
    or forced rollouts, and no groups whose slowest members were abandoned. Unbiased for each prompt, but not
    for the task if a filter chose the prompts. Empty without independent draws.
    """
    drawn = [independent for g in groups if (independent := _independent(g))]
    smallest = min(map(len, drawn), default=0)
    counts = [(len(verdicts), sum(v.correct for v in verdicts)) for verdicts in drawn]
    return {
        f"pass/{k}": sum(pass_at_k(n, c, k) for n, c in counts) / len(counts) for k in powers_of_two(smallest)
    }


def _independent(group: Group) -> list[Verdict]:
    """Verdicts on independent draws of the group."""
    if group.earlier or group.abandoned:
        return []
    pairs = zip(group.rollouts, group.verdicts, strict=True)
    forced = lambda r: any(span.why is MaskReason.FORCED for span in r.spans)
    return [v for r, v in pairs if not r.replayed and r.parent is None and not forced(r)]
