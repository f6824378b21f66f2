"""The distance of an update's tokens from the policy that was scored, and which of them were clipped."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from entroray.types import Tokens

CLIPPED = ("clip_high_positive", "clip_high_negative", "clip_low_positive", "clip_low_negative")
SUMS = ("kl", "kl_k1", "silent", *CLIPPED)


@torch.no_grad()
def update_sums(live: Tokens, silent: Bool[Tensor, " N"]) -> dict[str, Tensor]:
    """Sums over these tokens, which add up over micro-batches, ranks and updates; still on the device.

    `clip_<side>_<sign>` counts tokens with a weight in which the loss is flat: their ratio is above
    (`high`) or below (`low`) 1, their advantage positive or negative. `kl` is k3 and `kl_k1` is k1 of
    KL(scored, live), nats.
    """
    log_ratio = torch.where(live.mask, live.logprobs - live.old_logprobs, 0.0).double()
    flat = silent & live.mask
    clipped = flat & (live.scale * live.correction != 0)  # else dropped before the update
    up, high, low = live.advantages > 0, log_ratio > 0, log_ratio < 0
    return {
        "kl": (torch.expm1(log_ratio) - log_ratio).sum(),
        "kl_k1": (-log_ratio).sum(),
        "silent": flat.sum(),
        "clip_high_positive": (clipped & high & up).sum(),
        "clip_high_negative": (clipped & high & ~up).sum(),
        "clip_low_positive": (clipped & low & up).sum(),
        "clip_low_negative": (clipped & low & ~up).sum(),
    }


def update_metrics(sums: Sequence[Mapping[str, float]], tokens: float) -> dict[str, float]:
    """The `update_sums` of every part of a step as metrics per response token of its updates."""
    total = {name: sum(part[name] for part in sums) / max(1.0, tokens) for name in SUMS}
    silent = total.pop("silent")
    return {"objective/silent_tokens": silent} | {f"update/{name}": x for name, x in total.items()}


@torch.no_grad()
def add_sums(
    sums: dict[str, Tensor], live: Tokens, loss: Tensor, flat: Tensor, counts: Mapping[str, Tensor]
) -> None:
    """Add those of a micro-batch to `sums`, on its device, which the host does not wait for.

    `flat` marks tokens without a gradient, `counts` those that each rule touched.
    """
    ratio = torch.where(live.mask, (live.logprobs - live.old_logprobs).exp(), 0.0).double()
    sums["ratio_max"] = torch.maximum(sums["ratio_max"], ratio.max() if len(ratio) else ratio.sum())
    own = {
        "loss": loss.detach(),
        "tokens": live.mask.sum(),
        "entropy": torch.where(live.mask, live.entropy, 0.0).sum(),
    }
    rules = {f"rule:{rule}": number for rule, number in counts.items()}
    for name, value in (own | update_sums(live, flat) | rules).items():
        sums[name] = sums.get(name, 0.0) + value.double()
