"""Where metrics are copied to, beside the journal; the journal alone is the truth."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable


@runtime_checkable
class Tracker(Protocol):
    """Anything that takes the finite metrics of a step; one that fails with an OSError is let go."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    """Event files for TensorBoard in `folder`; what older ones there hold from `first_step` on is hidden."""

    def __init__(self, folder: Path, *, first_step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=first_step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One scalar per metric, under its own name."""
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Writes what is still in memory."""
        self.writer.close()
