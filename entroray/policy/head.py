"""Log-prob, entropy and varentropy of every token in one pass over hidden states, tile by tile.

In the learner this is the only place where logits exist: never more than one tile of them.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from entroray.policy.vocabulary_statistics import named

TILE_ELEMENTS = 1 << 23
"""Logits held at a time, rows x vocabulary: 32 MiB in FP32; a pass holds about four such buffers."""
CARD_TILE_ELEMENTS = 1 << 27
"""The same on a GPU, 0.5 GiB: smaller matrices would leave most of it idle."""


class Readout(NamedTuple):
    """How a model makes logits of its last hidden state h: c tanh(s (W (hidden h) + b) / c), or without c.

    `entroray.policy.families` measures it. Gemma 2 has a softcap of 30, Cohere a scale of 0.0625, MiniCPM3
    divides h by 10.
    """

    hidden: float = 1.0
    scale: float = 1.0
    softcap: float | None = None


PLAIN = Readout()


class TokenStats(NamedTuple):
    """Statistics of the distribution each token was drawn from, at its temperature, in nats."""

    logprobs: Float[Tensor, " N"]
    entropy: Float[Tensor, " N"]
    varentropy: Float[Tensor, " N"]


def token_stats(
    hidden: Float[Tensor, "N D"],
    weight: Float[Tensor, "V D"],
    token_ids: Int[Tensor, " N"],
    temperature: Float[Tensor, " N"],
    names: tuple[str, ...] = (),
    *,
    bias: Float[Tensor, " V"] | None = None,
    readout: Readout = PLAIN,
    tile_elements: int | None = None,
) -> dict[str, Float[Tensor, " N"]]:
    """Exact `TokenStats` and further `names` (FP32 or wider) of softmax(logits / temperature).

    The logits are hidden weight^T + bias, and what `readout` makes of them. Gradients flow to `hidden`,
    `weight` and `bias`, save through varentropy. `hidden[t]` is the state that predicts
    `token_ids[t]`. Logits of -inf are outcomes of probability 0.
    """
    tile = tile_elements or _tile_on(hidden.device)
    if readout.hidden != 1.0:
        hidden = hidden * readout.hidden
    out = _TiledStats.apply(hidden, weight, bias, token_ids, temperature, readout, tile, names)
    return dict(zip((*TokenStats._fields, *names), out, strict=True))


def _tile_on(device: torch.device) -> int:
    return CARD_TILE_ELEMENTS if device.type == "cuda" else TILE_ELEMENTS


def _tiles(rows: int, vocabulary: int, tile_elements: int) -> list[slice]:
    size = max(1, tile_elements // max(vocabulary, 1))
    return [slice(start, start + size) for start in range(0, rows, size)]


def _log_softmax(logits: Tensor, temperature: Tensor) -> Tensor:
    return (logits / temperature.to(logits.dtype)[:, None]).log_softmax(-1)


def _read_out(hidden: Tensor, weight: Tensor, bias: Tensor | None, readout: Readout) -> Tensor:
    logits = _logits(hidden, weight)
    if bias is not None:
        logits += bias
    if readout.scale != 1.0:
        logits *= readout.scale
    if readout.softcap is not None:
        logits = (logits / readout.softcap).tanh_().mul_(readout.softcap)
    return logits


def _slope(logits: Tensor, readout: Readout) -> Tensor | float | None:
    """Of the logits in hidden weight^T + bias; None where it is 1."""
    if readout.softcap is None:
        return None if readout.scale == 1.0 else readout.scale
    return (1.0 - (logits / readout.softcap).square()) * readout.scale


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """In FP32 or wider: rounded to bf16, a logit near 16 would be off by up to 1/16."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    if hidden.is_cuda and hidden.dtype != wide:
        return torch.mm(hidden, weight.T, out_dtype=wide)  # no copy of the weight
    return hidden.to(wide) @ weight.to(wide).T


def _surprise(logp: Tensor, p: Tensor) -> Tensor:
    """-p log p with 0 log 0 = 0."""
    return -(p * logp.masked_fill(p == 0, 0.0))


class _TiledStats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        temperature: Tensor,
        readout: Readout,
        tile: int,
        names: tuple[str, ...],
    ) -> Any:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        more = [named(name) for name in names]
        out = [torch.empty(len(hidden), dtype=wide, device=hidden.device) for _ in range(3 + len(more))]
        for rows in _tiles(len(hidden), len(weight), tile):
            logp = _log_softmax(_read_out(hidden[rows], weight, bias, readout), temperature[rows])
            p = logp.exp()
            entropy = _surprise(logp, p).sum(-1)
            out[0][rows] = logp.gather(-1, ids[rows, None].long()).squeeze(-1)
            out[1][rows] = entropy
            out[2][rows] = (p * (-logp.masked_fill(p == 0, 0.0) - entropy[:, None]).square()).sum(-1)
            for column, statistic in zip(out[3:], more, strict=True):
                column[rows] = statistic(logp)
        ctx.more = more
        ctx.save_for_backward(hidden, ids, temperature, out[1])
        ctx.weight, ctx.bias = weight, bias  # by reference: ZeRO-3 swaps the parameter's storage in between
        ctx.readout, ctx.tile = readout, tile
        ctx.mark_non_differentiable(out[2])
        return tuple(out)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        hidden, ids, temperature, entropy = ctx.saved_tensors
        weight, bias, readout = ctx.weight, ctx.bias, ctx.readout
        grad_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=entropy.dtype) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias, dtype=entropy.dtype) if ctx.needs_input_grad[2] else None
        for rows in _tiles(len(hidden), len(weight), ctx.tile):
            logits = _read_out(hidden[rows], weight, bias, readout)
            logp = _log_softmax(logits, temperature[rows])
            slope = _slope(logits, readout)
            del logits  # a tile less while the gradient is made
            dz = _logit_gradient(logp, ids[rows], entropy[rows], grads[0][rows], grads[1][rows])
            if ctx.more:
                dz += _further_gradient(logp, ctx.more, [g[rows] for g in grads[3:]])
            dz = dz / temperature[rows, None]
            if slope is not None:
                dz *= slope
            if grad_hidden is not None:
                grad_hidden[rows] = (dz.to(weight.dtype) @ weight).to(hidden.dtype)
            if grad_weight is not None:
                _add_product(grad_weight, dz.T, hidden[rows].to(dz.dtype))
            if grad_bias is not None:
                grad_bias += dz.sum(0)
        narrow = lambda grad, like: None if grad is None else grad.to(like.dtype)
        return grad_hidden, narrow(grad_weight, weight), narrow(grad_bias, bias), *[None] * 5


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b. On a GPU without a buffer of the weight's size; a CPU's fused sum rounds otherwise."""
    if total.is_cuda:
        total.addmm_(a, b)
    else:
        total += a @ b


def _logit_gradient(logp: Tensor, ids: Tensor, entropy: Tensor, g_logp: Tensor, g_entropy: Tensor) -> Tensor:
    """d log p_a / dz = onehot - p;  dH / dz = -p (log p + H)."""
    p = logp.exp()
    finite = logp.masked_fill(p == 0, 0.0)
    dz = -p * (g_logp[:, None] + g_entropy[:, None] * (finite + entropy[:, None]))
    return dz.scatter_add_(-1, ids[:, None].long(), g_logp[:, None].to(dz.dtype))


@torch.enable_grad()
def _further_gradient(logp: Tensor, more: list[Callable[[Tensor], Tensor]], grads: list[Tensor]) -> Tensor:
    """The gradient in the logits that further statistics send back, by autograd inside the tile."""
    z = logp.detach().requires_grad_()
    again = z.log_softmax(-1)  # log-probs are logits of their own softmax
    return torch.autograd.grad([statistic(again) for statistic in more], z, grads)[0]


class StreamedHead(nn.Module):
    """Stands where the head stood and keeps its parameters, so that ZeRO-3 gathers them as any module's."""

    bias: nn.Parameter | None

    def __init__(self, head: nn.Linear, readout: Readout = PLAIN):
        super().__init__()
        self.weight, self.readout = head.weight, readout
        self.register_parameter("bias", head.bias)

    def forward(
        self, hidden: Tensor, token_ids: Tensor, temperature: Tensor, more: Sequence[str] = ()
    ) -> dict[str, Tensor]:
        return token_stats(
            hidden, self.weight, token_ids, temperature, tuple(more), bias=self.bias, readout=self.readout
        )
