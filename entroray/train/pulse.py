"""Whether a process is frozen: what it says of itself (`workers/heartbeat.py`), and how that is judged."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

TURN = 60.0
"""Seconds that a turn may take, however short those before it were."""
SILENCE, LOADING = 20.0, 60.0
"""Seconds without a beat after which an actor is frozen; until it has worked once, as libraries that hold the
interpreter are read from slow disks."""
TWICE = 2
"""A silence may take so many times as long as the longest that ended."""
TIMES = 10
"""A turn may take so many times as long as the longest before."""


@dataclass
class Turns:
    """Counted by the working thread, read by that of the heartbeat."""

    count: int = 0
    limit: float | None = None
    """Seconds that the turn under way may take at least; None: the thread rests, or a deadline has it."""
    usual: float = math.inf
    """`limit` of work; infinite until some is done, for the first compiles and reads what later finds."""
    failure: str = ""
    """Why the thread has ended."""

    @contextmanager
    def working(self, *, proof: bool = False) -> Iterator[None]:
        """Inside, turns are expected; after the first that is `proof` of what turns take, within `usual`."""
        self.count, self.limit = self.count + 1, self.usual
        try:
            yield
            self.usual = TURN if proof else self.usual
        finally:
            self.count, self.limit = self.count + 1, None


TURNS = Turns()
"""Of this process."""


class Beat(NamedTuple):
    """What a process says of itself."""

    serial: Any
    """Another in every beat."""
    turns: int
    limit: float | None = None
    """As `Turns.limit`."""
    failure: str = ""
    memory: float = 0.0
    """GB that it has in memory."""


@dataclass
class Pulse:
    """Whether one process is frozen, by its beats. Its clock is that of who looks."""

    last: Beat | None = None
    silent: float = 0.0
    """Seconds without a new beat."""
    turning: float = 0.0
    """Seconds that the turn under way takes."""
    longest: float = 0.0
    """Seconds of the longest turn that has ended."""
    leave: float = 0.0
    """Seconds that the turn under way was allowed in a look at it."""
    quiet: float = 0.0
    """Seconds of the longest silence that a beat has ended: one may hold the interpreter as it works."""

    def look(self, beat: Beat | None, passed: float, allowed: float = 0.0) -> str:
        """Why it is frozen, or "". `passed` are the seconds since the last look in which somebody looked.

        None is no beat yet: how long a process may take to start is its starter's to say. The turn under way
        may take `allowed` seconds, which an update of weights has; it is no measure for others then.
        """
        last, self.last = self.last, beat or self.last
        if beat is None or beat.failure or last is None:
            return beat.failure if beat else ""
        self.leave = max(self.leave, allowed)
        if beat.serial != last.serial:
            self.quiet, self.silent = max(self.quiet, self.silent), 0.0
        else:
            self.silent += passed
        if beat.turns != last.turns or beat.limit is None:
            usual = beat.turns != last.turns and last.limit is not None and not self.leave
            self.longest = max(self.longest, self.turning + passed) if usual else self.longest
            self.turning = self.leave = 0.0
        else:
            self.turning += passed
        unproven = not beat.turns or beat.limit == math.inf
        if self.silent >= max(LOADING if unproven else SILENCE, TWICE * self.quiet):
            return f"frozen: no sign of life for {self.silent:.0f} s"
        if beat.limit is not None and self.turning >= max(beat.limit, TIMES * self.longest, self.leave):
            return f"frozen: its thread has been in one turn for {self.turning:.0f} s"
        return ""
