"""Statistics of the distribution over the set that each token was drawn from, renormalised (README.md).

Of a set of k tokens k rows of the weight are gathered, a bounded number at a time: what it costs goes with
the sizes of the sets, not with the vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from entroray.kept_sets import KeptSets
from entroray.policy.head import PLAIN, Readout, TokenStats, token_stats
from entroray.policy.vocabulary_statistics import named

MASS, WHOLE = "kept_mass", "vocabulary_entropy"
"""Statistics that are of the whole vocabulary here too; the first has no gradient."""
MEMBERS = 1 << 22
"""Members of sets at a time, unless one set alone has more: 32 MiB in float64."""
GATHERED = 1 << 20
"""Numbers of the weight gathered at a time, as many as a tile of the head has; on a GPU CARD_GATHERED."""
CARD_GATHERED = 1 << 26


def kept_stats(
    hidden: Float[Tensor, "N D"],
    weight: Float[Tensor, "V D"],
    token_ids: Int[Tensor, " N"],
    temperature: Float[Tensor, " N"],
    kept: KeptSets,
    names: Sequence[str] = (),
    *,
    bias: Float[Tensor, " V"] | None = None,
    readout: Readout = PLAIN,
) -> dict[str, Float[Tensor, " N"]]:
    """`token_stats` of softmax(logits / temperature) over `kept` alone; NaN where a token has no set.

    A set of one token has log-prob 0, entropy 0 and gradient 0. `names` are over the set as well, but for
    `kept_mass`, its probability, and `vocabulary_entropy`, which comes with it, without a gradient then.
    """
    own = tuple(name for name in names if name not in (MASS, WHOLE))
    scaled = hidden if readout.hidden == 1.0 else hidden * readout.hidden
    out = _KeptStats.apply(scaled, weight, bias, token_ids, temperature, kept, readout, own)
    found = dict(zip((*TokenStats._fields, *own), out, strict=True))
    if WHOLE in names or MASS in names:
        with torch.set_grad_enabled(WHOLE in names and torch.is_grad_enabled()):
            whole = token_stats(hidden, weight, token_ids, temperature, bias=bias, readout=readout)
        mass = (whole["logprobs"] - found["logprobs"]).detach().exp()
        found |= {WHOLE: whole["entropy"], MASS: mass}
    return found


class _Members(NamedTuple):
    """Of the sets of n tokens, the K members."""

    tokens: Tensor  # [n] places among all N
    token: Tensor  # [K] index into `tokens`, rising
    ids: Tensor  # [K] of the vocabulary
    sizes: NDArray[np.int32]  # [n]


def _cut(kept: KeptSets, tokens: NDArray[np.int64], device: torch.device) -> Iterator[_Members]:
    """The sets of two and more of these tokens, about MEMBERS members at a time."""
    tokens = tokens[kept.sizes[tokens] > 1]
    ends = np.cumsum(kept.sizes[tokens], dtype=np.int64)
    for part in np.split(tokens, np.flatnonzero(np.diff(ends // MEMBERS)) + 1):
        if len(part):
            sets = kept.take(part)
            token, ids = sets.members()
            on = lambda x: torch.from_numpy(x.astype(np.int64)).to(device)
            yield _Members(on(part), on(token), on(ids), sets.sizes)


class _KeptStats(torch.autograd.Function):
    """As `head._TiledStats`: products are made anew for gradients, the weight is read where it lies then."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        temperature: Tensor,
        kept: KeptSets,
        readout: Readout,
        names: tuple[str, ...],
    ) -> Any:
        ctx.more, ctx.readout, ctx.kept = [named(name) for name in names], readout, kept
        ctx.weight, ctx.bias = weight, bias
        ctx.save_for_backward(hidden, ids, temperature)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        out = hidden.new_zeros((len(TokenStats._fields) + len(names), len(hidden)), dtype=wide)
        out[:, torch.from_numpy(kept.sizes == 0).to(out.device)] = torch.nan
        for part in _cut(kept, np.arange(len(hidden)), hidden.device):
            product = _products(hidden, weight, part, wide)
            out[:, part.tokens] = torch.stack(_statistics(ctx, product, part, ids, temperature)).to(wide)
        columns = tuple(column.clone() for column in out)  # no views of one tensor
        ctx.mark_non_differentiable(columns[2])
        return columns

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        hidden, ids, temperature = ctx.saved_tensors
        weight, bias, (_, trained, *_) = ctx.weight, ctx.bias, ctx.needs_input_grad
        sent = torch.stack([grad for index, grad in enumerate(grads) if index != 2])
        live = (sent != 0).any(0).nonzero()[:, 0].cpu().numpy()  # the others move nothing
        seen = torch.zeros(len(weight), dtype=torch.bool, device=hidden.device)
        for part in _cut(ctx.kept, live, hidden.device) if trained else ():
            seen[part.ids] = True
        place = seen.cumsum(0) - 1  # of rows in some set: no sum in FP32 is as large as a weight in bf16
        zeros = lambda *size: hidden.new_zeros(size, dtype=sent.dtype)
        of_hidden, of_bias = zeros(*hidden.shape), None if bias is None else zeros(len(weight))
        of_rows = zeros(int(seen.sum()), hidden.shape[1])
        for part in _cut(ctx.kept, live, hidden.device):
            slope = _slope(ctx, _products(hidden, weight, part, sent.dtype), part, ids, temperature, sent)
            if of_bias is not None:
                of_bias.index_add_(0, part.ids, slope)
            for some in _gathers(len(slope), hidden):
                token, word, dz = part.tokens[part.token[some]], part.ids[some], slope[some, None]
                of_hidden.index_add_(0, token, dz * weight[word].to(dz.dtype))
                if trained:
                    of_rows.index_add_(0, place[word], dz * hidden[token].to(dz.dtype))
        full = torch.zeros_like(weight) if trained else None
        if full is not None:
            full[seen] = of_rows.to(weight.dtype)
        of_bias = None if of_bias is None else of_bias.to(bias.dtype)
        return of_hidden.to(hidden.dtype), full, of_bias, *[None] * 5


def _gathers(members: int, hidden: Tensor) -> Iterator[slice]:
    step = max(1, (CARD_GATHERED if hidden.is_cuda else GATHERED) // hidden.shape[1])
    return (slice(start, start + step) for start in range(0, members, step))


def _products(hidden: Tensor, weight: Tensor, part: _Members, wide: torch.dtype) -> Tensor:
    """[K] hidden row times weight row, of every member."""
    token = part.tokens[part.token]
    rows = lambda some: (hidden[token[some]].to(wide), weight[part.ids[some]].to(wide))
    return torch.cat([torch.linalg.vecdot(*rows(some)) for some in _gathers(len(token), hidden)])


def _statistics(ctx: Any, product: Tensor, part: _Members, ids: Tensor, temperature: Tensor) -> list[Tensor]:
    """Log-prob, entropy, varentropy and further ones, [n] in float64, in which k terms add up to the same."""
    r, n, readout = part.token, len(part.tokens), ctx.readout
    z = (product if ctx.bias is None else product + ctx.bias[part.ids]).double() * readout.scale
    if readout.softcap is not None:
        z = readout.softcap * torch.tanh(z / readout.softcap)
    z = z / temperature[part.tokens].double()[r]
    add = lambda x: torch.zeros(n, dtype=z.dtype, device=z.device).index_add(0, r, x)
    top = torch.full_like(z[:n], -torch.inf).scatter_reduce(0, r, z.detach(), "amax")
    gap = (z - top[r]).clamp(min=-1e4)  # p is 0 there, and 0 * -inf were not a number
    logp = gap - add(gap.exp()).log()[r]
    p = logp.exp()
    entropy = -add(p * logp)
    variance = add(p * (logp + entropy[r]).square()).detach()
    own = add(torch.where(part.ids == ids[part.tokens].long()[r], logp, 0.0))
    return [own, entropy, variance, *_further(ctx.more, logp, part.sizes)]


def _further(
    more: Sequence[Callable[[Tensor], Tensor]], logp: Tensor, sizes: NDArray[np.int32]
) -> list[Tensor]:
    """Each statistic of every set: those of one size stand below each other."""
    columns, starts = [logp.new_zeros(len(sizes)) for _ in more], np.cumsum(sizes, dtype=np.int64) - sizes
    for size in np.unique(sizes) if more else ():
        rows = np.flatnonzero(sizes == size)
        at = torch.from_numpy(starts[rows][:, None] + np.arange(size)).to(logp.device)
        place = torch.from_numpy(rows).to(logp.device)
        columns = [c.index_copy(0, place, f(logp[at])) for c, f in zip(columns, more, strict=True)]
    return columns


@torch.enable_grad()
def _slope(
    ctx: Any, product: Tensor, part: _Members, ids: Tensor, temperature: Tensor, sent: Tensor
) -> Tensor:
    """[K] what the loss sends back to the products, by autograd."""
    product = product.detach().requires_grad_()
    own, entropy, _, *further = _statistics(ctx, product, part, ids, temperature)
    out, back = [own, entropy, *further], sent[:, part.tokens].double()
    return torch.autograd.grad(out, product, list(back))[0]
