"""Settings that controllers move while a run goes on: found by their path, in effect in the next calls."""

import copy
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Annotated, Any, get_args, get_origin

from entroray.binding import effective_settings, keyword_settings
from entroray.config import Config
from entroray.control import Control, Controller
from entroray.errors import ConfigError
from entroray.objective import Objective, build_objective
from entroray.rollout import reshape
from entroray.train.driver import Knobs, Tune
from entroray.wiring import measured_metrics, rollout_plan, sampler, selection
from entroray.wiring.parts import Parts

RULE, UPDATES, LONGEST = "sampler.rule.", "learner.updates_per_rollout", "rollout.max_tokens"
TEMPERATURE, LR = "sampler.temperature", "learner.lr"
MINIMA = {LR: 0.0, UPDATES: 1, TEMPERATURE: sampler.MINIMUM, LONGEST: 1}
"""Settings beside those of the objective and of the sampler's rule that can be moved; the minimum of each."""
MOVED = f"numbers written out in objective.* and {RULE}*, {', '.join(MINIMA)}"
WHY = {"learner.max_grad_norm": "DeepSpeed keeps it in a different place for each learner.zero_stage"}
"""Settings that one would like to move, and why they stay."""
ENDLESS = ("constant", "constant_with_warmup", "inverse_sqrt")
"""Values of learner.schedule that do not ask how many updates a run has."""


def build_control(config: Config, controllers: Sequence[Controller]) -> Control:
    """The controllers at work, each from its setting's own value."""
    return Control(controllers, {c.knob: current_value(config, c.knob) for c in controllers})


def check_controllers(config: Config, parts: Parts) -> None:
    """ConfigError for a controller that reads what is not measured, or moves what cannot be moved."""
    for c in parts.controllers:
        if c.signal is not None:
            measured_metrics.check_signal(config, parts, f"control.{c.name}", c.signal)
    unset = (LR,) if config.learner.lr is None else ()  # in an evaluation, or refused by check_lr
    moving = [c for c in parts.controllers if c.knob not in unset]
    own = {c.knob: current_value(config, c.knob) for c in moving}
    for c in moving:
        for why, value in _extremes(c, own[c.knob]):
            _possible(config, parts, c, why, value)
    _agree(config, [c for c in moving if c.knob.startswith(RULE)], own)
    build_control(config, moving)


def current_value(config: Config, path: str) -> float:
    """The number at `path`; ConfigError when there is none, or none that can be moved."""
    if not path.startswith(("objective.", RULE)) and path not in MINIMA:
        why = WHY.get(path, "it is built into engines, optimizer or the order of prompts when a run starts")
        raise ConfigError(f"control: `{path}` cannot be moved in a run, {why}; what can: {MOVED}")
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


def describe_controllers(parts: Parts, lag: int) -> list[str]:
    """Each controller in a line, with what becomes of its value on the way to the learner."""
    return [c.describe() + _on_the_way(parts.objective, c.knob, lag) for c in parts.controllers]


def _on_the_way(objective: Objective, path: str, lag: int) -> str:
    rounded = ", rounded" if is_integer(objective, path) else ""
    if not lag or not path.startswith(("sampler.", "rollout.")):
        return rounded
    return f"{rounded}; for groups begun from then on, trained on up to {lag} step(s) later (driver.max_lag)"


def reached(knob: str, own: float, controllers: Sequence[Controller]) -> dict[str, float]:
    """The values that controllers may set `knob` to, by what says so."""
    moved = [c for c in controllers if c.knob == knob]
    return {f"control.{c.name} ({why}): {knob}": value for c in moved for why, value in _extremes(c, own)}


def updates_range(own: int, controllers: Sequence[Controller]) -> tuple[int, int]:
    """Fewest and most optimizer updates that a step may have: its `own`, or those a controller reaches."""
    moved = [c for c in controllers if c.knob == UPDATES]
    values = [round(value) for c in moved for _, value in _extremes(c, own)] or [own]
    return min(values), max(values)


def is_integer(objective: Objective, path: str) -> bool:
    """Whether the setting takes whole numbers alone, to which a controller's value is rounded."""
    if not path.startswith("objective."):
        return path in (UPDATES, LONGEST)
    slot, *way = path.split(".")[1:]
    place, name = (int(way[0]), way[1]) if way[0].isdecimal() else (0, way[0])
    taken = keyword_settings(objective.slot(slot)[place].func)
    if way[-1] != name or name not in taken:  # a number within a list, or among **settings
        return False
    hint = taken[name].annotation
    return (get_args(hint)[0] if get_origin(hint) is Annotated else hint) is int


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


def build_tuner(spec: Mapping[str, Any], packages: Sequence[str], parts: Parts) -> Tune:
    """Values by path, knobs -> the knobs with those values in effect; `spec` is the objective's row."""
    integers = {c.knob for c in parts.controllers if is_integer(parts.objective, c.knob)}

    def tune(values: Mapping[str, float], knobs: Knobs) -> Knobs:
        moved: dict[str, Any] = {path: round(x) if path in integers else x for path, x in values.items()}
        draw = knobs.draw
        rule = {path.removeprefix(RULE): x for path, x in moved.items() if path.startswith(RULE)}
        return Knobs(
            build_objective(in_effect(spec, moved), packages),
            replace(
                draw,
                temperature=moved.get(TEMPERATURE, draw.temperature),
                max_tokens=moved.get(LONGEST, draw.max_tokens),
                rule={**draw.rule, **rule},
            ),
            moved.get(UPDATES, knobs.updates),
            moved.get(LR),
        )

    return tune


def _index(part: str) -> int:
    """A place in a list, spelt one way only: two paths must not name one knob."""
    if part != str(abs(int(part))):
        raise ValueError(part)
    return int(part)


def _extremes(c: Controller, own: float) -> Iterator[tuple[str, float]]:
    """The values a controller may reach, and why: its first, its bounds, or a schedule's numbers."""
    yield "its first value", own if c.start is None else c.start
    given = effective_settings(c.rule)
    for key in ("low", "high", "start", "end", "value", "gate"):
        if key in given:
            yield f"{key}={given[key]:g}{'' if key in c.rule.keywords else ', its default'}", given[key]
    for value in given.get("values", []):
        yield "one of values", value


def _possible(config: Config, parts: Parts, c: Controller, why: str, value: float) -> None:
    try:
        put = _put(parts.objective, c.knob, value)
        if c.knob.startswith("objective."):
            build_objective(in_effect(config.objective, {c.knob: put}), config.packages)
        elif c.knob.startswith(RULE):
            reshape.build_rule(config.sampler.rule | {c.knob.removeprefix(RULE): put}, config.packages)
        elif put < MINIMA[c.knob]:
            raise ConfigError(f"it is at least {MINIMA[c.knob]:g}")
        elif c.knob == LONGEST:
            _fits(config, parts.plan, round(put))
        elif c.knob == UPDATES:
            _counts(config, round(put))
    except ConfigError as error:
        raise ConfigError(f"control.{c.name} may set {c.knob} to {value:g} ({why}): {error}") from error


def _put(objective: Objective, path: str, value: float) -> float:
    """What a setting becomes when a controller has `value` for it."""
    if not is_integer(objective, path):
        return value
    if math.isinf(value):
        raise ConfigError("it is a whole number, and that is none: give a bound")
    return round(value)


def _agree(config: Config, controllers: Sequence[Controller], own: Mapping[str, float]) -> None:
    """ConfigError where two numbers of the sampler's rule may contradict each other in an engine."""
    keys = [c.knob.removeprefix(RULE) for c in controllers]
    reached = [{value for _, value in _extremes(c, own[c.knob])} for c in controllers]
    for values in itertools.product(*reached):
        try:
            reshape.build_rule(config.sampler.rule | dict(zip(keys, values, strict=True)), config.packages)
        except ConfigError as error:
            named = ", ".join(c.name for c in controllers)
            raise ConfigError(f"control: {named} may together set what cannot be: {error}") from error


def _fits(config: Config, plan: partial, tokens: int) -> None:
    """ConfigError where responses of so many tokens are too long for the engines, or too short for a plan."""
    if tokens > config.rollout.max_tokens:
        raise ConfigError(
            f"the engines are built for responses of rollout.max_tokens={config.rollout.max_tokens}, which "
            "is the most it can be: set it to the longest and let the controller `start` below"
        )
    shorter = replace(config.rollout, max_tokens=tokens)
    rollout_plan.check_plan(plan, shorter, config.sampler, config.generator.engine)
    selection.check_selection(shorter, config.driver.max_lag)


def _counts(config: Config, number: int) -> None:
    """ConfigError where steps cannot have so many updates, or their number must be known beforehand."""
    if number > config.rollout.groups_per_step:
        raise ConfigError(
            f"every update is of whole groups, and a step has rollout.groups_per_step="
            f"{config.rollout.groups_per_step} of them: set a lower bound, or more groups"
        )
    if config.learner.schedule not in ENDLESS:
        raise ConfigError(
            f"learner.schedule={config.learner.schedule} must know how many updates a run has: choose "
            f"{', '.join(ENDLESS)}, and let another controller move learner.lr"
        )
