"""The reward-entropy law R = -a exp(H) + b (arXiv 2505.22617): an early warning, never a stop rule."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

Z = 1.959964
"""Two-sided 95 % point of the normal distribution."""
MINIMUM_STEPS = 10


@dataclass(frozen=True)
class Law:
    """A least-squares fit, and the 95 % interval of its value at H = 0 for independent errors.

    Steps of one run are not independent, so the interval is too narrow rather than too wide.
    """

    a: float
    b: float
    low: float
    high: float
    r2: float
    """Share of reward's variance the fit explains."""

    @property
    def ceiling(self) -> float:
        """R at H = 0."""
        return self.b - self.a

    def metrics(self) -> dict[str, float]:
        """The fit under its names in metrics.jsonl."""
        fitted = {"a": self.a, "b": self.b, "ceiling": self.ceiling, "r2": self.r2}
        return {f"law/{name}": x for name, x in (fitted | {"low": self.low, "high": self.high}).items()}


def fit_law(entropy: Sequence[float], reward: Sequence[float]) -> Law | None:
    """Least squares of reward on exp(entropy), H in nats; None below 10 points, or if H does not vary."""
    n = len(entropy)
    x = [math.exp(h) for h in entropy]
    if n < MINIMUM_STEPS or max(x) - min(x) < 1e-9:
        return None
    mean_x, mean_y = sum(x) / n, sum(reward) / n
    sxx = sum((u - mean_x) ** 2 for u in x)
    sxy = sum((u - mean_x) * (r - mean_y) for u, r in zip(x, reward, strict=True))
    syy = sum((r - mean_y) ** 2 for r in reward)
    a, b = -sxy / sxx, mean_y - sxy / sxx * mean_x
    left = sum((r - b + a * u) ** 2 for u, r in zip(x, reward, strict=True))
    spread = math.sqrt(left / (n - 2) * (1 / n + (1 - mean_x) ** 2 / sxx))
    reach = student_quantile(n - 2) * spread
    return Law(a, b, b - a - reach, b - a + reach, 1 - left / syy if syy else 0.0)


def student_quantile(freedom: int) -> float:
    """97.5 % point of Student's t, to 0.1 % from 8 degrees of freedom up (Abramowitz and Stegun 26.7.5)."""
    first = (Z**3 + Z) / 4
    second = (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96
    third = (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / 384
    return Z + first / freedom + second / freedom**2 + third / freedom**3
