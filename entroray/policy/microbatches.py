"""Rows -> micro-batches: cut at row boundaries, bounded by tokens, equal in number on every rank."""

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]
OVERHEAD = 64
"""Cost of a micro-batch besides its tokens, in tokens: at most 83 by two plans of 256 rows timed on a CPU."""


def cut_by_groups(group: NDArray, parts: int) -> list[Rows]:
    """Rows [B] of each of `parts` optimizer updates: whole groups, in order, as even as they come.

    Raises ValueError when there are fewer groups than updates.
    """
    ids = list(dict.fromkeys(group.tolist()))
    if len(ids) < parts:
        raise ValueError(f"{len(ids)} groups cannot fill {parts} updates: lower learner.updates_per_rollout")
    return [np.flatnonzero(np.isin(group, chunk)) for chunk in np.array_split(np.array(ids), parts)]


def plan_microbatches(lengths: NDArray, *, ranks: int, token_budget: int) -> list[list[Rows]]:
    """For each rank its micro-batches of rows, for `lengths` [B] padded to the longest in each.

    Rows of like length stand together, so that padding and `OVERHEAD` cost least in sum. Every rank gets the
    same number of micro-batches (some may be empty: a zero-weight forward), since ranks that differ are a
    crash under ZeRO-2 and 3. Rows longer than the budget stand alone.
    """
    order = np.argsort(-lengths, kind="stable")
    cuts = _cuts(lengths[order[::ranks]], token_budget)  # no other rank's row is longer than the first's
    return [[order[r::ranks][a:b] for a, b in pairwise(cuts)] for r in range(ranks)]


def _cuts(lengths: NDArray, budget: int) -> list[int]:
    """Where to cut rows of falling `lengths`: the least sum of OVERHEAD + rows x longest, within `budget`.

    Of many rows, a cut may be a few rows off: at most 1/8 of the budget.
    """
    rows = len(lengths)
    steps = np.clip(budget // (8 * np.maximum(lengths, 1)), 1, max(1, rows // 1024)).tolist()
    at = [0]
    while at[-1] < rows:
        at.append(min(rows, at[-1] + steps[at[-1]]))
    starts, ends, longest = np.array(at[:-1]), np.array(at[1:]), lengths[at[:-1]]
    reach = np.maximum(ends, starts + budget // np.maximum(longest, 1))  # of a micro-batch from each start
    first = np.searchsorted(reach, ends)  # earliest start of one that comes to each end
    before, cost = np.zeros(len(ends), dtype=np.int64), 0.0
    base = np.zeros(len(starts))  # a micro-batch from start to end costs base + end x longest
    for index, end in enumerate(ends):
        base[index] = cost + OVERHEAD - starts[index] * longest[index]
        low = first[index]
        costs = base[low : index + 1] + end * longest[low : index + 1]
        best = costs.argmin()
        before[index], cost = low + best, costs[best]
    cuts = [len(ends)]
    while cuts[-1]:
        cuts.append(int(before[cuts[-1] - 1]))
    return [at[cut] for cut in reversed(cuts)]
