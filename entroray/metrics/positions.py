"""Where entropy sits in responses: by position, and in which tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

HIGH = 0.8
"""Quantile above which a token counts as uncertain (arXiv 2506.01939)."""
PLACES, FREQUENT = 64, 20


@dataclass(frozen=True)
class Place:
    """Tokens at positions first..last of their response."""

    first: int
    last: int
    tokens: int
    entropy: float
    """Mean, nats."""


@dataclass(frozen=True)
class Uncertain:
    """One word of the vocabulary where it was drawn at high entropy."""

    token_id: int
    count: int
    entropy: float
    """Mean over those draws, nats."""


def entropy_by_position(entropy: Sequence[NDArray], most: int = PLACES) -> list[Place]:
    """Mean entropy (nats) over responses at each position, or over equally wide runs where more than `most`.

    NaN is a token that nobody drew; a run without any drawn token is left out.
    """
    longest = max(map(len, entropy), default=0)
    wide = max(1, -(-longest // most))
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
    token_ids: NDArray, entropy: NDArray, quantile: float = HIGH, most: int = FREQUENT
) -> tuple[float, list[Uncertain]]:
    """The `quantile` of entropy (nats), and the tokens most often drawn above it: by count, then id."""
    threshold = float(np.quantile(entropy, quantile))
    high = entropy > threshold
    ids, place = np.unique(token_ids[high], return_inverse=True)
    count, total = np.bincount(place, minlength=len(ids)), np.bincount(place, entropy[high], len(ids))
    order = np.argsort(-count, kind="stable")[:most]
    return threshold, [Uncertain(int(ids[i]), int(count[i]), float(total[i] / count[i])) for i in order]
