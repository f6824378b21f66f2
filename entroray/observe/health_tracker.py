"""Says how a run stands when that changes: on the terminal, in events.jsonl, and at its end."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from entroray.control import Controller
from entroray.metrics import health, prediction, reward_entropy_law
from entroray.observe.journal import ends, series

STEADY = 5
"""Steps in a row a new verdict must hold before it is announced."""
FORM = "exact"
FORETOLD, REALISED = f"entropy/predicted_change_{FORM}", "entropy/realised_change"


class HealthTracker:
    """A tracker that reads the whole run after each step; `report(kind, **fields)` hears of every change.

    `has` are the run's settings by dotted name, as `entropy.causes` reads them.
    """

    def __init__(
        self,
        report: Callable[..., None],
        say: Callable[[str], None],
        history: Sequence[Mapping[str, Any]] = (),
        has: Mapping[str, Any] | None = None,
    ):
        self.report, self.say, self.history, self.has = report, say, list(history), has
        self.announced, self.kind, self.held = "", "", 0

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Read again with this step; what a resumed run does anew replaces what it did before."""
        while self.history and self.history[-1]["step"] >= step:
            self.history.pop()
        self.history.append({"step": step, **metrics})
        found = health.read_health(self.history, self.has)
        if not found:
            return
        self.held = self.held + 1 if found.kind == self.kind else 1
        self.kind = found.kind
        if self.kind != self.announced and (self.held >= STEADY or not self.announced):
            self.announced = self.kind
            reasons = {"rule": found.rule, "cause": found.cause, "remedy": found.remedy}
            self.report("verdict", step=step, verdict=found.kind, words=found.words, **reasons)
            self.say(f"step {step}: {found.line()}")

    def state(self) -> dict[str, Any]:
        """What is announced, and for how many steps the verdict has been what it is."""
        return {"announced": self.announced, "kind": self.kind, "held": self.held}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`; an older checkpoint has none."""
        if state:
            self.announced, self.kind, self.held = state["announced"], state["kind"], state["held"]

    def close(self) -> None:
        """Nothing is held open."""


def health_line(history: Sequence[Mapping[str, Any]], has: Mapping[str, Any] | None = None) -> str:
    """How a run ended, a line each: the verdict, prediction against what happened, the law."""
    found = health.read_health(history, has)
    said = f"verdict: {found.line()}" if found else f"verdict: none before {health.LEAST} steps"
    return "\n".join([said, _predicted(history), _law(history, has or {})])


def _predicted(history: Sequence[Mapping[str, Any]]) -> str:
    """First-order prediction against what happened, over the steps of the whole run that were rescored."""
    known = [m for m in history if None not in (m.get(FORETOLD), m.get(REALISED))]
    if len(known) < prediction.LEAST:
        return f"prediction: none before {prediction.LEAST} steps are rescored (observe.prediction.every)"
    signs = sum(m[FORETOLD] * m[REALISED] > 0 for m in known)
    falls = sum(m[REALISED] < 0 for m in known)
    change = sum(m[REALISED] for m in known) / len(known)
    found = prediction.prediction_record(known)
    slope = found[f"entropy/prediction_slope_{FORM}"]
    ranks = {form: found.get(f"entropy/prediction_rank_{form}") for form in prediction.FORMS}
    said = ", ".join(f"{form} {rank:+.2f}" for form, rank in ranks.items() if rank is not None)
    return (
        f"prediction: the {FORM} form foretold whether entropy rises in {signs} of {len(known)} rescored "
        f"steps, 'it always falls' in {falls} (it changed by {change:+.4f} nats a step); slope "
        f"of realised on predicted {slope:.3g}; rank correlation {said}"
    )


def _law(history: Sequence[Mapping[str, Any]], has: Mapping[str, Any]) -> str:
    """The law as last fitted, or why it was not."""
    last = history[-1] if history else {}
    if any(name.startswith("control/") for name in last):
        return "law: off, a controller acts"
    if has.get("objective", {}).get("keep", {}).get("fn", "always") != "always":
        reason = "the objective trains on a part of the groups (keep), whose entropy is not that of all"
        return f"law: off, {reason}"
    if last.get("law/ceiling") is None:
        return f"law: not fitted, which takes {reward_entropy_law.LEAST} steps whose entropies differ"
    if last["law/a"] <= 0:
        return (
            f"law: none here, reward rises with entropy (a is {last['law/a']:.3f}, r2 {last['law/r2']:.2f})"
        )
    return (
        f"law (an early warning, no forecast): {last['law/ceiling']:.3f} is the reward at entropy 0, 95 % "
        f"were steps independent {last['law/low']:.3f} to {last['law/high']:.3f}, r2 {last['law/r2']:.2f}"
    )


def moved_settings(controllers: Iterable[Controller], history: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each controller: where it left its knob, how often at a limit, how near its signal is."""
    return [_moved(c, history) for c in controllers if series(history, f"control/{c.name}")[1]]


def _moved(c: Controller, history: Sequence[Mapping[str, Any]]) -> str:
    _, values = series(history, f"control/{c.name}")
    given = c.rule.keywords
    limits = [given[name] for name in ("low", "high") if name in given]
    said = f"control: {c.name} left {c.knob} at {values[-1]:g}"
    if limits:
        said += f", at a limit in {sum(v in limits for v in values)} of {len(values)} steps"
    measured = series(history, c.signal)[1] if c.signal else []
    if "target" in given and measured:
        now = ends(measured)[1]
        said += f"; {c.signal} is {now:.3g} over the last 5 steps, its target {given['target']:g}"
    return said
