"""What every role did when, as Chrome trace events in JSON: for ui.perfetto.dev or chrome://tracing.

The format is Google's "Trace Event Format": an array of events whose end may be missing. Times are those of
the driver's clock at call and at answer, so that nodes need no common one.
"""

import gzip
import json
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from entroray.errors import InfrastructureError

LIMIT = 1_000_000
"""Events of one file, about 100 bytes each before they are packed; those that come later are left out."""
BUFFER = 2_000
"""Events kept in memory."""
UNNAMED = {"verifier": "judge"}
"""What a call without a name is called, by role; one to another role is called as the driver's phase is."""


def trace_path(folder: Path, first_step: int) -> Path:
    """Of the run in `folder` from this step on: a resumed run has another file for each time it went on."""
    return folder / ("trace.json.gz" if first_step == 1 else f"trace-{first_step:06d}.json.gz")


class Trace:
    """Spans and counters; without a path they go nowhere.

    Written as complete gzip members, so that the file of a killed process opens. A track has as many lanes
    as it has spans at once. `report(kind, **fields)` hears that the disk refused (`trace_lost`), after which
    nothing is written, and that the file is full (`trace_full`).
    """

    def __init__(
        self,
        path: Path | None = None,
        report: Callable[..., None] = lambda kind, **fields: None,
        limit: int = LIMIT,
    ) -> None:
        self.path, self.report, self.left = path, report, limit
        self.phase, self.origin = "start", time.monotonic()
        self.events: list[str] = []
        self.lanes: dict[str, tuple[int, list[float]]] = {}
        """By track: its number, and when the last span of each lane ended."""
        self.values = Counter[str]()
        self.drawn, self.since = 0, self.origin
        if path:
            self._write(b"[\n" + json.dumps(_named("counters", 0)).encode(), "wb")

    def span(self, track: str, name: str, began: float, ended: float, **args: float | str) -> None:
        """One thing that `track`, such as `generator 0`, did from `began` to `ended` (monotonic seconds)."""
        if not self.path:
            return
        role = track.split()[0]
        start = self._microseconds(began)
        times = {"ts": start, "dur": self._microseconds(ended) - start}
        place = self._place(track, began, ended)
        self._add({"name": name or UNNAMED.get(role, self.phase), "ph": "X", **times, **place, "args": args})
        if role == "generator":
            self._count_tokens(int(args.get("tokens", 0)), ended)

    def change(self, counter: str, by: int) -> None:
        """Move a counter that began at 0."""
        if self.path:
            self.values[counter] += by
            self._count(counter, self.values[counter], time.monotonic())

    def flush(self) -> None:
        """Write what is in memory."""
        if self.path and self.events:
            events, self.events = self.events, []
            self._write(b"".join(b",\n" + event.encode() for event in events), "ab")

    def close(self) -> None:
        """Write the end; nothing is taken afterwards."""
        self.flush()
        if self.path:
            self._write(b"\n]\n", "ab")
        self.path = None

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _microseconds(self, moment: float) -> int:
        return round((moment - self.origin) * 1e6)

    def _place(self, track: str, began: float, ended: float) -> dict[str, int]:
        """Process and thread of the viewer: a track, and its first lane where nothing else was going on."""
        if track not in self.lanes:
            number = len(self.lanes) + 1
            self.lanes[track] = number, []
            self._add(_named(track, number))
        number, lanes = self.lanes[track]
        free = next((i for i, last in enumerate(lanes) if last <= began), len(lanes))
        lanes[free : free + 1] = [ended]  # spans come as they end
        return {"pid": number, "tid": free}

    def _count_tokens(self, tokens: int, now: float) -> None:
        self.drawn += tokens
        if (seconds := now - self.since) >= 1.0:
            self._count("tokens/s", round(self.drawn / seconds), now)
            self.drawn, self.since = 0, now

    def _count(self, name: str, value: int, now: float) -> None:
        self._add({"name": name, "ph": "C", "ts": self._microseconds(now), "pid": 0, "args": {name: value}})

    def _add(self, event: dict[str, Any]) -> None:
        if self.left <= 0:
            return
        self.left -= 1
        self.events.append(json.dumps(event, separators=(",", ":")))
        if self.left == 0:
            self._tell("trace_full", path=str(self.path))
        if len(self.events) >= BUFFER:
            self.flush()

    def _write(self, text: bytes, mode: str) -> None:
        """One gzip member in one call; a trace that the disk refuses is given up."""
        assert self.path
        try:
            with open(self.path, mode) as file:
                file.write(gzip.compress(text, compresslevel=1))
        except OSError as error:
            path, self.path = self.path, None
            self._tell("trace_lost", path=str(path), error=str(error))

    def _tell(self, kind: str, **fields: str) -> None:
        """In the run's events; what the disk refuses there ends the run elsewhere, not who is traced."""
        with suppress(InfrastructureError):
            self.report(kind, **fields)


def _named(track: str, number: int) -> dict[str, Any]:
    return {"name": "process_name", "ph": "M", "pid": number, "args": {"name": track}}


NO_TRACE = Trace()
