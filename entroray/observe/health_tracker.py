"""The health of a run: announced on the terminal and in events.jsonl when it changes, and at the end."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from entroray.control import Controller
from entroray.metrics import health, prediction, reward_entropy_law
from entroray.observe.journal import first_and_last, series
from entroray.observe.run_summary import RunSummary, summarize

STEADY = 5
"""Steps in a row that a new kind of health must hold before it is announced."""
TOO_EARLY = f"none before {health.MINIMUM_STEPS} steps"
FORM = "exact"
PREDICTED, REALISED = f"entropy/predicted_change_{FORM}", "entropy/realised_change"


class HealthTracker:
    """A tracker that calls `report("health", ...)` and `say(line)` when the health of the run changes.

    `settings` are the run's, by dotted name, as `metrics.remedies` reads them.
    """

    def __init__(
        self,
        report: Callable[..., None],
        say: Callable[[str], None],
        history: Sequence[Mapping[str, Any]] = (),
        settings: Mapping[str, Any] | None = None,
    ):
        self.report, self.say, self.history, self.settings = report, say, list(history), settings
        self.announced, self.kind, self.held, self.line = "", "", 0, TOO_EARLY

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Read the run with this step; a step that a resumed run repeats replaces the old one."""
        while self.history and self.history[-1]["step"] >= step:
            self.history.pop()
        self.history.append({"step": step, **metrics})
        found = health.read_health(self.history, self.settings)
        if not found:
            return
        self.held = self.held + 1 if found.kind == self.kind else 1
        self.kind, self.line = found.kind, found.line()
        if self.kind != self.announced and (self.held >= STEADY or not self.announced):
            self.announced = self.kind
            reasons = {"rule": found.rule, "cause": found.cause, "remedy": found.remedy}
            self.report("health", step=step, health=found.kind, words=found.words, **reasons)
            self.say(f"step {step}: {self.line}")

    def summarize(self, error: BaseException | None) -> RunSummary:
        """What the run came to, which `error` ended."""
        return summarize(error, self.history, self.line)

    def state(self) -> dict[str, Any]:
        """What was announced, and for how many steps the health has been what it is."""
        return {"announced": self.announced, "kind": self.kind, "held": self.held}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        self.announced, self.kind, self.held = state["announced"], state["kind"], state["held"]

    def close(self) -> None:
        """Nothing to close."""


def health_lines(
    history: Sequence[Mapping[str, Any]], settings: Mapping[str, Any] | None = None
) -> list[str]:
    """The end of a run in three lines: its health, prediction against what happened, the law."""
    found = health.read_health(history, settings)
    line = found.line() if found else TOO_EARLY
    return [f"health: {line}", _prediction_line(history), _law_line(history, settings or {})]


def _prediction_line(history: Sequence[Mapping[str, Any]]) -> str:
    """First-order prediction against what happened, over the steps of the whole run that were rescored."""
    known = [m for m in history if None not in (m.get(PREDICTED), m.get(REALISED))]
    if len(known) < prediction.MINIMUM_STEPS:
        wanted = prediction.MINIMUM_STEPS
        return f"prediction: none before {wanted} steps are rescored (observe.prediction.every)"
    signs = sum(m[PREDICTED] * m[REALISED] > 0 for m in known)
    falls = sum(m[REALISED] < 0 for m in known)
    change = sum(m[REALISED] for m in known) / len(known)
    found = prediction.prediction_record(known)
    slope = found[f"entropy/prediction_slope_{FORM}"]
    ranks = {form: found.get(f"entropy/prediction_rank_{form}") for form in prediction.FORMS}
    correlations = ", ".join(f"{form} {rank:+.2f}" for form, rank in ranks.items() if rank is not None)
    return (
        f"prediction: in {signs} of {len(known)} rescored steps entropy moved as theory said beforehand "
        f"('it falls' each time: {falls}); it changed by {change:+.4f} nats a step, {slope:.3g} times the "
        f"prediction for a step of size 1 ({FORM} form); rank correlation of predicted and real change by "
        f"form: {correlations}"
    )


def _law_line(history: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> str:
    """The law as last fitted, or why it was not fitted."""
    last = history[-1] if history else {}
    if any(name.startswith("control/") for name in last):
        return "law: off, a controller acts"
    if settings.get("objective", {}).get("keep", {}).get("fn", "always") != "always":
        return "law: off, the objective trains on a part of the groups (objective.keep)"
    if last.get("law/ceiling") is None:
        return f"law: not fitted, which takes {reward_entropy_law.MINIMUM_STEPS} steps whose entropies differ"
    if last["law/a"] <= 0:
        return f"law: none, correct rises with entropy (a {last['law/a']:.3f}, r2 {last['law/r2']:.2f})"
    return (
        f"law (an early warning, no forecast): correct is {last['law/ceiling']:.3f} at entropy 0, "
        f"95 % interval for independent steps {last['law/low']:.3f} to {last['law/high']:.3f}, "
        f"r2 {last['law/r2']:.2f}"
    )


def moved_settings(controllers: Iterable[Controller], history: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each controller: the setting's last value, steps at a limit, its signal and target."""
    return [_moved_line(c, history) for c in controllers if series(history, f"control/{c.name}")[1]]


def _moved_line(c: Controller, history: Sequence[Mapping[str, Any]]) -> str:
    _, values = series(history, f"control/{c.name}")
    given = c.rule.keywords
    limits = [given[name] for name in ("low", "high") if name in given]
    line = f"control: {c.name} left {c.knob} at {values[-1]:g}"
    if limits:
        line += f", at a limit in {sum(v in limits for v in values)} of {len(values)} steps"
    measured = series(history, c.signal)[1] if c.signal else []
    if "target" in given and measured:
        now = first_and_last(measured)[1]
        line += f"; {c.signal} is {now:.3g} over the last 5 steps, its target {given['target']:g}"
    return line
