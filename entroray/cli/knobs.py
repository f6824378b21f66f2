"""Settings that controllers move while a run goes on: found by their path, put in effect on the roles."""

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from entroray.cli import choices, plans, sampling, signals
from entroray.config import Config
from entroray.control import Control, Controller, build
from entroray.entropy import shaping
from entroray.errors import ConfigError
from entroray.loop.driver import Roles
from entroray.loop.roles import tunable
from entroray.objective import Objective
from entroray.objective import build as build_objective
from entroray.objective.bind import effective

RULE = "sampler.rule."
LEAST = {"learner.lr": 0.0, "sampler.temperature": sampling.LEAST, "rollout.max_tokens": 1}
"""Settings beside those of the objective and of the sampler's rule that can be moved; the least of each."""
MOVED = f"numbers written out in objective.* and {RULE}*, {', '.join(LEAST)}"


def control_of(config: Config) -> Control:
    """The controllers of these settings; ConfigError for one that moves what cannot be moved."""
    controllers = build(config.control)
    for c in controllers:
        if c.signal is not None:
            signals.check(config, f"control.{c.name}", c.signal)
    own = {c.knob: current(config, c.knob) for c in controllers}
    for c in controllers:
        for why, value in _extremes(c, own[c.knob]):
            _possible(config, c, why, value)
    _agree(config, [c for c in controllers if c.knob.startswith(RULE)], own)
    return Control(controllers, own)


def current(config: Config, path: str) -> float:
    """The number at `path`; ConfigError when there is none, or none that can be moved."""
    if not path.startswith(("objective.", RULE)) and path not in LEAST:
        raise ConfigError(
            f"control: `{path}` cannot be moved in a run; what can: {MOVED}. All else is built into engines, "
            "optimizer or the order of prompts when a run starts"
        )
    node: Any = asdict(config)
    for part in path.split("."):
        try:
            node = node[_index(part)] if isinstance(node, list) else node[part]
        except (KeyError, IndexError, ValueError, TypeError) as error:
            raise ConfigError(
                f"control: these settings have no `{path}` (nothing at `{part}`): write it out, even a "
                "default, as in 'objective.penalties=[{fn: entropy_bonus, coef: 0.0}]'"
            ) from error
    if not isinstance(node, int | float) or isinstance(node, bool):
        raise ConfigError(f"control: `{path}` is {node!r}, not a number")
    return float(node)


def in_effect(spec: Mapping[str, Any], values: Mapping[str, float]) -> dict[str, Any]:
    """A copy of the objective's row with the values of `objective.*` put in."""
    row: Any = copy.deepcopy(dict(spec))
    for path, value in values.items():
        if path.startswith("objective."):
            *way, last = path.split(".")[1:]
            node = row
            for part in way:
                node = node[int(part)] if isinstance(node, list) else node[part]
            node[int(last) if isinstance(node, list) else last] = value
    return row


def tuner(config: Config) -> Callable[[Mapping[str, float], Roles], tuple[Objective, Roles]]:
    """Values by path, roles -> the objective and the roles with those values in effect."""

    def tune(values: Mapping[str, float], roles: Roles) -> tuple[Objective, Roles]:
        objective = build_objective(in_effect(config.objective, values), config.objective_packages)
        learner: Any = roles.learner
        generator = roles.generator
        learner = replace(learner, objective=objective, lr=values.get("learner.lr"))
        rule = {path.removeprefix(RULE): x for path, x in values.items() if path.startswith(RULE)}
        if rule or "rollout.max_tokens" in values:
            generator = tunable(generator).moved(rule, values.get("rollout.max_tokens"))
        if (temperature := values.get("sampler.temperature")) is not None:
            generator = tunable(generator).at(temperature)
        return objective, replace(roles, learner=learner, generator=generator)

    return tune


def _index(part: str) -> int:
    """A place in a list, spelt one way only: two paths must not name one knob."""
    if part != str(abs(int(part))):
        raise ValueError(part)
    return int(part)


def _extremes(c: Controller, own: float) -> Iterator[tuple[str, float]]:
    """The values a controller may reach, and why: its first, its bounds, or a schedule's numbers."""
    yield "its first value", own if c.start is None else c.start
    given = effective(c.rule)
    for key in ("low", "high", "start", "end", "value", "gate"):
        if key in given:
            yield f"{key}={given[key]:g}{'' if key in c.rule.keywords else ', its default'}", given[key]
    for value in given.get("values", []):
        yield "one of values", value


def _possible(config: Config, c: Controller, why: str, value: float) -> None:
    try:
        if c.knob.startswith("objective."):
            build_objective(in_effect(config.objective, {c.knob: value}), config.objective_packages)
        elif c.knob.startswith(RULE):
            shaping.build(config.sampler.rule | {c.knob.removeprefix(RULE): value})
        elif value < LEAST[c.knob]:
            raise ConfigError(f"it is at least {LEAST[c.knob]:g}")
        elif c.knob == "rollout.max_tokens":
            _fits(config, round(value))
    except ConfigError as error:
        raise ConfigError(f"control.{c.name} may set {c.knob} to {value:g} ({why}): {error}") from error


def _agree(config: Config, controllers: Sequence[Controller], own: Mapping[str, float]) -> None:
    """ConfigError where two numbers of the sampler's rule may contradict each other in an engine."""
    keys = [c.knob.removeprefix(RULE) for c in controllers]
    reached = [{value for _, value in _extremes(c, own[c.knob])} for c in controllers]
    for values in itertools.product(*reached):
        try:
            shaping.build(config.sampler.rule | dict(zip(keys, values, strict=True)))
        except ConfigError as error:
            named = ", ".join(c.name for c in controllers)
            raise ConfigError(f"control: {named} may together set what cannot be: {error}") from error


def _fits(config: Config, tokens: int) -> None:
    """ConfigError where responses of so many tokens are too long for the engines, or too short for a plan."""
    if tokens > config.rollout.max_tokens:
        raise ConfigError(
            f"the engines are built for responses of rollout.max_tokens={config.rollout.max_tokens}, which "
            "is the most it can be: set it to the longest and let the controller `start` below"
        )
    shorter = replace(config, rollout=replace(config.rollout, max_tokens=tokens))
    plans.check(shorter)
    choices.check(shorter)
