"""How many tokens each rule of a row acts on: a rule that acts on none is a setting without effect."""

from collections import Counter
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from entroray.binding import function_name, traits
from entroray.objective.masking import masked_in
from entroray.objective.objective import Objective, apply_shapes, live_shapes
from entroray.types import Tokens


def counted_functions(objective: Objective) -> list[str]:
    """Names of what `active_tokens` and `activity_inside` count the tokens of."""
    o = objective
    chosen = [*o.shapes, o.select, *o.scales, o.correction, o.surrogate, *o.penalties]
    return sorted({function_name(choice) for choice in chosen if _acts(choice)})


@torch.no_grad()
def active_tokens(objective: Objective, t: Tokens) -> Counter[str]:
    """Tokens changed by each shape, chosen by select, weighted by each scale and the correction, by rule.

    `t` is the step before `credit`. Neutral choices (`everything`, `none`) are no rules.
    """
    seen, counts = masked_in(t), Counter[str]()
    for shape in objective.shapes:
        after = shape(seen)
        counts[function_name(shape)] += int((after != seen.advantages).sum())
        seen = replace(seen, advantages=after)
    if _acts(objective.select):
        seen = replace(seen, selected=objective.select(seen))
        counts[function_name(objective.select)] += int(seen.selected.sum())
    for scale in objective.scales:
        counts[function_name(scale)] += int((scale(seen) != 1).sum())
    if _acts(objective.correction):
        counts[function_name(objective.correction)] += int((objective.correction(seen) != 1).sum())
    return counts


@torch.enable_grad()
def activity_inside(objective: Objective, t: Tokens) -> tuple[Bool[Tensor, " N"], dict[str, Tensor]]:
    """The tokens of `t`, live or detached, that no policy loss moves; on how many each rule acts, by rule.

    The first are in the mask, have an advantage, and are clipped or dropped; a penalty may move them all
    the same. A surrogate acts where it differs from an unclipped -r A, a penalty where it pulls. The counts
    are on the tokens' device.
    """
    leaves = _leaves(t)
    seen = masked_in(leaves)
    with torch.no_grad():
        seen = apply_shapes(seen, live_shapes(objective.shapes))
    ratio = objective.ratio(seen)
    terms = objective.surrogate(seen, ratio)
    pull = _slopes((objective.aggregate(seen) * (seen.correction * seen.scale * terms)).sum(), leaves)[0]
    counts: dict[str, Tensor] = {}
    if _acts(objective.surrogate):
        slopes = zip(
            _slopes(terms.sum(), leaves), _slopes(-(ratio * seen.advantages).sum(), leaves), strict=True
        )
        differs = [~torch.isclose(gated, plain, rtol=1e-4) for gated, plain in slopes]
        counts[function_name(objective.surrogate)] = torch.stack(differs).any(0).sum()
    for penalty in objective.penalties:
        pulls = [slope != 0 for slope in _slopes(penalty(seen).sum(), leaves)]
        name = function_name(penalty)
        counts[name] = torch.stack(pulls).any(0).sum() + counts.get(name, 0)
    return t.mask & (t.advantages != 0) & (pull == 0), counts


def gradient_weight(objective: Objective, t: Tokens) -> Float[Tensor, " N"]:
    """What multiplies grad ln p of each token in a small step from these log-probs, penalties left out.

    A times scale and correction where every token has the same share of the loss; in units of the mean share.
    """
    share = objective.aggregate(masked_in(t))
    return _pull(objective, t) / (share.mean() if len(share) else 1.0)


@torch.enable_grad()
def _pull(objective: Objective, t: Tokens) -> Float[Tensor, " N"]:
    leaves = _leaves(t)
    loss = objective.policy_loss(leaves)
    return -torch.autograd.grad(loss, leaves.logprobs, materialize_grads=True)[0]


def _leaves(t: Tokens) -> Tokens:
    leaf = lambda x: x.detach().requires_grad_()
    extra = {name: leaf(x) for name, x in t.extra.items()}
    return replace(t, logprobs=leaf(t.logprobs), entropy=leaf(t.entropy), extra=extra)


def _slopes(total: Tensor, t: Tokens) -> list[Tensor]:
    """Gradient in log-prob, entropy and every further statistic; 0 where there is none."""
    leaves = [t.logprobs, t.entropy, *t.extra.values()]
    if not total.requires_grad:
        return [torch.zeros_like(x) for x in leaves]
    return list(torch.autograd.grad(total, leaves, retain_graph=True, materialize_grads=True))


def _acts(choice: partial) -> bool:
    """Whether it is a rule at all: one that may have no effect with these settings is."""
    return traits(choice).neutral is not True
