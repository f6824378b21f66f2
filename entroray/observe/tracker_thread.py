"""A tracker in a thread of its own: one that hangs holds neither a step nor the end of a run."""

import math
import threading
import time
from collections.abc import Callable, Mapping
from queue import SimpleQueue

from entroray.observe.run_summary import RunSummary
from entroray.observe.trackers import Tracker

PATIENCE, END = 120.0, 30.0
"""Seconds that a tracker may take for what it was given, and all of them together at the end of a run."""


class LostError(Exception):
    """A tracker has failed, or hangs: the reason."""


class TrackerThread:
    """A tracker that is opened and called in a daemon thread; what it is given waits there in order.

    Every method returns at once, `close` after `end` seconds at the latest. LostError if an earlier call
    failed, or has not been done `patience` seconds after it was given.
    """

    def __init__(
        self, name: str, start: Callable[[], Tracker], *, patience: float = PATIENCE, end: float = END
    ):
        self.name, self.patience, self.end = name, patience, end
        self._calls: SimpleQueue[tuple[float, Callable[[Tracker], None] | None]] = SimpleQueue()
        self._given = time.monotonic()  # when the call that is under way was; infinity between two
        self._until = math.inf
        self._error: BaseException | None = None
        self._over = threading.Event()
        threading.Thread(target=self._work, args=(start,), name=f"tracker {name}", daemon=True).start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Have the tracker log a step."""
        self._give(lambda tracker: tracker.log(step, metrics))

    def finish(self, summary: RunSummary) -> None:
        """Have the tracker end: its `finish`, where it has one, and its `close`."""
        self._until = time.monotonic() + self.end
        self._give(lambda tracker: _finish(tracker, summary))
        self._give(None)

    def close(self) -> None:
        """Wait for its end."""
        if not self._over.wait(max(0.0, self._until - time.monotonic())):
            raise LostError(f"it was not done {self.end:g} s after the run's end")
        self.check()

    def check(self) -> None:
        """Raise LostError if it has failed or hangs."""
        if self._error is not None:
            raise LostError(repr(self._error)) from self._error
        if time.monotonic() - self._given > self.patience:
            raise LostError(f"it has hung for {self.patience:g} s")

    def _give(self, call: Callable[[Tracker], None] | None) -> None:
        self.check()
        self._calls.put((time.monotonic(), call))

    def _work(self, start: Callable[[], Tracker]) -> None:
        try:
            tracker, call = start(), None
            while True:
                self._given = math.inf
                given, call = self._calls.get()
                if call is None:
                    break
                self._given = given
                call(tracker)
        except BaseException as error:  # boundary: `check` says it; a copy of the metrics ends no run
            self._error = error
        self._over.set()


def _finish(tracker: Tracker, summary: RunSummary) -> None:
    try:
        if finish := getattr(tracker, "finish", None):
            finish(summary)
    finally:
        tracker.close()
