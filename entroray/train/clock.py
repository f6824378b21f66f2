"""Seconds of each phase of a step."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Times phases from one step's metrics to the next; `phase` is the one under way, or the last."""

    def __init__(self, phase: str = "start") -> None:
        self.phase, self.began, self.seconds = phase, time.monotonic(), dict[str, float]()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self.phase, entered = phase, time.monotonic()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.monotonic() - entered

    def lap(self, tokens: int) -> dict[str, float]:
        """Seconds by phase, and of everything, since the last lap; response tokens trained a second."""
        ended = time.monotonic()
        total, phases = ended - self.began, {f"seconds/{phase}": s for phase, s in self.seconds.items()}
        self.began, self.seconds = ended, {}
        return phases | {"seconds/step": total, "tokens/per_second": tokens / total}
