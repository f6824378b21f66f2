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
    """Names of what `active_tokens` and `active_tokens_inside` count the tokens of."""
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
def active_tokens_inside(objective: Objective, t: Tokens) -> Counter[str]:
    """Tokens on which the surrogate differs from an unclipped -r A, and on which each penalty pulls, by rule.

    `t` is live or detached, credited either way.
    """
    leaves = _leaves(masked_in(t))
    with torch.no_grad():
        seen = apply_shapes(leaves, live_shapes(objective.shapes))
    counts = Counter[str]()
    if _acts(objective.surrogate):
        plain = _slopes((-objective.ratio(seen) * seen.advantages).sum(), seen)
        gated = _slopes(objective.surrogate(seen, objective.ratio(seen)).sum(), seen)
        differs = [~torch.isclose(a, b, rtol=1e-4) for a, b in zip(gated, plain, strict=True)]
        counts[function_name(objective.surrogate)] = int(torch.stack(differs).any(0).sum())
    for penalty in objective.penalties:
        pulls = [slope != 0 for slope in _slopes(penalty(seen).sum(), seen)]
        counts[function_name(penalty)] += int(torch.stack(pulls).any(0).sum())
    return counts


def flat_tokens(objective: Objective, t: Tokens) -> Bool[Tensor, " N"]:
    """Tokens in the mask, with an advantage, that the surrogate moves nowhere: clipped or dropped.

    A penalty may move them all the same.
    """
    return t.mask & (t.advantages != 0) & (_pull(objective, t) == 0)


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
    return list(torch.autograd.grad(total, leaves, materialize_grads=True))


def _acts(choice: partial) -> bool:
    """Whether it is a rule at all: one that may have no effect with these settings is."""
    return traits(choice).neutral is not True
