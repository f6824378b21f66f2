"""Seconds of each phase of a step."""

import time
from typing import Any


class Clock:
    """Times the phases of one step; `phase` is the one under way, or the last."""

    def __init__(self, phase: str = "start") -> None:
        self.phase, self.began, self.seconds = phase, time.monotonic(), dict[str, float]()

    def __call__(self, phase: str) -> "Clock":
        self.phase = phase
        return self

    def __enter__(self) -> None:
        self.entered = time.monotonic()

    def __exit__(self, *_: Any) -> None:
        self.seconds[self.phase] = time.monotonic() - self.entered

    def metrics(self, tokens: int) -> dict[str, float]:
        """Seconds by phase and response tokens trained a second."""
        total = time.monotonic() - self.began
        phases = {f"seconds/{phase}": s for phase, s in self.seconds.items()}
        return phases | {"seconds/step": total, "tokens/per_second": tokens / total}
