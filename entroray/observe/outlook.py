"""Says how a run stands when that changes: on the terminal, in events.jsonl, and at its end."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from entroray.entropy import verdict

STEADY = 5
"""Steps in a row a new verdict must hold before it is announced."""


class Outlook:
    """A tracker that reads the whole run after each step; `report(kind, **fields)` hears of every change."""

    def __init__(
        self,
        report: Callable[..., None],
        say: Callable[[str], None],
        history: Sequence[Mapping[str, Any]] = (),
    ):
        self.report, self.say, self.history = report, say, list(history)
        self.announced, self.kind, self.held = "", "", 0

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Read again with this step; what a resumed run does anew replaces what it did before."""
        while self.history and self.history[-1]["step"] >= step:
            self.history.pop()
        self.history.append({"step": step, **metrics})
        found = verdict.read(self.history)
        if not found:
            return
        self.held = self.held + 1 if found.kind == self.kind else 1
        self.kind = found.kind
        if self.kind != self.announced and (self.held >= STEADY or not self.announced):
            self.announced = self.kind
            reasons = {"rule": found.rule, "cause": found.cause, "remedy": found.remedy}
            self.report("verdict", step=step, verdict=found.kind, words=found.words, **reasons)
            self.say(f"step {step}: {found.line()}")

    def close(self) -> None:
        """Nothing is held open."""


def last_word(history: Sequence[Mapping[str, Any]]) -> str:
    """The verdict at the end of a run; says so where it was too short for one."""
    found = verdict.read(history)
    return f"verdict: {found.line()}" if found else f"verdict: none before {verdict.LEAST} steps"
