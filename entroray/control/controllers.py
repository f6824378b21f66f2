"""Which settings are moved, by what rule, from which metric; what they remember between two steps."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

from entroray.binding import (
    Count,
    Limit,
    bind,
    check_settings,
    effective_settings,
    keyword_settings,
    positional_arguments,
)
from entroray.control import feedback, schedules
from entroray.errors import ConfigError

Delay = Annotated[int, Limit("at least 1: a step's metrics are known after it", lambda x: x >= 1)]


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
    start: float | None
    """First value; None is the setting's own."""

    def describe(self) -> str:
        """One line for a run's header."""
        given = ", ".join(f"{k}={v:g}" for k, v in self.rule.keywords.items() if isinstance(v, int | float))
        reads = f" of {self.signal}, {self.delay} step(s) late" if self.signal else ""
        over = f", mean of {self.mean}" if self.mean > 1 else ""
        return f"{self.name}: {self.knob} <- {self.rule.func.__name__}({given}){reads}{over}"


def build_controllers(specs: Mapping[str, Any], packages: Iterable[str] = ()) -> tuple[Controller, ...]:
    """Controllers from `{name: {knob, fn, signal, settings}}`; ConfigError for one that cannot be.

    No two may move one knob or read one signal.
    """
    built = tuple(_controller(name, spec, tuple(packages)) for name, spec in specs.items())
    for knob, count in Counter(c.knob for c in built).items():
        if count > 1:
            names = ", ".join(c.name for c in built if c.knob == knob)
            raise ConfigError(f"control: {names} all move `{knob}`: leave one of them")
    for signal, count in Counter(c.signal for c in built if c.signal).items():
        if count > 1:
            names = ", ".join(c.name for c in built if c.signal == signal)
            raise ConfigError(
                f"control: {names} read `{signal}` and would fight over it: leave one of them, or let each "
                "read a metric of its own"
            )
    return built


def _reading(
    *, knob: str, signal: str, delay: Delay = 1, mean: Count = 1, start: float | None = None
) -> dict[str, Any]:
    """What a controller that reads a signal has beside the settings of its rule."""
    return {"knob": knob, "signal": signal, "delay": delay, "mean": mean, "start": start}


def _moving(*, knob: str) -> None:
    """What a schedule has beside the settings of its rule."""


def _controller(name: str, spec: Any, packages: tuple[str, ...]) -> Controller:
    place = f"control.{name}"
    if not isinstance(spec, Mapping) or not isinstance(spec.get("knob"), str):
        raise ConfigError(f"{place} must read {{knob: path, fn: name, setting: value, ...}}, got {spec!r}")
    frame = _reading if {"signal", "delay", "mean"} & spec.keys() else _moving
    own = {key: value for key, value in spec.items() if key in keyword_settings(frame)}
    check_settings(place, name, frame, own)
    rule = bind((schedules, feedback), {k: v for k, v in spec.items() if k not in own}, packages, place)
    given = rule.keywords
    for low, high in (("low", "high"), ("at_least", "at_most")):
        if given.get(low, -math.inf) > given.get(high, math.inf):
            raise ConfigError(f"{place}: {low}={given[low]} is above {high}={given[high]}: swap them")
    reads = len(positional_arguments(rule.func)) == 2
    if reads != bool(own.get("signal")):
        lacks = "needs a `signal`, the name of a metric" if reads else "is a schedule and reads no `signal`"
        raise ConfigError(f"{place}: `{spec['fn']}` {lacks}")
    if reads and not {"low", "high"} <= effective_settings(rule).keys():
        raise ConfigError(
            f"{place}: `{spec['fn']}` must have settings `low` and `high`, and stay within them"
        )
    if not reads:
        return Controller(name, spec["knob"], rule, None, 1, 1, _start(place, rule))
    return Controller(name=name, rule=rule, **_reading(**own))


def _start(place: str, schedule: partial) -> float:
    """The value at step 1; ConfigError for a schedule whose settings contradict each other."""
    try:
        return schedule(1)
    except ValueError as error:
        raise ConfigError(f"{place}: {error}") from error


class Control:
    """The controllers of a run at work; `own` holds the settings' own values by knob.

    ConfigError where one that reads a signal would begin outside its bounds.
    """

    def __init__(self, controllers: Sequence[Controller] = (), own: Mapping[str, float] | None = None):
        self.controllers = list(controllers)
        first = {c.name: _first(c, own or {}) for c in self.controllers}
        gated = {
            c.name: x for c in self.controllers if (x := effective_settings(c.rule).get("gate")) is not None
        }
        self.values: dict[str, float] = first | gated  # before a signal is known, none is below its target
        self.memory: dict[str, dict[str, float]] = {name: {"level": x} for name, x in first.items()}
        self.seen: dict[str, list[float | None]] = {c.name: [] for c in self.controllers}

    def turn(self, step: int) -> dict[str, float]:
        """The value of every knob in `step`; once per step, in order."""
        for c in self.controllers:
            if c.signal is None:
                self.values[c.name] = c.rule(step)
            elif (signal := self._signal(c)) is not None:
                self.values[c.name], memory = c.rule(signal, self.memory[c.name])
                self.memory[c.name] = dict(memory)
        return {c.knob: self.values[c.name] for c in self.controllers}

    def _signal(self, c: Controller) -> float | None:
        """Mean of what was measured in the `mean` steps that are `delay` steps old or older.

        None before there are as many, and where the newest measured nothing: what is measured every few
        steps is acted upon once each time.
        """
        seen = self.seen[c.name]
        window = seen[: max(0, len(seen) - c.delay + 1)][-c.mean :]
        if len(window) < c.mean or window[-1] is None:
            return None
        known = [x for x in window if x is not None]
        return sum(known) / len(known)

    def observe(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Remember what the step measured; returns the value each controller had in it."""
        for c in self.controllers:
            if c.signal is not None:
                value = metrics.get(c.signal)
                finite = value is not None and math.isfinite(value)
                kept = [*self.seen[c.name], float(value) if finite and value is not None else None]
                self.seen[c.name] = kept[-(c.delay + c.mean - 1) :]
        return {f"control/{name}": value for name, value in self.values.items()}

    def state(self) -> dict[str, Any]:
        memory = {name: dict(m) for name, m in self.memory.items()}
        return {
            "values": dict(self.values),
            "memory": memory,
            "seen": {name: list(x) for name, x in self.seen.items()},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`; a controller it does not know starts afresh."""
        for name in self.values:
            if name in state["values"]:
                self.values[name] = state["values"][name]
                self.memory[name] = dict(state["memory"][name])
                self.seen[name] = list(state["seen"][name])


def _first(c: Controller, own: Mapping[str, float]) -> float:
    """The level a controller begins at; ConfigError for one that its bounds exclude."""
    level = own[c.knob] if c.start is None else c.start
    given = effective_settings(c.rule)
    if c.signal and not given["low"] <= level <= given["high"]:
        whose = "the setting's own value" if c.start is None else "its `start`"
        raise ConfigError(
            f"control.{c.name}: {c.knob} would begin at {level:g}, {whose}, and jump into "
            f"low={given['low']:g}..high={given['high']:g} at the first signal: give a `start` within them, "
            "or widen them"
        )
    return level
