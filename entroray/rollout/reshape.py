"""How a sampler that looks at entropy reshapes logits (README.md here); the engine's side is in `workers`."""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from entroray.binding import bind
from entroray.ops import FLOOR
from entroray.rollout import temperature_rules

FIXED = {"fn": "fixed"}


def build_rule(
    spec: Mapping[str, Any], packages: Iterable[str] = ()
) -> partial[temperature_rules.TemperatureChoice]:
    """The rule `{fn: name, setting: value, ...}`; ConfigError names what is unknown, mistyped or overlaps."""
    rule = bind(temperature_rules, spec or FIXED, packages)
    nothing = torch.zeros(0)
    rule(nothing, nothing)  # what contradicts itself says so now, not in an engine
    return rule


def measure_entropy(
    logits: Float[Tensor, "n V"],
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Entropy (nats) and varentropy (nats^2) of softmax(logits), in float32: `token_entropy` in fewer passes.

    With x = z - max z: H = ln sum e^x - E x and varentropy = E x^2 - (E x)^2, one exponential for both.
    """
    x = (logits - logits.amax(-1, keepdim=True)).clamp_(min=FLOOR)  # 0 x -inf is no number; 0 x FLOOR is 0
    weight = x.exp()
    total = weight.sum(-1)
    weight.mul_(x)
    mean, squares = weight.sum(-1) / total, weight.mul_(x).sum(-1) / total
    return total.log() - mean, (squares - mean.square()).clamp_(min=0.0)


def reshape_logits(logits: Float[Tensor, "n V"], factor: Float[Tensor, " n"]) -> Float[Tensor, "n V"]:
    """Logits over their factor, in place; where it is 0 the likeliest token alone remains."""
    greedy = factor == 0
    logits.div_(torch.where(greedy, 1.0, factor)[:, None])
    if logits.is_cuda:  # to ask whether any is would wait for the card
        keep_where(logits, greedy, logits.argmax(-1))
    elif bool(greedy.any()):
        rows = greedy.nonzero().squeeze(-1)
        keep_only(logits, rows, logits[rows].argmax(-1))
    return logits


def keep_only(logits: Float[Tensor, "n V"], rows: Int[Tensor, " m"], tokens: Int[Tensor, " m"]) -> None:
    """Leave one token to each of `rows`, in place: its probability becomes exactly 1."""
    logits[rows] = -torch.inf
    logits[rows, tokens] = 0.0


def keep_where(logits: Float[Tensor, "n V"], here: Bool[Tensor, " n"], tokens: Int[Tensor, " n"]) -> None:
    """`keep_only` of the rows where `here` is true, without looking where that is."""
    kept = torch.where(here, 0.0, logits.gather(-1, tokens[:, None]).squeeze(-1))
    logits.masked_fill_(here[:, None], -torch.inf).scatter_(-1, tokens[:, None], kept[:, None])
