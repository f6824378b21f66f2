"""The distance of an update's tokens from the policy that was scored, and which of them were clipped."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from entroray.types import Tokens

CLIPPED = ("clip_high_positive", "clip_high_negative", "clip_low_positive", "clip_low_negative")
SUMS = ("kl", "kl_k1", "silent", *CLIPPED)


@torch.no_grad()
def update_sums(live: Tokens, silent: Bool[Tensor, " N"]) -> dict[str, float]:
    """Sums over these tokens, which add up over micro-batches, ranks and updates.

    `clip_<side>_<sign>` counts tokens with a weight in which the loss is flat: their ratio is above
    (`high`) or below (`low`) 1, their advantage positive or negative. `kl` is k3 and `kl_k1` is k1 of
    KL(scored, live), nats.
    """
    log_ratio = (live.logprobs - live.old_logprobs)[live.mask].double()
    flat, up = silent[live.mask], live.advantages[live.mask] > 0
    weighed = (live.scale * live.correction)[live.mask] != 0  # else dropped before the update, not clipped
    count = lambda where: float((flat & weighed & where).sum())
    high, low = log_ratio > 0, log_ratio < 0
    return {
        "kl": float((torch.expm1(log_ratio) - log_ratio).sum()),
        "kl_k1": float((-log_ratio).sum()),
        "silent": float(flat.sum()),
        "clip_high_positive": count(high & up),
        "clip_high_negative": count(high & ~up),
        "clip_low_positive": count(low & up),
        "clip_low_negative": count(low & ~up),
    }


def update_metrics(sums: Sequence[Mapping[str, float]], tokens: float) -> dict[str, float]:
    """The `update_sums` of every part of a step as metrics per response token of its updates."""
    total = {name: sum(part[name] for part in sums) / max(1.0, tokens) for name in SUMS}
    silent = total.pop("silent")
    return {"objective/silent_tokens": silent} | {f"update/{name}": x for name, x in total.items()}
