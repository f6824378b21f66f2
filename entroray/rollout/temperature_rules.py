"""Entropy H and varentropy V of each next token -> how its distribution is reshaped before it is drawn.

Both are in nats (and nats^2), of the policy's own distribution at its own temperature, over the whole
vocabulary. A rule gives a factor on that temperature, within stated bounds, so that the log-prob of what
was drawn can always be stated.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from entroray.binding import NonNegative, Positive, declare
from entroray.errors import ConfigError

SETTING = "sampler.rule"


class TemperatureChoice(NamedTuple):
    """What a rule decides for each of n rows."""

    factor: Float[Tensor, " n"]
    """On the temperature; 0 takes the likeliest token."""
    unsure: Bool[Tensor, " n"] | None = None
    """Where a token may be inserted instead of one being drawn."""


@declare(neutral=True)
def fixed(entropy: Float[Tensor, " n"], varentropy: Float[Tensor, " n"]) -> TemperatureChoice:
    """The policy's own distribution, untouched.

    `1`
    """
    return TemperatureChoice(torch.ones_like(entropy))


def by_entropy(
    entropy: Float[Tensor, " n"],
    varentropy: Float[Tensor, " n"],
    *,
    minimum: Positive = 1.0,
    maximum: Positive = 1.3,
    start: NonNegative = 0.3,
    full: Positive = 2.0,
) -> TemperatureChoice:
    """Rises with H in a straight line from `minimum` at `start` nats to `maximum` at `full`, and stays there.

    `minimum + (maximum - minimum) clip((H - start) / (full - start), 0, 1)`
    After the per-token temperature of HAPO (arXiv 2509.16591), which heats by 5 % around a quantile of ln H;
    bounds and thresholds are ours. Never below 1, so that pi / b stays bounded: a cooler distribution has
    thinner tails than the policy's. With `minimum` above `maximum` it cools where H is high.
    """
    if full <= start:
        raise ConfigError(f"{SETTING}: full={full:g} nats must be above start={start:g}")
    rise = ((entropy - start) / (full - start)).clamp(0.0, 1.0)
    return TemperatureChoice(minimum + (maximum - minimum) * rise)


def quadrants(
    entropy: Float[Tensor, " n"],
    varentropy: Float[Tensor, " n"],
    *,
    low_entropy: NonNegative = 0.3,
    high_entropy: Positive = 2.5,
    low_varentropy: NonNegative = 1.2,
    high_varentropy: Positive = 2.5,
    certain: NonNegative = 0.0,
    unsure: Positive = 1.3,
    torn: Positive = 1.2,
    lost: Positive = 2.0,
) -> TemperatureChoice:
    """Four corners of (H, V), after entropix (November 2024, in nats) without its attention metrics.

    `H<low_entropy V<low_varentropy: certain, H>high_entropy: unsure, V>high_varentropy: torn, both: lost`
    `unsure` also needs V < low_varentropy; between the thresholds the factor is 1. A factor of 0 takes the
    likeliest token. Where it is unsure, `sampler.insert` may put a token of its own.
    """
    if high_entropy <= low_entropy or high_varentropy < low_varentropy:
        raise ConfigError(
            f"{SETTING}: corners overlap: low_entropy={low_entropy:g} must be below high_entropy="
            f"{high_entropy:g}, low_varentropy={low_varentropy:g} not above {high_varentropy:g}"
        )
    high, calm, spread = entropy > high_entropy, varentropy < low_varentropy, varentropy > high_varentropy
    sure = (entropy < low_entropy) & calm
    corners = ((certain, sure), (unsure, high & calm), (torn, ~high & spread), (lost, high & spread))
    factor = torch.ones_like(entropy)
    for value, here in corners:
        factor = torch.where(here, value, factor)
    return TemperatureChoice(factor, high & calm)
