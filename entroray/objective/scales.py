"""Tokens of the whole step -> a factor on each token's surrogate, before the update; all are multiplied."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from entroray.binding import Fraction, NonNegative, declare
from entroray.types import Tokens


@declare(reads=(), reads_selected=True, neutral=lambda inside, outside: inside == outside == 1)
def selected(t: Tokens, *, inside: float = 1.0, outside: float = 0.0) -> Float[Tensor, " N"]:
    """Keep the selected tokens and drop the rest, or the other way round (80/20, arXiv 2506.01939).

    `inside where selected, outside elsewhere`
    """
    number = t.advantages.new_tensor  # torch.where of two plain numbers would round them to float32
    return torch.where(t.selected, number(inside), number(outside))


@declare(needs=["whole_step"], reads=["logprobs", "entropy"])
def steady(t: Tokens, *, minimum: Fraction = 0.8, floor: NonNegative = 0.02) -> Float[Tensor, " N"]:
    """Damp tokens by how much they would move the entropy, whichever way (STEER, arXiv 2510.10150).

    `max(minimum, exp(-k |Ω|)), k = -ln(minimum) / max(max |Ω|, floor), Ω = A (1 - π) (log π + H)`
    Over the step and at its start, where r = 1; theirs is over a micro-batch, with r in Ω. Ω lacks a factor π
    and a baseline against the true change, so rare tokens are damped too much: as published.
    """
    moved = (t.advantages * (1 - t.logprobs.exp()) * (t.logprobs + t.entropy)).abs()
    largest = max(float(moved.max()) if len(moved) else 0.0, floor)
    if not largest:
        return torch.ones_like(moved)
    return torch.exp(math.log(minimum) / largest * moved).clamp(min=minimum)
