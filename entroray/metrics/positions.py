"""Entropy by position in the response, and the tokens drawn at high entropy."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

HIGH = 0.8
"""Quantile above which a token counts as uncertain (arXiv 2506.01939)."""
PLACES, FREQUENT = 64, 20


@dataclass(frozen=True)
class Place:
    """Mean entropy (nats) of the tokens at positions first..last of their responses."""

    first: int
    last: int
    tokens: int
    entropy: float


@dataclass(frozen=True)
class Uncertain:
    """A token of the vocabulary: its draws at high entropy, and their mean entropy (nats)."""

    token_id: int
    count: int
    entropy: float


def entropy_by_position(entropy: Sequence[NDArray], maximum: int = PLACES) -> list[Place]:
    """Mean entropy (nats) over responses at each position, or at `maximum` equally wide runs of positions.

    NaN marks a token that nobody drew; a run without drawn tokens is left out.
    """
    longest = max(map(len, entropy), default=0)
    wide = max(1, -(-longest // maximum))
    flat = np.concatenate([np.empty(0), *entropy])
    run = np.concatenate([np.empty(0, int), *(np.arange(len(e)) // wide for e in entropy)])
    known = ~np.isnan(flat)
    count = np.bincount(run[known])
    total = np.bincount(run[known], flat[known])
    return [
        Place(int(i * wide), int(min((i + 1) * wide, longest) - 1), int(count[i]), float(total[i] / count[i]))
        for i in np.flatnonzero(count)
    ]


def uncertain_tokens(
    token_ids: NDArray, entropy: NDArray, quantile: float = HIGH, maximum: int = FREQUENT
) -> tuple[float, list[Uncertain]]:
    """The `quantile` of entropy (nats), and the tokens most often drawn above it: by count, then id."""
    threshold = float(np.quantile(entropy, quantile))
    high = entropy > threshold
    ids, place = np.unique(token_ids[high], return_inverse=True)
    count, total = np.bincount(place, minlength=len(ids)), np.bincount(place, entropy[high], len(ids))
    order = np.argsort(-count, kind="stable")[:maximum]
    return threshold, [Uncertain(int(ids[i]), int(count[i]), float(total[i] / count[i])) for i in order]
