"""Seconds of each phase of a step."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Times the phases of one step; `phase` is the one under way, or the last."""

    def __init__(self, phase: str = "start") -> None:
        self.phase, self.began, self.seconds = phase, time.monotonic(), dict[str, float]()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self.phase, entered = phase, time.monotonic()
        try:
            yield
        finally:
            self.seconds[phase] = time.monotonic() - entered

    def metrics(self, tokens: int) -> dict[str, float]:
        """Seconds by phase and response tokens trained a second."""
        total = time.monotonic() - self.began
        phases = {f"seconds/{phase}": s for phase, s in self.seconds.items()}
        return phases | {"seconds/step": total, "tokens/per_second": tokens / total}
