"""What a run came to, and how it ended, as trackers are told at its end."""

import asyncio
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from entroray.errors import EntrorayError, Stopped, first_line
from entroray.redaction import hide_secrets

STEP = "run/step"


@dataclass(frozen=True)
class RunSummary:
    """What a run came to."""

    status: Literal["finished", "stopped", "failed"]
    """Stopped is by Ctrl-C or SIGTERM."""
    exit_code: int
    reason: str
    """What ended it, in a sentence; empty where it is finished."""
    step: int
    """The last."""
    metrics: Mapping[str, float]
    """The last known value of each."""
    best: tuple[int, float] | None
    """Step and value of the highest `eval/greedy`; None without an evaluation."""
    health: str
    """The verdict on its entropy, in a line."""

    def flat(self) -> dict[str, str | int | float]:
        """All but the metrics, by name."""
        best = {"best/step": self.best[0], "best/eval/greedy": self.best[1]} if self.best else {}
        texts = {"run/status": self.status, "run/reason": self.reason, "run/health": self.health}
        return {**texts, "run/exit_code": self.exit_code, STEP: self.step, **best}


def _ended(error: BaseException | None) -> tuple[Literal["finished", "stopped", "failed"], int]:
    """The status and the exit code of a run that `error` ended, or nothing."""
    if error is None:
        return "finished", 0
    if isinstance(error, KeyboardInterrupt | asyncio.CancelledError):  # cancelled by SIGTERM with its words
        return "stopped", 128 + (signal.SIGTERM if error.args else signal.SIGINT)
    code = error.exit_code if isinstance(error, EntrorayError) else 1
    return ("stopped" if isinstance(error, Stopped) else "failed"), code


def summarize(
    error: BaseException | None, history: Sequence[Mapping[str, Any]] = (), health: str = ""
) -> RunSummary:
    """What a run came to that has the metrics `history`, and that `error` ended."""
    status, code = _ended(error)
    last = {name: value for line in history for name, value in line.items() if value is not None}
    known = [(line["eval/greedy"], line["step"]) for line in history if line.get("eval/greedy") is not None]
    accuracy, step = max(known, key=lambda pair: pair[0], default=(None, 0))
    best = None if accuracy is None else (step, accuracy)
    reason = "" if error is None else hide_secrets(first_line(error))
    return RunSummary(status, code, reason, int(last.pop("step", 0)), last, best, health)
