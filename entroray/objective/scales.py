"""Tokens of the whole step -> a factor on each token's surrogate, before the update; all are multiplied."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from entroray.objective.bind import Fraction, Positive, declare
from entroray.types import Tokens


def selected(t: Tokens, *, inside: float = 1.0, outside: float = 0.0) -> Float[Tensor, " N"]:
    """Keep the selected tokens and drop the rest, or the other way round (80/20, arXiv 2506.01939).

    `inside where selected, outside elsewhere`
    """
    number = t.advantages.new_tensor  # torch.where of two plain numbers would round them to float32
    return torch.where(t.selected, number(inside), number(outside))


@declare(needs=["whole_step"])
def steer(t: Tokens, *, floor: Fraction = 0.8, least: Positive = 0.02) -> Float[Tensor, " N"]:
    """Damp the tokens that would move the entropy most, up or down (STEER, arXiv 2510.10150).

    `exp(-k |Ω|), Ω = A (1 - π)(log π + H), k = -log floor / max(max |Ω|, least)`
    Ω lacks a factor π against the exact change, so rare tokens are damped too much; the sign is right. The
    maximum is over the step, theirs over a micro-batch, and Ω is taken when the step begins.
    """
    p = t.logprobs.exp()
    omega = (t.advantages * (1 - p) * (t.logprobs + t.entropy)).abs()
    top = omega.max().clamp(min=least) if len(omega) else omega.new_tensor(least)
    return torch.exp(math.log(floor) * omega / top)
