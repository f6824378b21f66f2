"""Which settings are moved, by what rule, from which metric; what they remember between two steps."""

import inspect
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, get_args, get_origin

from entroray.binding import Count, Limit, effective_settings, keyword_settings, slot_functions
from entroray.control import feedback, schedules
from entroray.errors import ConfigError, nearest

OWN = ("knob", "fn", "signal", "delay", "mean", "priority", "start")
Delay = Annotated[int, Limit("at least 1: a step's metrics are known after it", lambda x: x >= 1)]
WORDS: Mapping[Any, str] = {int: "whole number", float: "number", str: "name"}


@dataclass(frozen=True)
class Controller:
    """One setting and the rule that moves it; a schedule where `signal` is None."""

    name: str
    knob: str
    """Path of the setting, as on the command line: objective.penalties.0.coef."""
    rule: partial
    signal: str | None
    delay: int
    """Steps between the one whose metric is read and the one it acts on; at least 1."""
    mean: int
    """Steps the signal is averaged over, the newest `delay` steps old."""
    priority: int
    """Among controllers of one signal: the lowest acts first, the next where it would go past its limit."""
    start: float | None
    """First value; None is the setting's own."""

    def describe(self) -> str:
        """One line for a run's header."""
        given = ", ".join(f"{k}={v:g}" for k, v in self.rule.keywords.items() if isinstance(v, int | float))
        reads = f" of {self.signal}, {self.delay} step(s) late" if self.signal else ""
        over = f", mean of {self.mean}" if self.mean > 1 else ""
        return f"{self.name}: {self.knob} <- {self.rule.func.__name__}({given}){reads}{over}"


def build_controllers(specs: Mapping[str, Any]) -> tuple[Controller, ...]:
    """Controllers from `{name: {knob, fn, signal, settings}}`; ConfigError for one that cannot be.

    No two may move one knob. Two that read one signal need different priorities.
    """
    made = tuple(_controller(name, spec) for name, spec in specs.items())
    for knob, count in Counter(c.knob for c in made).items():
        if count > 1:
            names = ", ".join(c.name for c in made if c.knob == knob)
            raise ConfigError(f"control: {names} all move `{knob}`: leave one of them")
    for (signal, priority), count in Counter((c.signal, c.priority) for c in made if c.signal).items():
        if count > 1:
            names = ", ".join(c.name for c in made if (c.signal, c.priority) == (signal, priority))
            raise ConfigError(
                f"control: {names} read `{signal}` and would fight over it: give each its own `priority` "
                "(the lowest acts first, the next while it stands at its limit and would go past it), or "
                "leave one of them"
            )
    return made


def _controller(name: str, spec: Any) -> Controller:
    place = f"control.{name}"
    named = isinstance(spec, Mapping) and all(_is_name(spec.get(key)) for key in ("fn", "knob"))
    if not named:
        raise ConfigError(f"{place} must read {{knob: path, fn: name, setting: value, ...}}, got {spec!r}")
    rules = slot_functions(schedules) | slot_functions(feedback)
    if spec["fn"] not in rules:
        raise ConfigError(f"{place} has no `{spec['fn']}`: {nearest(spec['fn'], rules)}")
    reads = spec["fn"] in slot_functions(feedback)
    if reads != bool(spec.get("signal")):
        lacks = "needs a `signal`, the name of a metric" if reads else "is a schedule and reads no `signal`"
        raise ConfigError(f"{place}: `{spec['fn']}` {lacks}")
    own = OWN if reads else ("knob", "fn", "signal")
    rule = _bound(place, rules[spec["fn"]], {k: v for k, v in spec.items() if k not in own})
    if not reads:
        return Controller(name, spec["knob"], rule, None, 1, 1, 0, rule(1))
    own_of = partial(_own, place, spec)
    start = own_of("start", float | None, None)
    return Controller(
        name,
        spec["knob"],
        rule,
        own_of("signal", str, None),
        own_of("delay", Delay, 1),
        own_of("mean", Count, 1),
        own_of("priority", int, 0),
        None if start is None else float(start),
    )


def _own(place: str, spec: Mapping[str, Any], key: str, hint: Any, default: Any) -> Any:
    """What a controller says of itself, not of its rule."""
    value = spec.get(key, default)
    if wanted := _complaint(value, hint):
        raise ConfigError(f"{place}: `{key}` must be {wanted}, got {value!r}")
    return value


def _bound(place: str, fn: Callable, settings: Mapping[str, Any]) -> partial:
    takes = keyword_settings(fn)
    for key, value in settings.items():
        if key not in takes:
            raise ConfigError(f"{place}: `{fn.__name__}` has no setting `{key}`: {nearest(key, takes)}")
        if wanted := _complaint(value, takes[key].annotation):
            raise ConfigError(f"{place}: `{key}` must be {wanted}, got {value!r}")
    for key, parameter in takes.items():
        if parameter.default is inspect.Parameter.empty and key not in settings:
            raise ConfigError(f"{place}: `{fn.__name__}` needs `{key}`, which has no default")
    for low, high in (("low", "high"), ("at_least", "at_most")):
        if settings.get(low, -math.inf) > settings.get(high, math.inf):
            raise ConfigError(f"{place}: {low}={settings[low]} is above {high}={settings[high]}: swap them")
    bound = partial(fn, **settings)
    if fn.__module__ == schedules.__name__:
        try:
            bound(1)
        except ValueError as error:
            raise ConfigError(f"{place}: {error}") from error
    return bound


def _complaint(value: Any, hint: Any) -> str:
    """What `value` should have been to be a `hint`; empty where it is one."""
    kind, *more = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    if get_origin(kind) is Sequence:
        (each,) = get_args(kind)
        fits = isinstance(value, list | tuple) and not any(_complaint(x, each) for x in value)
        return "" if fits else f"a list of {WORDS[each]}s"
    if type(None) in get_args(kind):
        return "" if value is None else _complaint(value, get_args(kind)[0])
    if not {int: _is_whole, float: _is_number, str: _is_name}[kind](value):
        return f"a {WORDS[kind]}" + (f", {more[0].text}" if more else "")
    return "" if not more or more[0].holds(value) else more[0].text


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


class Control:
    """The controllers of a run at work; `own` holds the settings' own values by knob.

    ConfigError where one that reads a signal would begin outside its bounds.
    """

    def __init__(self, controllers: Sequence[Controller] = (), own: Mapping[str, float] | None = None):
        self.controllers = sorted(controllers, key=lambda c: c.priority)
        first = {c.name: _first(c, own or {}) for c in self.controllers}
        gated = {
            c.name: x for c in self.controllers if (x := effective_settings(c.rule).get("gate")) is not None
        }
        self.values: dict[str, float] = first | gated  # before a signal is known, none is below its target
        self.memory: dict[str, dict[str, float]] = {name: {"level": x} for name, x in first.items()}
        self.seen: dict[str, list[float | None]] = {c.name: [] for c in self.controllers}
        self.spent = dict.fromkeys(first, False)
        """Whether each, when it last acted, stood at its limit and would have gone past it."""

    def turn(self, step: int) -> dict[str, float]:
        """The value of every knob in `step`; once per step, in order."""
        taken: set[str] = set()
        for c in self.controllers:
            if c.signal is None:
                self.values[c.name] = c.rule(step)
            elif c.signal not in taken:
                self._act(c)
                taken |= set() if self.spent[c.name] else {c.signal}
        return {c.knob: self.values[c.name] for c in self.controllers}

    def _act(self, c: Controller) -> None:
        """Move one setting by its signal, if there is one."""
        if (signal := self._signal(c)) is None:
            return
        value, memory = c.rule(signal, self.memory[c.name])
        self.spent[c.name] = value == self.values[c.name] and _outward(c.rule, signal, self.memory[c.name])
        self.values[c.name], self.memory[c.name] = value, dict(memory)

    def _signal(self, c: Controller) -> float | None:
        """Mean of what was measured in the `mean` steps that are `delay` steps old or older.

        None before there are as many, and where the newest measured nothing: what is measured every few
        steps is acted upon once each time.
        """
        seen = self.seen[c.name]
        window = seen[: len(seen) - c.delay + 1][-c.mean :]
        if len(window) < c.mean or window[-1] is None:
            return None
        known = [x for x in window if x is not None]
        return sum(known) / len(known)

    def note(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Remember what the step measured; returns the value each controller had in it."""
        for c in self.controllers:
            if c.signal is not None:
                value = metrics.get(c.signal)
                finite = value is not None and math.isfinite(value)
                kept = [*self.seen[c.name], float(value) if finite and value is not None else None]
                self.seen[c.name] = kept[-(c.delay + c.mean - 1) :]
        return {f"control/{name}": value for name, value in self.values.items()}

    def state(self) -> dict[str, Any]:
        """Plain JSON."""
        memory = {name: dict(m) for name, m in self.memory.items()}
        return {
            "values": dict(self.values),
            "memory": memory,
            "seen": {name: list(x) for name, x in self.seen.items()},
            "spent": dict(self.spent),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`; a controller it does not know starts afresh."""
        for name in self.values:
            if name in state["values"]:
                self.values[name] = state["values"][name]
                self.memory[name] = dict(state["memory"][name])
                self.seen[name] = list(state["seen"][name])
                self.spent[name] = state.get("spent", {}).get(name, False)  # older checkpoints have none


def _first(c: Controller, own: Mapping[str, float]) -> float:
    """The level a controller begins at; ConfigError for one that its bounds exclude."""
    level = own[c.knob] if c.start is None else c.start
    given = c.rule.keywords
    if c.signal and not given["low"] <= level <= given["high"]:
        whose = "the setting's own value" if c.start is None else "its `start`"
        raise ConfigError(
            f"control.{c.name}: {c.knob} would begin at {level:g}, {whose}, and jump into "
            f"low={given['low']:g}..high={given['high']:g} at the first signal: give a `start` within them, "
            "or widen them"
        )
    return level


def _outward(rule: partial, signal: float, memory: Mapping[str, float]) -> bool:
    """Whether without its bounds the rule would go past them; of a level that moves, wherever its gate is."""
    value, after = rule(signal, memory, low=-math.inf, high=math.inf)
    wish = value if after["level"] == memory["level"] else after["level"]
    return not rule.keywords["low"] <= wish <= rule.keywords["high"]
