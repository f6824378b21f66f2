"""Step (1 is the first) -> the value of a setting; nothing is measured."""

import math
from collections.abc import Sequence

from entroray.binding import Count

SETTING = "control"


def constant(step: int, *, value: float) -> float:
    """The same at every step."""
    return value


def linear(step: int, *, start: float, end: float, steps: Count, first: Count = 1) -> float:
    """`start` up to step `first`, from there straight to `end` at step `steps`, then there."""
    return start + (end - start) * _part(step, first, steps)


def cosine(step: int, *, start: float, end: float, steps: Count, first: Count = 1) -> float:
    """`start` up to step `first`, from there along half a cosine to `end` at step `steps`, then there."""
    return end + (start - end) * (1 + math.cos(math.pi * _part(step, first, steps))) / 2


def stage(step: int, *, values: Sequence[float], until: Sequence[int]) -> float:
    """`values[i]` up to and with step `until[i]`, the last value after that."""
    if len(values) != len(until) + 1 or list(until) != sorted(until):
        raise ValueError(
            f"stage: {len(values)} values need {len(values) - 1} rising steps, got {list(until)}"
        )
    return values[sum(step > end for end in until)]


def _part(step: int, first: int, last: int) -> float:
    return min(1.0, max(0.0, (step - first) / max(1, last - first)))
