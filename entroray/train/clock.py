"""Seconds of each phase of a step, and the share of it in which a role had nothing to do."""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from entroray.train.trace import NO_TRACE, Trace


class BusyTime:
    """Seconds in which each actor had something to do: at least one call to it was open."""

    def __init__(self) -> None:
        self.open, self.since = Counter[str](), dict[str, float]()
        self.total: defaultdict[str, float] = defaultdict(float)

    def began(self, actor: str, now: float) -> None:
        if not self.open[actor]:
            self.since[actor] = now
        self.open[actor] += 1

    def ended(self, actor: str, now: float) -> None:
        self.open[actor] -= 1
        if not self.open[actor]:
            self.total[actor] += now - self.since[actor]

    def seconds(self, actor: str, now: float) -> float:
        return self.total[actor] + (now - self.since[actor] if self.open[actor] else 0.0)


class Clock:
    """Times phases from one step's metrics to the next; `phase` is the one under way, or the last.

    `busy()` gives seconds at work by actor (`generator 0`, `learner rank 1`), since any moment.
    """

    def __init__(self, busy: Callable[[], Mapping[str, float]] = dict, trace: Trace = NO_TRACE) -> None:
        self.busy, self.trace, self.phase = busy, trace, "start"
        self._begin(time.monotonic())

    def _begin(self, now: float) -> None:
        self.began, self.seconds = now, dict[str, float]()
        self.first, self.thread = self.busy(), time.thread_time()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self.phase = self.trace.phase = phase
        entered = time.monotonic()
        try:
            yield
        finally:
            ended = time.monotonic()
            self.seconds[phase] = self.seconds.get(phase, 0.0) + ended - entered
            self.trace.span("sync" if phase == "sync" else "driver", phase, entered, ended)

    def lap(self, tokens: int, step: int) -> dict[str, float]:
        """Of `step`, which ends: seconds by phase, idle shares by role, response tokens trained a second."""
        ended = time.monotonic()
        total = ended - self.began
        phases = {f"seconds/{phase}": s for phase, s in self.seconds.items()}
        idle, speed = self._idle(total), {"tokens/per_second": tokens / total}
        self.trace.span("steps", f"step {step}", self.began, ended, tokens=tokens, **idle)
        self.trace.flush()
        self._begin(ended)
        return phases | {"seconds/step": total} | speed | idle

    def _idle(self, total: float) -> dict[str, float]:
        """Of each role the mean of its actors and the idlest; of the driver that of its event loop."""
        at_work = {name: s - self.first[name] for name, s in self.busy().items() if name in self.first}
        shares: dict[str, list[float]] = {}
        for name, seconds in at_work.items():
            shares.setdefault(name.split()[0], []).append(max(0.0, 1 - seconds / total))
        found = {f"idle/{role}": sum(idle) / len(idle) for role, idle in shares.items()}
        found |= {f"idle/{role}_max": max(idle) for role, idle in shares.items()}
        return found | {"idle/driver": max(0.0, 1 - (time.thread_time() - self.thread) / total)}
