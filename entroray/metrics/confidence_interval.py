"""Percentile bootstrap intervals of means over seeds or prompts."""

from functools import cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

LEVEL, DRAWS = 0.95, 10_000
IN_MEMORY = 1 << 21
"""Drawn indices in memory at once."""


class Difference(NamedTuple):
    """Two means over the same prompts or seeds, and the interval of their difference."""

    first: float
    second: float
    low: float
    high: float

    @property
    def mean(self) -> float:
        return self.second - self.first

    @property
    def sign(self) -> str:
        """+ if the second is above, - if below, = if 0 lies in the interval: a tie."""
        return "+" if self.low > 0 else "-" if self.high < 0 else "="


@cache
def bootstrap_interval(
    values: tuple[float, ...], *, level: float = LEVEL, draws: int = DRAWS, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean, the same for the same values."""
    low, high = bootstrap_intervals(np.asarray(values)[:, None], level=level, draws=draws, seed=seed)[0]
    return float(low), float(high)


def bootstrap_intervals(
    values: Float[NDArray, "P M"], *, level: float = LEVEL, draws: int = DRAWS, seed: int = 0
) -> Float[NDArray, "M 2"]:
    """Interval of each column's mean over the P rows; a draw takes the same rows in every column."""
    rows, rng = len(values), np.random.default_rng(seed)
    at_once = max(1, IN_MEMORY // rows)
    sizes = [min(at_once, draws - done) for done in range(0, draws, at_once)]
    table = np.asarray(values, np.float64)
    sums = np.concatenate([_times_drawn(rng, size, rows) @ table for size in sizes])
    return np.quantile(sums / rows, [(1 - level) / 2, (1 + level) / 2], axis=0).T


def _times_drawn(rng: np.random.Generator, draws: int, rows: int) -> Float[NDArray, "draws P"]:
    """Counts of each row in each draw."""
    picked = rng.integers(rows, size=(draws, rows)) + rows * np.arange(draws)[:, None]
    return np.bincount(picked.ravel(), minlength=draws * rows).reshape(draws, rows).astype(float)


def paired_difference(first: Float[NDArray, " P"], second: Float[NDArray, " P"]) -> Difference:
    """Both means and the interval of second - first by rows, so that what the rows share cancels."""
    low, high = bootstrap_intervals((second - first)[:, None])[0]
    return Difference(float(first.mean()), float(second.mean()), float(low), float(high))
