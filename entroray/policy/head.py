"""Log-prob, entropy and varentropy of every token in one pass over hidden states, tile by tile.

In the learner this is the only place where logits exist: never more than one tile of them.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from entroray.policy.vocabulary_statistics import named

TILE_ELEMENTS = 1 << 20
"""Logits held at a time, rows x columns: two buffers of 4 MiB in FP32, near what caches of cores hold."""
COLUMNS = 1024
"""Of a tile at least, where the vocabulary has as many."""
WHOLE_ROW_ELEMENTS = 1 << 23
"""The same where a statistic sorts or renormalises a whole row: 32 MiB a buffer."""
CARD_TILE_ELEMENTS = 1 << 27
"""The same on a GPU, 0.5 GiB: smaller matrices would leave most of it idle."""
CARD_COLUMNS = 4096
"""Columns of a tile for kernels are a multiple of it, unless they are all."""
_LEAST = -1e4
"""Least log-prob in sums, p being 0 already: 0 * -inf were not a number."""


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
    kernels: bool | None = None,
) -> dict[str, Float[Tensor, " N"]]:
    """Exact `TokenStats` and further `names` (FP32 or wider) of softmax(logits / temperature).

    The logits are hidden weight^T + bias, and what `readout` makes of them. Gradients flow to `hidden`,
    `weight` and `bias`, save through varentropy. `hidden[t]` is the state that predicts
    `token_ids[t]`. Logits of -inf are outcomes of probability 0. `kernels`: by those of `head_kernels` in
    place of torch's operations, by default on a GPU; never with `names`, which need whole rows.
    """
    if readout.hidden != 1.0:
        hidden = hidden * readout.hidden
    kernels = not names and (_on_card(hidden.device) if kernels is None else kernels)
    if kernels:
        tile = _kernel_tile(len(hidden), len(weight), tile_elements or CARD_TILE_ELEMENTS)
    else:
        tile = _tile(hidden.shape, len(weight), hidden.device, bool(names), tile_elements)
    out = _TiledStats.apply(hidden, weight, bias, token_ids, temperature, readout, tile, names)
    return dict(zip((*TokenStats._fields, *names), out, strict=True))


class _Tile(NamedTuple):
    rows: int
    columns: int
    kernels: bool = False


def _on_card(device: torch.device) -> bool:
    return device.type == "cuda"


def _tile(
    shape: Sequence[int], vocabulary: int, device: torch.device, whole: bool, elements: int | None = None
) -> _Tile:
    """For states of `shape` (N, D); `whole`: a row's logits are needed at once."""
    card = _on_card(device)
    elements = elements or (CARD_TILE_ELEMENTS if card else WHOLE_ROW_ELEMENTS if whole else TILE_ELEMENTS)
    # few rows take more columns each; beyond COLUMNS the weight of a tile is no larger than the tile
    wanted = vocabulary if card or whole else min(max(COLUMNS, elements // max(*shape, 1)), elements)
    columns = max(1, min(vocabulary, wanted))
    return _Tile(max(1, elements // columns), columns)


def _kernel_tile(rows: int, vocabulary: int, elements: int) -> _Tile:
    """All rows and some columns: the weight's gradient is then one product, not added up of tiles of rows."""
    columns = min(vocabulary, max(1, elements // max(rows, 1) // CARD_COLUMNS) * CARD_COLUMNS)
    return _Tile(max(1, elements // columns), columns, kernels=True)


class _Moments(NamedTuple):
    """Of the logits z of one tile, under p = exp(z - top) / total; [n] each, or [tiles, N] of all."""

    top: Tensor
    total: Tensor
    mean: Tensor
    """Of z - top."""
    variance: Tensor

    @classmethod
    def of(cls, z: Tensor, spare: Tensor) -> "_Moments":
        """Of a tile [n, k]; it and `spare` are overwritten."""
        top = z.amax(-1, keepdim=True).clamp_(min=torch.finfo(z.dtype).min)
        p = torch.exp(z.sub_(top).clamp_(min=_LEAST), out=spare)
        total = p.sum(-1)
        share = total.clamp(min=1e-30).reciprocal_()
        mean = torch.linalg.vecdot(p, z) * share
        variance = torch.linalg.vecdot(p, z.sub_(mean[:, None]).square_()) * share
        return cls(top[:, 0], total, mean, variance)

    def joined(self) -> "_Moments":
        """Of whole rows, [N]: variance within tiles and between them."""
        top = self.top.amax(0)
        shift = (self.top - top).clamp_(min=_LEAST)
        weight = self.total * shift.exp()
        total = weight.sum(0)
        some = total.clamp(min=1e-30)  # as in `of`: blocks of a tile may hold no possible token, all of them
        means = self.mean + shift
        mean = (weight * means).sum(0) / some
        return _Moments(top, total, mean, (weight * (self.variance + (means - mean).square())).sum(0) / some)


class _Logits:
    """Logits / temperature of [n, D] states, a tile at a time, each written over the last.

    For kernels they are without the factor `late`, and behind a softcap its tanh.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        temperature: Tensor,
        readout: Readout,
        tile: _Tile,
    ):
        self.dtype = torch.promote_types(hidden.dtype, torch.float32)
        self.weight, self.bias, self.softcap = weight, bias, readout.softcap
        self.narrow = (tile.kernels or _on_card(hidden.device)) and hidden.dtype != self.dtype
        """Factors are in the narrow type, and products in the wide: no copy of the weight on a GPU."""
        self.temperature = temperature.to(self.dtype)[:, None]
        self.factor = readout.scale / self.temperature
        self.late = self.factor if readout.softcap is None else readout.softcap / self.temperature
        self.hidden = hidden if self.narrow else hidden.to(self.dtype)
        self.early = not (tile.kernels or self.narrow) and bias is None and readout.softcap is None
        """Whether states are divided by the temperature, n D numbers, in place of logits, n V."""
        self.states = self.hidden * self.factor if self.early else self.hidden
        self.scale, self.tile = readout.scale, tile
        self.even = _kernels().EVEN if tile.kernels else 1
        """Rows of a tile begin at multiples of it."""
        elements = min(tile.rows, len(hidden)) * self._pitch(min(tile.columns, len(weight)))
        spare = hidden.dtype if tile.kernels else self.dtype
        self.buffers = [hidden.new_empty(elements, dtype=x) for x in (spare, self.dtype)]

    def rows(self) -> Iterator[slice]:
        return _slices(len(self.hidden), self.tile.rows)

    def columns(self) -> Iterator[tuple[slice, Tensor]]:
        """Columns of a tile, and the weight of these: FP32 or wider, whatever the model's data type."""
        for columns in _slices(len(self.weight), self.tile.columns):
            part = self.weight[columns]
            yield columns, part if self.narrow else part.to(self.dtype)

    def _pitch(self, columns: int) -> int:
        return -(-columns // self.even) * self.even

    def tiles(self, rows: slice, columns: slice, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The tile, and a spare one of its size, for kernels of the model's data type."""
        states = self.states[rows]
        shape = len(states), self._pitch(len(weight))
        spare, z = (buffer[: shape[0] * shape[1]].view(shape)[:, : len(weight)] for buffer in self.buffers)
        if self.narrow:  # rounded to bf16, a logit near 16 would be off by up to 1/16
            torch.mm(states, weight.T, out_dtype=self.dtype, out=z)
        else:
            torch.mm(states, weight.T, out=z)
        return z if self.early else self._read_out(z, rows, columns), spare

    def _read_out(self, z: Tensor, rows: slice, columns: slice) -> Tensor:
        if self.bias is not None:
            z += self.bias[columns]
        if self.softcap is not None:
            z.mul_(self.scale / self.softcap).tanh_()
        return z if self.tile.kernels else z.mul_(self.late[rows])

    def moments(self, z: Tensor, spare: Tensor, rows: slice) -> _Moments:
        """Of a tile, which is overwritten but by kernels."""
        if not self.tile.kernels:
            return _Moments.of(z, spare)
        return _Moments(*_kernels().moments(z, self.late[rows])).joined()

    def slope(self, z: Tensor, rows: slice) -> Tensor | None:
        """Of the softcap, which made `z`."""
        if self.softcap is None:
            return None
        return 1.0 - (z * (self.temperature[rows] / self.softcap)).square_()


def _kernels() -> Any:
    """Triton comes with torch for CUDA, not with that for CPU."""
    from entroray.policy import head_kernels

    return head_kernels


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def _place(ids: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Where in these columns each token [n] is, [n, 1], and whether it is there at all."""
    at = ids.long()[:, None] - columns.start
    width = columns.stop - columns.start
    return at.clamp(0, width - 1), (at >= 0) & (at < width)


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
        tile: _Tile,
        names: tuple[str, ...],
    ) -> Any:
        logits = _Logits(hidden, weight, bias, temperature, readout, tile)
        more = [named(name) for name in names]
        further = [hidden.new_empty(len(hidden), dtype=logits.dtype) for _ in more]
        own = hidden.new_zeros(len(hidden), dtype=logits.dtype)
        count = -(-len(weight) // tile.columns)
        parts = _Moments(*hidden.new_empty((4, count, len(hidden)), dtype=logits.dtype))
        for index, (columns, part) in enumerate(logits.columns()):
            for rows in logits.rows():
                z, spare = logits.tiles(rows, columns, part)
                at, here = _place(ids[rows], columns)
                own[rows] += torch.where(here, z.gather(1, at), 0.0)[:, 0]
                for column, statistic in zip(further, more, strict=True):
                    column[rows] = statistic(z.log_softmax(-1))
                for whole, of_tile in zip(parts, logits.moments(z, spare, rows), strict=True):
                    whole[index, rows] = of_tile
        if tile.kernels:
            own *= logits.late[:, 0]
        top, total, mean, variance = parts.joined()
        log_total = total.log()
        out = own - top - log_total, log_total - mean, variance, *further
        ctx.more = more
        ctx.save_for_backward(hidden, ids, temperature, out[1], top + log_total)
        ctx.weight, ctx.bias = weight, bias  # by reference: ZeRO-3 swaps the parameter's storage in between
        ctx.readout, ctx.tile = readout, tile
        ctx.mark_non_differentiable(out[2])
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        sent = torch.stack([grad for index, grad in enumerate(grads) if index != 2])
        live = (sent != 0).any(0).nonzero()[:, 0]  # the others move nothing
        hidden, ids, temperature, entropy, logsumexp = (x[live] for x in ctx.saved_tensors)
        logits = _Logits(hidden, ctx.weight, ctx.bias, temperature, ctx.readout, ctx.tile)
        factors = sent[:, live, None] * logits.factor
        slopes = _Slopes(ids, entropy[:, None], logsumexp[:, None], factors, ctx.more)
        needs_hidden, *needed = ctx.needs_input_grad[:3]
        grad_hidden = torch.zeros_like(hidden, dtype=logits.dtype)
        held = zip((ctx.weight, ctx.bias), needed, strict=True)
        totals = [torch.zeros_like(x) if need else None for x, need in held]
        for columns, part in logits.columns():
            sums = [None if x is None else x[columns].to(logits.dtype) for x in totals]
            for rows in logits.rows():
                dz = slopes.of(*logits.tiles(rows, columns, part), rows, columns, logits).to(part.dtype)
                if needs_hidden:
                    _add_product(grad_hidden[rows], dz, part)
                if sums[0] is not None:
                    _add_product(sums[0], dz.T, logits.hidden[rows])
                if sums[1] is not None:
                    sums[1] += dz.sum(0, dtype=logits.dtype)
            for total, found in zip(totals, sums, strict=True):
                if total is not None and found is not None and total.dtype != found.dtype:
                    total[columns] = found  # else it is a view
        full = torch.zeros_like(ctx.saved_tensors[0]).index_copy_(0, live, grad_hidden.to(hidden.dtype))
        return full if needs_hidden else None, *totals, *[None] * 5


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, summed in the type of `total`, without a buffer of its size."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:  # bf16 on a GPU: no tensor core takes FP32 factors whole, and sums in bf16 lose what is small
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)


class _Slopes(NamedTuple):
    """What the loss sends back to logits / temperature."""

    ids: Tensor
    entropy: Tensor
    logsumexp: Tensor
    sent: Tensor
    """[2 + further, n, 1], times the slope of logits / temperature in hidden weight^T."""
    more: Sequence[Callable[[Tensor], Tensor]]

    def of(self, z: Tensor, spare: Tensor, rows: slice, columns: slice, logits: _Logits) -> Tensor:
        """d log p_a / dz = onehot - p;  dH / dz = -p (log p + H). Both tiles are overwritten."""
        if logits.tile.kernels:
            return self._by_kernel(z, spare, rows, columns, logits)
        further = _further_gradient(z, self.more, self.sent[2:, rows, 0]) if self.more else None
        bend = logits.slope(z, rows)
        g_logp, g_entropy = self.sent[0, rows], self.sent[1, rows]
        logp = z.sub_(self.logsumexp[rows]).clamp_(min=_LEAST)
        p = torch.exp(logp, out=spare)
        dz = logp.mul_(-g_entropy).sub_(g_logp + g_entropy * self.entropy[rows]).mul_(p)
        at, here = _place(self.ids[rows], columns)
        dz.scatter_add_(1, at, torch.where(here, g_logp, 0.0))
        if further is not None:
            dz += further
        return dz if bend is None else dz.mul_(bend)

    def _by_kernel(self, z: Tensor, out: Tensor, rows: slice, columns: slice, logits: _Logits) -> Tensor:
        ids, capped = self.ids[rows] - columns.start, logits.softcap is not None
        of_rows = self.logsumexp[rows], self.entropy[rows], *self.sent[:, rows]
        _kernels().slopes(z, logits.late[rows], out, ids, *of_rows, capped=capped)
        return out


@torch.enable_grad()
def _further_gradient(logits: Tensor, more: Sequence[Callable[[Tensor], Tensor]], grads: Tensor) -> Tensor:
    """The gradient in the logits that further statistics send back, by autograd inside the tile."""
    z = logits.detach().clone().requires_grad_()
    logp = z.log_softmax(-1)
    return torch.autograd.grad([statistic(logp) for statistic in more], z, list(grads))[0]
