"""Exact entropy and varentropy of logits."""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def token_entropy(
    logits: Float[Tensor, "*N V"],
    temperature: float | Float[Tensor, "*N"],
    *,
    base: str = "nats",
) -> tuple[Float[Tensor, "*N"], Float[Tensor, "*N"]]:
    """Entropy H = sum p (-ln p) and varentropy sum p (-ln p - H)^2 of softmax(logits / temperature).

    Of logits of any shape, [N, V] or a model's own [B, T, V]. In nats and nats^2 unless `base` is "bits";
    computed in at least float32; a token of probability 0 (a logit of -inf, or an underflow) adds nothing.
    ValueError for an unknown base, or for a temperature that is not positive or is neither one number nor
    one for each position.
    """
    units = {"nats": 1.0, "bits": 1 / math.log(2)}
    if base not in units:
        raise ValueError(f"token_entropy: base is `nats` or `bits`, not `{base}`")
    heat = torch.as_tensor(temperature, device=logits.device)
    heat = heat.reshape(()) if heat.numel() == 1 else heat
    if not bool((heat > 0).all()):
        raise ValueError(f"token_entropy: temperature must be positive, not {temperature}")
    if heat.ndim and heat.shape != logits.shape[:-1]:
        wanted = list(logits.shape[:-1])
        raise ValueError(f"token_entropy: temperature has shape {list(heat.shape)}: one number, or {wanted}")
    wide = torch.promote_types(logits.dtype, torch.float32)
    logp = (logits.to(wide) / heat.to(wide)[..., None]).log_softmax(-1)
    p = logp.exp()
    surprisal = torch.where(p > 0, -logp, 0) * units[base]
    entropy = (p * surprisal).sum(-1)
    return entropy, (p * (surprisal - entropy[..., None]).square()).sum(-1)
