"""Rows -> micro-batches: cut at row boundaries, bounded by tokens, equal in number on every rank."""

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]


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

    Every rank gets the same number of micro-batches (some may be empty: a zero-weight forward), since
    ranks that differ are a crash under ZeRO-2 and 3. Rows longer than the budget stand alone.
    """
    order = np.argsort(-lengths, kind="stable")
    shares = [order[r::ranks] for r in range(ranks)]
    cut = [_fill(lengths, share, token_budget) for share in shares]
    count = max(1, *(len(c) for c in cut)) if cut else 1
    return [c + [np.empty(0, dtype=np.int64)] * (count - len(c)) for c in cut]


def _fill(lengths: NDArray, rows: Rows, budget: int) -> list[Rows]:
    """Greedy over rows sorted longest first, so that each micro-batch's width is its first row's length."""
    out: list[list[int]] = []
    for row in rows:
        if out and lengths[out[-1][0]] * (len(out[-1]) + 1) <= budget:
            out[-1].append(int(row))
        else:
            out.append([int(row)])
    return [np.array(rows, dtype=np.int64) for rows in out]
