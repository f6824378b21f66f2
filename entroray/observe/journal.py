"""A run on disk: metrics.jsonl, events.jsonl and the token records."""

import asyncio
import json
import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from datetime import UTC, datetime
from functools import partial
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TextIO

import torch

from entroray.errors import InfrastructureError, PreflightError, Stopped, writing
from entroray.observe import token_records
from entroray.observe.rollout_records import rollout_table
from entroray.observe.run_files import complete_lines, json_object, read_metrics
from entroray.observe.run_summary import RunSummary, summarize
from entroray.observe.tracker_thread import LostError, TrackerThread
from entroray.observe.trackers import SETTING, Tracker
from entroray.redaction import hide_secrets
from entroray.types import Batch, Group, Tokens


class Journal:
    """Appends to the files of a run directory and copies metrics to trackers; a failing tracker is dropped.

    `trackers` are called as a step is written. `copies`, those of the settings, are given each step and the
    evaluation before the first; one that is dropped is told to `say`. As a context it closes by what ends it.

    `step` and `skipped` may run in a thread beside `event`; `close` waits for them.

    Token records are written every `tokens_every` steps from step 1 on, never if it is 0, the columns of
    `tokens_half` at 16 bits; if the disk refuses
    one, the event `tokens_lost` records it and the run goes on. `vocabulary` is token id -> text.
    InfrastructureError if the disk refuses a line of metrics or events. What a crash left of a line is
    dropped when the files are opened; where it is more than the last one, the file is kept as `*.damaged`.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        tokens_every: int,
        trackers: Sequence[Tracker] = (),
        vocabulary: Mapping[int, str] | None = None,
        tokens_half: Sequence[str] = (),
    ):
        self.tokens_half, self._writing, self._line_by_line = tokens_half, threading.RLock(), threading.Lock()
        self.run_dir, self.tokens_every, self.trackers = run_dir, tokens_every, list(trackers)
        self.copies: list[TrackerThread] = []
        self.say: Callable[[str], None] = lambda line: None
        self.progress = no_progress
        self.summarize: Callable[[BaseException | None], RunSummary] = summarize
        self.refused: InfrastructureError | None = None
        """Why a line of `report` could not be written."""
        run_dir.mkdir(parents=True, exist_ok=True)
        dropped = {name: _drop_damaged(run_dir / name) for name in ("metrics.jsonl", "events.jsonl")}
        self._metrics, self._events = (_append_to(run_dir / name) for name in dropped)
        for name, lines in dropped.items():
            if lines:
                self.event("journal_damaged", file=name, lines=lines, kept=f"{name}.damaged")
        entries = read_metrics(run_dir / "metrics.jsonl")
        self.last_step: int = entries[-1]["step"] if entries else 0
        if vocabulary is not None and tokens_every:
            words = {str(token): text for token, text in vocabulary.items()}
            self._keep_vocabulary(json.dumps(words, ensure_ascii=False))

    def step(self, step: int, metrics: Mapping[str, float], groups: Sequence[Group], tokens: Tokens) -> None:
        """Append a line of metrics, NaN and infinity as null; ValueError unless `step` is past the last."""
        with self._writing:
            if self.refused:
                raise self.refused
            if step <= self.last_step:
                raise ValueError(
                    f"{self.run_dir / 'metrics.jsonl'} already holds step {self.last_step}, so step {step} "
                    f"cannot follow; to run it again call Journal.cut({step - 1}) first"
                )
            if self.tokens_every and (step - 1) % self.tokens_every == 0:
                self._record(step, groups, tokens)
            values = {name: float(value) for name, value in metrics.items() if name != "step"}
            finite = {name: v if math.isfinite(v) else None for name, v in values.items()}
            _line(self._metrics, {"step": step} | finite)
            self.last_step = step
            known = {name: v for name, v in finite.items() if v is not None}
            self._track(step, known, [*self.trackers, *self.copies])

    def event(self, kind: str, **fields: Any) -> None:
        """Append a line of {time (UTC), kind, fields}; values that JSON cannot hold become text or null.

        What is reported after `close`, by what is still being taken down, is not kept.
        """
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        with self._line_by_line:
            if self._events.closed:
                return
            _line(self._events, {"time": time, "kind": kind, "fields": plain(fields)})
        for tracker in [each for each in self.trackers if hasattr(each, "hear")]:
            self._ask(tracker, self.last_step, partial(tracker.hear, kind, fields))
        if kind == "evaluation":  # before step 1: it is in no line of metrics
            values = {k: v for k, v in fields.items() if k != "step" and math.isfinite(v)}
            self._track(fields["step"], values, self.copies)

    def report(self, kind: str, **fields: Any) -> None:
        """`event`, for who is in the middle of replacing what died: the next `step` raises a refusal."""
        try:
            self.event(kind, **fields)
        except InfrastructureError as error:
            self.refused = error

    def skipped(self, step: int, batch: Batch, tokens: Tokens) -> None:
        """Keep the batch of a skipped update, to be read by `torch.load(path, weights_only=False)`."""
        path = self.run_dir / "skipped" / f"step-{step:06d}.pt"
        with self._writing, writing(path):
            path.parent.mkdir(exist_ok=True)
            torch.save({"batch": batch, "tokens": tokens}, path)
        self.event("update_skipped", step=step, kept=str(path))

    def cut(self, step: int) -> None:
        """Delete metrics, events and token records beyond `step`, so that they can be written again."""
        of_step = lambda line: json.loads(line)["step"] <= step
        told = lambda line: json.loads(line)["fields"].get("step", 0) <= step
        with self._writing, self._line_by_line:
            self._metrics, kept, metrics = _keep_lines(self._metrics, of_step)
            self._events, _, events = _keep_lines(self._events, told)
        self.last_step = json.loads(kept[-1])["step"] if kept else 0
        kept_of = {kind: token_records.files(self.run_dir, kind) for kind in ("tokens", "rollouts")}
        beyond = [file for file in kept_of["tokens"] if token_records.step_of(file) > step]
        for file in {*beyond, *(f for f in kept_of["rollouts"] if token_records.step_of(f) > step)}:
            file.unlink()
        if beyond or metrics or events:
            self.event("journal_cut", step=step, metrics=metrics, events=events, token_files=len(beyond))

    def check(self) -> None:
        """Let go of the copies that have failed or hang, without waiting for a step."""
        for tracker in tuple(self.copies):
            self._ask(tracker, self.last_step, tracker.check)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        self.close(error)

    def close(self, error: BaseException | None = None) -> None:
        """Close the files and every tracker still held, once; nothing is raised by a full disk.

        `error` is what ended the run: the copies are told. A step still being written has `LAST` seconds.
        """
        if self._events.closed:
            return
        self._writing.acquire(timeout=LAST)  # never released: nothing is written any more
        self.close_trackers(error)
        for file in (self._metrics, self._events):
            with suppress(OSError):  # the line that a full disk refused is still in its buffer
                file.close()

    def close_trackers(self, error: BaseException | None) -> None:
        """Have every tracker still held end; the copies are told what the run came to, and `error`."""
        summary = self.summarize(error)
        calls: list[tuple[Tracker, Callable[[], None]]] = [
            *((tracker, partial(tracker.finish, summary)) for tracker in self.copies),
            *((tracker, tracker.close) for tracker in (*self.trackers, *self.copies)),
        ]
        for tracker, call in calls:
            with suppress(InfrastructureError):
                self._ask(tracker, self.last_step, call)

    def _keep_vocabulary(self, words: str) -> None:
        try:
            replace_text(self.run_dir / "tokens" / "vocabulary.json", words)
        except InfrastructureError as error:
            self.event("tokens_lost", step=self.last_step, reason=str(error))

    def _record(self, step: int, groups: Sequence[Group], tokens: Tokens) -> None:
        table = token_records.record_table(step, groups, tokens)
        place = partial(token_records.record_path, self.run_dir, step)
        try:
            token_records.write_records(place("rollouts"), rollout_table(step, groups))
            token_records.write_records(place("tokens"), table, self.tokens_half)
        except OSError as error:
            self.event("tokens_lost", step=step, reason=str(error))

    def _track(self, step: int, metrics: Mapping[str, float], trackers: Sequence[Tracker]) -> None:
        for tracker in tuple(trackers):
            self._ask(tracker, step, partial(tracker.log, step, metrics))

    def _ask(self, tracker: Tracker, step: int, call: Callable[[], None]) -> None:
        """Have a tracker do something; one that cannot is let go."""
        held: list[Any] = self.copies if tracker in self.copies else self.trackers
        if tracker not in held:
            return
        try:
            call()
        except SIGNALS:
            raise
        except BaseException as error:  # boundary: a copy of the metrics must not end the run
            held.remove(tracker)
            name = getattr(tracker, "name", type(tracker).__name__)
            reason = str(error) if isinstance(error, LostError) else repr(error)
            self.event("tracker_lost", tracker=name, step=step, reason=reason)
            if held is self.copies:
                self.say(f"{SETTING}: {name} is let go at step {step}: {reason}; the run goes on without it")


no_progress: Callable[..., Any] = lambda *of, **more: nullcontext(lambda **moved: None)
"""In place of `Console.progress` where nobody looks."""
LAST = 30.0
"""Seconds that the disk has for a step's lines and records when the run ends, by an error or a signal."""
SIGNALS = (KeyboardInterrupt, Stopped, asyncio.CancelledError)
"""What Ctrl-C and SIGTERM raise wherever the process is, in a tracker too."""


def _drop_damaged(path: Path) -> int:
    """Leave the lines that hold an object in the file, what it was beside it; how many were dropped."""
    lines = complete_lines(path)
    good = [line for line in lines if json_object(line, path) is not None]
    if len(good) < len(lines):
        os.replace(path, path.with_name(f"{path.name}.damaged"))
        replace_text(path, b"".join(line + b"\n" for line in good).decode())
    return len(lines) - len(good)


def series(metrics: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of `key` in the steps that measured it."""
    known = [(m["step"], m[key]) for m in metrics if m.get(key) is not None]
    return [step for step, _ in known], [value for _, value in known]


def first_and_last(values: Sequence[float], window: int = 5) -> tuple[float, float]:
    """Means of the first and of the last `window` values, or of all if there are fewer; needs one value."""
    first, last = values[:window], values[-window:]
    return sum(first) / len(first), sum(last) / len(last)


def replace_text(path: Path, text: str) -> None:
    """Write aside and rename, so that a reader sees the old text or the new, never a part.

    InfrastructureError, and nothing left aside, if the disk refuses.
    """
    aside = path.with_name(path.name + ".part")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            aside.write_text(text, encoding="utf-8")
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)


def refuse_links(run_dir: Path) -> None:
    """PreflightError for a link in the place of a file, through which a run would write somewhere else.

    A folder of it, such as `checkpoints`, may be a link to another disk.
    """
    for path in run_dir.iterdir():
        if path.is_symlink() and (path.name.startswith(".") or not path.is_dir()):
            raise PreflightError(
                f"{path} is a link to {os.readlink(path)}: a run's files are its own: move it away"
            )


def _append_to(path: Path) -> TextIO:
    """The file opened for appending, without a last line that a crash cut short."""
    with writing(path):
        with path.open("ab+") as file:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
        return path.open("a", encoding="utf-8")


def _keep_lines(file: TextIO, keep: Callable[[str], bool]) -> tuple[TextIO, list[str], int]:
    """The file with the lines to `keep` alone, opened for appending; those lines, and how many went."""
    path = Path(file.name)
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if keep(line)]
    if len(kept) < len(lines):
        file.close()
        replace_text(path, "".join(kept))
        file = _append_to(path)
    return file, kept, len(lines) - len(kept)


def _line(file: TextIO, entry: Mapping[str, Any]) -> None:
    text = json.dumps(entry, allow_nan=False)
    with writing(Path(file.name), REMEDY):
        file.write(text + "\n")
        file.flush()


REMEDY = "free some space there, then go on with the same command and run.resume=auto"


def plain(value: Any) -> Any:
    """What JSON can hold of `value`: numbers that are not finite are null, other objects are text."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else None
    return hide_secrets(str(value))
