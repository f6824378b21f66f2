"""Statistics of a whole step that a term inside the update reads: [N], the same number on every token."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from entroray.binding import declare
from entroray.ops import as_count, log_ratio
from entroray.types import Tokens


@declare(reads=["entropy"])
def mean_entropy(t: Tokens, **_: Any) -> Float[Tensor, " N"]:
    """Mean entropy of the step's tokens at its start, in nats."""
    return torch.full_like(t.entropy, float(t.entropy.mean()) if len(t.entropy) else 0.0)


@declare(reads=["logprobs"])
def balanced_low(t: Tokens, **settings: Any) -> Float[Tensor, " N"]:
    """The lower bound, a ratio, that BAPO's search ends at."""
    return torch.full_like(t.logprobs, balance(t, **settings)[0])


@declare(reads=["logprobs"])
def balanced_high(t: Tokens, **settings: Any) -> Float[Tensor, " N"]:
    """The upper bound, a ratio, that BAPO's search ends at."""
    return torch.full_like(t.logprobs, balance(t, **settings)[1])


def balance(t: Tokens, *, share: float, **settings: Any) -> tuple[float, float]:
    """The first bounds at which reinforced tokens carry `share` of Σ r |A| inside them; the last if none."""
    r, a = log_ratio(t.logprobs, t.behavior_logprobs).exp(), t.advantages
    for low, high in _ladder(**settings):
        pull = (r * a)[(a > 0) & (r <= high)].sum()
        push = -(r * a)[(a < 0) & (r >= low)].sum()
        if pull + push > 0 and pull >= share * (pull + push):
            break
    return low, high


def _ladder(
    *, least_low: float, most_low: float, least_high: float, most_high: float, stride: float, **_: Any
) -> Iterator[tuple[float, float]]:
    """The lower bound rises first, then the upper one."""
    yield from ((low, least_high) for low in _rungs(least_low, most_low, stride))
    yield from ((most_low, high) for high in _rungs(least_high, most_high, stride))


def _rungs(first: float, last: float, stride: float) -> list[float]:
    """From `first` up in steps of `stride`, and `last` itself."""
    return [first + i * stride for i in range(as_count((last - first) / stride, math.ceil))] + [last]
