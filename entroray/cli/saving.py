"""When a run saves a checkpoint, and whether a signal leaves it the time."""

import asyncio
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from entroray.config import Config
from entroray.observe.journal import Journal, read_metrics
from entroray.workers.checkpoint import Checkpoints


class Saving:
    """The checkpoints of a run under way; `state` gives what the driver's part of one holds."""

    def __init__(
        self,
        config: Config,
        checkpoints: Checkpoints,
        journal: Journal,
        state: Callable[[], Mapping[str, Any]],
    ):
        self.settings, self.grace = config.checkpoint, config.run.grace
        self.checkpoints, self.journal, self.state = checkpoints, journal, state
        self.step, self.folder, self.ended = -1, Path(), time.monotonic()
        self.longest = 0.0
        """Seconds of a save that were told to be more than a signal leaves."""
        self._tell(last_save(journal.run_dir))

    def due(self, step: int) -> bool:
        """Whether a checkpoint is to be saved after `step`: so many steps, or minutes, have passed."""
        by_time = 60 * self.settings.every_minutes
        if by_time and time.monotonic() - self.ended >= by_time:
            return True
        return bool(self.settings.every) and step % self.settings.every == 0

    async def save(
        self, step: int, accuracy: float | None = None, kind: str = "checkpoint", **of: Any
    ) -> Path:
        """The folder of a checkpoint after `step`, saved unless it was saved last; journalled as `kind`."""
        began = time.monotonic()
        if self.step != step:
            self.folder = await self.checkpoints.save(step, await asyncio.to_thread(self.state), accuracy)
            self.step, self.ended = step, time.monotonic()
        seconds = self.ended - began
        self.journal.event(
            kind, step=step, folder=str(self.folder), seconds=round(max(0.0, seconds), 1), **of
        )
        self._tell(seconds)
        return self.folder

    def _tell(self, seconds: float) -> None:
        if seconds > max(self.grace, self.longest):
            self.longest = seconds
            self.journal.say(
                f"saving took {seconds:.0f} s, and SIGTERM leaves run.grace={self.grace:g} s: have who sends "
                "it wait longer and raise run.grace, or lower checkpoint.every_minutes, so that less is lost"
            )


def last_save(folder: Path) -> float:
    """Seconds that the last checkpoint of the run in `folder` took; 0 without one."""
    kinds = ("checkpoint", "stopped")
    saves = [e["fields"] for e in read_metrics(folder / "events.jsonl") if e["kind"] in kinds]
    return float(saves[-1].get("seconds", 0.0)) if saves else 0.0
