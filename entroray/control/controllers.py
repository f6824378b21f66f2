"""Which settings are moved, by what rule, from which metric; what they remember between two steps."""

import inspect
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from entroray.control import feedback, schedules
from entroray.errors import ConfigError, nearest
from entroray.objective.bind import keywords, menu

OWN = ("knob", "fn", "signal", "delay", "mean", "priority", "start")


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


def build(specs: Mapping[str, Any]) -> tuple[Controller, ...]:
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
    if not isinstance(spec, Mapping) or not isinstance(spec.get("fn"), str) or not spec.get("knob"):
        raise ConfigError(f"{place} must read {{knob: path, fn: name, setting: value, ...}}, got {spec!r}")
    rules = menu(schedules) | menu(feedback)
    if spec["fn"] not in rules:
        raise ConfigError(f"{place} has no `{spec['fn']}`: {nearest(spec['fn'], rules)}")
    reads = spec["fn"] in menu(feedback)
    if reads != bool(spec.get("signal")):
        lacks = "needs a `signal`, the name of a metric" if reads else "is a schedule and reads no `signal`"
        raise ConfigError(f"{place}: `{spec['fn']}` {lacks}")
    own = OWN if reads else ("knob", "fn", "signal")
    rule = _bound(place, rules[spec["fn"]], {k: v for k, v in spec.items() if k not in own})
    if not reads:
        return Controller(name, spec["knob"], rule, None, 1, 1, 0, rule(1))
    delay, mean = spec.get("delay", 1), spec.get("mean", 1)
    if delay < 1 or mean < 1:
        raise ConfigError(f"{place}: delay and mean are at least 1: a step's metrics are known after it")
    start = None if spec.get("start") is None else float(spec["start"])
    return Controller(
        name, spec["knob"], rule, spec.get("signal"), delay, mean, spec.get("priority", 0), start
    )


def _bound(place: str, fn: Callable, settings: Mapping[str, Any]) -> partial:
    takes = keywords(fn)
    for key, value in settings.items():
        if key not in takes:
            raise ConfigError(f"{place}: `{fn.__name__}` has no setting `{key}`: {nearest(key, takes)}")
        if not all(map(_is_number, value if isinstance(value, list | tuple) else [value])):
            raise ConfigError(f"{place}: `{key}` must be a number, got {value!r}")
    for key, parameter in takes.items():
        if parameter.default is inspect.Parameter.empty and key not in settings:
            raise ConfigError(f"{place}: `{fn.__name__}` needs `{key}`, which has no default")
    if settings.get("low", 0) > settings.get("high", math.inf):
        raise ConfigError(f"{place}: low={settings['low']} is above high={settings['high']}")
    bound = partial(fn, **settings)
    if fn.__module__ == schedules.__name__:
        try:
            bound(1)
        except ValueError as error:
            raise ConfigError(f"{place}: {error}") from error
    return bound


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class Control:
    """The controllers of a run at work; `own` holds the settings' own values by knob."""

    def __init__(self, controllers: Sequence[Controller] = (), own: Mapping[str, float] | None = None):
        self.controllers = sorted(controllers, key=lambda c: c.priority)
        first = {c.name: (own or {})[c.knob] if c.start is None else c.start for c in self.controllers}
        self.values: dict[str, float] = dict(first)
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


def _outward(rule: partial, signal: float, memory: Mapping[str, float]) -> bool:
    """Whether without its bounds the rule would go past them; of a level that moves, wherever its gate is."""
    value, after = rule(signal, memory, low=-math.inf, high=math.inf)
    wish = value if after["level"] == memory["level"] else after["level"]
    return not rule.keywords["low"] <= wish <= rule.keywords["high"]
