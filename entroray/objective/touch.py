"""How many tokens each rule of a row touched: a rule that touches none is a setting without effect."""

from collections import Counter
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Bool
from torch import Tensor

from entroray.objective.equation import Objective
from entroray.objective.view import visible
from entroray.types import Tokens

UNCOUNTED = ("everything", "none", "reinforce")
"""Choices that touch nothing."""


def rules(objective: Objective) -> list[str]:
    """Names of what `touched` and `touched_inside` count the tokens of."""
    o = objective
    chosen = [*o.shapes, o.select, *o.scales, o.correction, o.surrogate, *o.penalties]
    return sorted({_name(choice) for choice in chosen} - {*UNCOUNTED})


@torch.no_grad()
def touched(objective: Objective, t: Tokens) -> Counter[str]:
    """Tokens changed by each shape, chosen by select, weighted by each scale and the correction, by rule.

    `t` is the step before `credit`. `everything` and `none` are no rules.
    """
    seen, counts = visible(t), Counter[str]()
    for shape in objective.shapes:
        after = shape(seen)
        counts[_name(shape)] += _number(after != seen.advantages)
        seen = replace(seen, advantages=after)
    if _name(objective.select) != "everything":
        seen = replace(seen, selected=objective.select(seen))
        counts[_name(objective.select)] += _number(seen.selected)
    for scale in objective.scales:
        counts[_name(scale)] += _number(scale(seen) != 1)
    if _name(objective.correction) != "none":
        counts[_name(objective.correction)] += _number(objective.correction(seen) != 1)
    return counts


@torch.enable_grad()
def touched_inside(objective: Objective, t: Tokens) -> Counter[str]:
    """Tokens on which the surrogate differs from an unclipped -r A, and on which each penalty pulls, by rule.

    `t` is live or detached, credited either way.
    """
    leaves = _leaves(visible(t))
    seen = replace(leaves, advantages=_now(objective, leaves))
    plain = _slopes((-objective.ratio(seen) * seen.advantages).sum(), seen)
    gated = _slopes(objective.surrogate(seen, objective.ratio(seen)).sum(), seen)
    differs = [~torch.isclose(a, b, rtol=1e-4) for a, b in zip(gated, plain, strict=True)]
    counts = Counter({_name(objective.surrogate): _number(_any(differs))})
    for penalty in objective.penalties:
        counts[_name(penalty)] += _number(_any([s != 0 for s in _slopes(penalty(seen).sum(), seen)]))
    if _name(objective.surrogate) == "reinforce":
        del counts[_name(objective.surrogate)]
    return counts


@torch.enable_grad()
def silent(objective: Objective, t: Tokens) -> Bool[Tensor, " N"]:
    """Tokens in the mask, with an advantage, whose log-prob the loss is flat in: clipped or dropped."""
    leaves = _leaves(t)
    (slope,) = torch.autograd.grad(objective.loss(leaves), leaves.logprobs, materialize_grads=True)
    return t.mask & (t.advantages != 0) & (slope == 0)


def _leaves(t: Tokens) -> Tokens:
    leaf = lambda x: x.detach().requires_grad_()
    extra = {name: leaf(x) for name, x in t.extra.items()}
    return replace(t, logprobs=leaf(t.logprobs), entropy=leaf(t.entropy), extra=extra)


@torch.no_grad()
def _now(objective: Objective, t: Tokens) -> Tensor:
    for shape in objective.shapes:
        if getattr(shape.func, "live", False):
            t = replace(t, advantages=shape(t))
    return t.advantages


def _slopes(total: Tensor, t: Tokens) -> list[Tensor]:
    """Gradient in log-prob, entropy and every further statistic; 0 where there is none."""
    leaves = [t.logprobs, t.entropy, *t.extra.values()]
    if not total.requires_grad:
        return [torch.zeros_like(x) for x in leaves]
    return list(torch.autograd.grad(total, leaves, materialize_grads=True))


def _any(flags: list[Tensor]) -> Tensor:
    return torch.stack(flags).any(0)


def _number(flags: Tensor) -> int:
    return int(flags.sum())


def _name(choice: partial) -> str:
    return choice.func.__name__
