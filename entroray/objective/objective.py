"""The equation: what a row of choices computes, before the update and inside it."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from entroray.binding import bind, effective_settings, function_name, slot_functions, slot_name, traits
from entroray.errors import ConfigError, nearest
from entroray.formula import describe_formula
from entroray.objective import (
    aggregate,
    correction,
    denominator,
    estimator,
    keep,
    penalties,
    ratio,
    rewards,
    scales,
    select,
    shapes,
    surrogate,
)
from entroray.objective.masking import count_tokens, masked_in, scatter_masked
from entroray.rows import objective_row
from entroray.types import Counts, Group, Tokens

MANY = (rewards, shapes, scales, penalties)
ONE = (keep, estimator, select, correction, ratio, surrogate, aggregate, denominator)
SLOTS = {slot_name(module): module for module in (*MANY, *ONE)}
DEFAULTS = {"keep": "always", "select": "everything", "correction": "none", "ratio": "token"}
PROMISES = frozenset({"entropy_grad", "whole_step"})
"""Needs that are about how tokens come, not about which fields they carry."""


@dataclass(frozen=True)
class Objective:
    """One function per slot, settings applied: pure, picklable, the same on every rank."""

    rewards: tuple[partial[Tensor], ...]
    keep: partial[bool]
    estimator: partial[Tensor]
    shapes: tuple[partial[Tensor], ...]
    select: partial[Tensor]
    scales: tuple[partial[Tensor], ...]
    correction: partial[Tensor]
    ratio: partial[Tensor]
    surrogate: partial[Tensor]
    penalties: tuple[partial[Tensor], ...]
    aggregate: partial[Tensor]
    divisor: partial[float]

    def slot(self, name: str) -> tuple[partial, ...]:
        """The functions of a slot by its name in conf/, which may hold one or several."""
        held = self.divisor if name == "denominator" else getattr(self, name)
        return held if isinstance(held, tuple) else (held,)

    def shape_rewards(self, group: Group) -> Float[Tensor, " G"]:
        """The verdicts' rewards and what this row adds to them."""
        return sum((term(group) for term in self.rewards), start=group.rewards)

    def estimate(self, group: Group) -> Float[Tensor, " G"]:
        """One advantage per rollout, from the shaped rewards."""
        if not self.rewards:
            return self.estimator(group)
        rewards = self.shape_rewards(group).tolist()
        verdicts = tuple(replace(v, reward=r) for v, r in zip(group.verdicts, rewards, strict=True))
        return self.estimator(replace(group, verdicts=verdicts))

    @torch.no_grad()
    def credit(self, t: Tokens) -> Tokens:
        """Advantages, selection, scale, correction and step statistics, with the whole step in view.

        Once per step. Live shapes are in what the others see here, and left out of the advantages given back.
        """
        seen = _shown(t, (*self.shapes, self.select, *self.scales, self.correction))
        settled = apply_shapes(seen, [s for s in self.shapes if not traits(s).live])
        seen = apply_shapes(settled, live_shapes(self.shapes))
        seen = replace(seen, selected=self.select(seen))
        scale = math.prod((s(seen) for s in self.scales), start=torch.ones_like(seen.advantages))
        filled = replace(
            t,
            advantages=scatter_masked(settled.advantages, t.mask),
            selected=scatter_masked(seen.selected, t.mask),
            scale=scatter_masked(scale, t.mask),
            correction=scatter_masked(self.correction(seen), t.mask),
            extra={**t.extra, **{k: scatter_masked(v, t.mask) for k, v in self._statistics(seen).items()}},
        )
        return replace(filled, counts=count_tokens(filled))

    def _statistics(self, seen: Tokens) -> dict[str, Tensor]:
        """What terms inside the update want to know of the whole step."""
        inside = (self.ratio, self.surrogate, *self.penalties)
        wanted = [(c, name, fn) for c in inside for name, fn in before(c).items()]
        return {name: fn(seen, **effective_settings(choice)) for choice, name, fn in wanted}

    def loss(self, t: Tokens) -> Float[Tensor, ""]:
        """These tokens' part of the numerator; parts add up however the update was cut."""
        seen = self._inside(t)
        terms = sum((p(seen) for p in self.penalties), start=self._policy(seen))
        return (self.aggregate(seen) * terms).sum()

    def policy_loss(self, t: Tokens) -> Float[Tensor, ""]:
        """`loss` without the penalties."""
        seen = self._inside(t)
        return (self.aggregate(seen) * self._policy(seen)).sum()

    def _inside(self, t: Tokens) -> Tokens:
        """What functions inside the update are shown."""
        seen = _shown(t, (self.ratio, self.surrogate, *self.penalties, self.aggregate))
        with torch.no_grad():
            return apply_shapes(seen, live_shapes(self.shapes))

    def _policy(self, seen: Tokens) -> Float[Tensor, " N"]:
        return seen.correction * seen.scale * self.surrogate(seen, self.ratio(seen))

    def denominator(self, counts: Counts) -> float:
        """What an update's numerators are divided by; 1 where that count is 0, as then the loss is."""
        return self.divisor(counts) or 1.0

    @property
    def statistics(self) -> tuple[str, ...]:
        """Statistics of the distribution to be provided in `Tokens.extra`, live inside the update."""
        return tuple(sorted(self.needs - PROMISES - {f.name for f in fields(Tokens)}))

    @property
    def needs(self) -> frozenset[str]:
        """What must be provided beyond the plain fields of `Tokens`: see `binding.Traits`."""
        return frozenset().union(*map(function_needs, self.choices()))

    def choices(self) -> Iterator[partial]:
        """Every bound function, in the order of the equation."""
        for field in fields(self):
            value = getattr(self, field.name)
            yield from value if isinstance(value, tuple) else (value,)

    def describe(self) -> str:
        """The equation in effect, numbers and denominator included, for a run's header."""
        lines = {
            "keep if": describe_formula(self.keep),
            "reward R": " + ".join(["verdict", *map(describe_formula, self.rewards)]),
            "advantage A": ", then ".join(map(describe_formula, [self.estimator, *self.shapes])),
            "selected": describe_formula(self.select),
            "scale w": " × ".join(map(describe_formula, self.scales)) or "1",
            "correction c": describe_formula(self.correction),
            "ratio r": describe_formula(self.ratio),
            "surrogate S": describe_formula(self.surrogate),
            "penalties P": " + ".join(f"[{describe_formula(p)}]" for p in self.penalties) or "0",
            "share s": describe_formula(self.aggregate),
            "denominator": f"{describe_formula(self.divisor)}, on all ranks",
        }
        body = "\n".join(f"  {name:<13}{text}" for name, text in lines.items())
        return f"loss = Σ s (c w S + P) / denominator, over response tokens\n{body}"


def function_needs(choice: partial) -> frozenset[str]:
    return frozenset(n.format(**effective_settings(choice)) for n in traits(choice).needs)


def before(choice: partial) -> Mapping[str, Callable]:
    """The step statistics that a function inside the update reads with its settings, by name."""
    declared = traits(choice).before
    return declared(**effective_settings(choice)) if callable(declared) else declared


def live_shapes(shapes: Iterable[partial]) -> list[partial]:
    """Those of the current policy, applied again in every update."""
    return [s for s in shapes if traits(s).live]


def apply_shapes(t: Tokens, shapes: Iterable[partial]) -> Tokens:
    """`t` with the advantages that `shapes`, in their order, make of its own."""
    for shape in shapes:
        t = replace(t, advantages=shape(t))
    return t


def _shown(t: Tokens, choices: Iterable[partial]) -> Tokens:
    """What `choices` are given to read; ConfigError if something they need is not there."""
    for choice in choices:
        for name in function_needs(choice) - PROMISES:
            if getattr(t, name, t.extra.get(name)) is None:
                raise ConfigError(
                    f"`{function_name(choice)}` needs `{name}`, which these tokens do not carry: "
                    "have the learner provide what `Objective.needs` names, or drop the function"
                )
    return masked_in(t)


def build_objective(spec: str | Mapping[str, Any], packages: Iterable[str] = ()) -> Objective:
    """An objective from its row: the name of one in conf/objective, or `{slot: {fn: name, setting: value}}`.

    A slot that may hold several functions has a list. Functions come from the slot's own module, or by
    dotted path from `entroray` or one of `packages`. ConfigError names what is wrong and the nearest right.
    """
    if isinstance(spec, str):
        spec = objective_row(spec)
    for name in spec:
        if name not in SLOTS:
            raise ConfigError(f"objective has no slot `{name}`: {nearest(name, SLOTS)}")
    packages = tuple(packages)
    bound: dict[str, Any] = {name: _several(name, spec, packages) for name in map(slot_name, MANY)}
    bound |= {name: _single(name, spec, packages) for name in map(slot_name, ONE)}
    divisor = bound.pop("denominator")
    live = [traits(s).live for s in bound["shapes"]]
    if live != sorted(live):
        first = function_name(bound["shapes"][live.index(True)])
        raise ConfigError(f"objective.shapes: `{first}` is of the current policy: move it behind the others")
    return Objective(**bound, divisor=divisor)


def _several(name: str, spec: Mapping[str, Any], packages: tuple[str, ...]) -> tuple[partial, ...]:
    given = spec.get(name) or ()
    if isinstance(given, Mapping | str):
        raise ConfigError(f"objective.{name} is a list of {{fn: ...}}, got {given!r}")
    return tuple(bind(SLOTS[name], one, packages) for one in given)


def _single(name: str, spec: Mapping[str, Any], packages: tuple[str, ...]) -> partial:
    given = spec.get(name)
    if given is None and name not in DEFAULTS:
        raise ConfigError(f"objective.{name} must be given: {nearest('', slot_functions(SLOTS[name]))}")
    return bind(SLOTS[name], {"fn": DEFAULTS[name]} if given is None else given, packages)


def check_group_size(objective: Objective, group_size: int) -> None:
    """Refuse a row that compares the rollouts of a prompt when there are too few of them."""
    for choice in objective.choices():
        minimum = traits(choice).min_group
        if group_size < minimum:
            raise ConfigError(
                f"`{function_name(choice)}` compares rollouts of one prompt and needs rollout.group_size="
                f"{minimum} or more, got {group_size}: raise it, or choose estimator `raw` and keep `always`"
            )
