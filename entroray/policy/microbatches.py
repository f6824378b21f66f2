"""Rows -> micro-batches: whole rows, bounded by tokens, equal in number on every rank."""

from heapq import heappop, heappush
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]
OVERHEAD = 64
"""Cost of a micro-batch besides its tokens, in tokens: at most 83 by two plans of 256 rows timed on a CPU."""
CARD_OVERHEAD = 4096
"""On a GPU, whose host launches each layer: 0.12 s beside an H200, which trains 1.5B on 4,900 in them."""


def cut_by_groups(group: NDArray, parts: int) -> list[Rows]:
    """Rows [B] of each of `parts` optimizer updates: whole groups, in order, as even as they come.

    Raises ValueError when there are fewer groups than updates.
    """
    ids = list(dict.fromkeys(group.tolist()))
    if len(ids) < parts:
        raise ValueError(f"{len(ids)} groups cannot fill {parts} updates: lower learner.updates_per_rollout")
    return [np.flatnonzero(np.isin(group, chunk)) for chunk in np.array_split(np.array(ids), parts)]


def plan_microbatches(
    lengths: NDArray, *, ranks: int, token_budget: int, overhead: int = OVERHEAD
) -> list[list[Rows]]:
    """For each rank its micro-batches of rows, for `lengths` [B] padded to the longest in each.

    Rows of like length stand together, so that padding and `overhead` cost least in sum. Every rank gets the
    same number of micro-batches (some may be empty: a zero-weight forward), since ranks that differ are a
    crash under ZeRO-2 and 3. Rows longer than the budget stand alone.
    """
    order = np.argsort(-lengths, kind="stable")
    first = lengths[order[::ranks]]  # no other rank's row is longer than the first's
    cuts = _cuts(first, token_budget, overhead)
    return [[order[r::ranks][a:b] for a, b in pairwise(cuts)] for r in range(ranks)]


def plan_on_card(lengths: NDArray, *, ranks: int, token_budget: int) -> list[list[Rows]]:
    """As `plan_microbatches`, at what a micro-batch costs on a GPU."""
    return plan_microbatches(lengths, ranks=ranks, token_budget=token_budget, overhead=CARD_OVERHEAD)


def plan_packed(lengths: NDArray, *, ranks: int, token_budget: int) -> list[list[Rows]]:
    """As `plan_microbatches`, for rows laid end to end: bounded by the sum of their `lengths`.

    First-fit decreasing says how many micro-batches are enough: at most 11/9 of the fewest and one more.
    Where they still fit, rows are spread over as many evenly (longest first, to the emptiest), so that ranks
    wait least for each other; else they stay as first fit has them.
    """
    order = np.argsort(-lengths, kind="stable")
    fitted = _first_fit(lengths[order], token_budget)
    count = -(-len(fitted) // ranks) * ranks
    spread = _spread(lengths[order], count)
    fits = all(len(rows) < 2 or lengths[order[rows]].sum() <= token_budget for rows in spread)
    parts = spread if fits else fitted + [[] for _ in range(count - len(fitted))]
    micros = [order[np.array(rows, dtype=np.int64)] for rows in parts]
    micros.sort(key=lambda rows: -int(lengths[rows].sum()))
    return [micros[rank::ranks] for rank in range(ranks)]


def _first_fit(lengths: NDArray, budget: int) -> list[list[int]]:
    """Rows of falling `lengths`, each in the first micro-batch with room; one above `budget` stands alone."""
    parts: list[list[int]] = []
    room = np.zeros(len(lengths), dtype=np.int64)
    for row, length in enumerate(lengths.tolist()):
        fits = room[: len(parts)] >= length
        at = int(fits.argmax()) if fits.any() else len(parts)
        if at == len(parts):
            parts.append([])
            room[at] = budget
        parts[at].append(row)
        room[at] -= length
    return parts


def _spread(lengths: NDArray, count: int) -> list[list[int]]:
    """Rows of falling `lengths`, each to the one of `count` micro-batches with the fewest tokens."""
    parts: list[list[int]] = [[] for _ in range(count)]
    loads = [(0, at) for at in range(count)]
    for row, length in enumerate(lengths.tolist()):
        load, at = heappop(loads)
        parts[at].append(row)
        heappush(loads, (load + length, at))
    return parts


def _cuts(lengths: NDArray, budget: int, overhead: int) -> list[int]:
    """Where to cut rows of falling `lengths`: the least sum of `overhead` + rows x longest, within `budget`.

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
        base[index] = cost + overhead - starts[index] * longest[index]
        low = first[index]
        costs = base[low : index + 1] + end * longest[low : index + 1]
        best = costs.argmin()
        before[index], cost = low + best, costs[best]
    cuts = [len(ends)]
    while cuts[-1]:
        cuts.append(int(before[cuts[-1] - 1]))
    return [at[cut] for cut in reversed(cuts)]
