"""Where metrics are copied to, beside the journal; the journal alone is the truth.

A tracker is a function of `TrackedRun`, with settings by keyword, that returns a `Tracker`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

SETTING = "observe.trackers"


@dataclass(frozen=True)
class TrackedRun:
    """The run that a tracker is opened for, at its start or at its resumption."""

    folder: Path
    """The run directory; a tracker's own files go into a folder of it."""
    name: str
    """`run.name`, for people; the folder is what tells two runs apart."""
    settings: Mapping[str, Any]
    """The whole configuration, of plain lists and dictionaries."""
    first_step: int
    """1, or the first step after a resumption: what the tracker holds of it and later ones is outdated."""


@runtime_checkable
class Tracker(Protocol):
    """Takes the finite metrics of every step, in order."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


def tensorboard(run: TrackedRun) -> Tracker:
    """Event files in the folder `tensorboard` of the run: one scalar per metric, under its own name."""
    from torch.utils.tensorboard import SummaryWriter

    return TensorBoard(SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.first_step))


@dataclass(frozen=True)
class TensorBoard:
    """A writer of event files as a tracker."""

    writer: Any

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One scalar per metric."""
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Writes what is still in memory."""
        self.writer.close()
