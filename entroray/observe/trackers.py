"""Where metrics are copied to, beside the journal; the journal alone is the truth.

A tracker is a function of `TrackedRun`, with settings by keyword, that returns a `Tracker`. It is opened and
called in a thread of its own (tracker_thread.py). One that may have a `finish` is told how the run ended.
"""

import asyncio
import json
import os
import posixpath
import re
import secrets
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from csv import DictReader, DictWriter
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from entroray.binding import declare
from entroray.errors import EntrorayError, PreflightError, Stopped, first_line

SETTING = "observe.trackers"


@dataclass(frozen=True)
class TrackedRun:
    """The run that a tracker is opened for, at its start or at its resumption."""

    folder: Path
    """The run directory; a tracker's own files go into a folder of it."""
    name: str
    """`run.name` and the folder's own name, for people: of two runs, of a lab's cells too, they differ."""
    settings: Mapping[str, Any]
    """The whole configuration, of plain lists and dictionaries."""
    first_step: int
    """1, or the first step after a resumption: what the tracker holds of it and later ones is outdated."""
    history: Sequence[Mapping[str, Any]] = ()
    """Lines of metrics.jsonl from before a resumption, oldest first, those that are outdated included."""

    def lines(self) -> Iterator[tuple[int, dict[str, float]]]:
        """Step and finite metrics of the lines that are not outdated."""
        for line in self.history:
            if line["step"] < self.first_step:
                yield line["step"], {k: v for k, v in line.items() if k != "step" and v is not None}


@dataclass(frozen=True)
class RunSummary:
    """What a run came to."""

    status: Literal["finished", "stopped", "failed"]
    """Stopped is by Ctrl-C or SIGTERM."""
    exit_code: int
    reason: str
    """What ended it, in a sentence; empty where it is finished."""
    step: int
    """The last."""
    metrics: Mapping[str, float]
    """The last known value of each."""
    best: tuple[int, float] | None
    """Step and value of the highest `eval/greedy`; None without an evaluation."""
    health: str
    """The verdict on its entropy, in a line."""

    def flat(self) -> dict[str, str | int | float]:
        """All but the metrics, by name."""
        best = {"best/step": self.best[0], "best/eval/greedy": self.best[1]} if self.best else {}
        texts = {"run/status": self.status, "run/reason": self.reason, "run/health": self.health}
        return {**texts, "run/exit_code": self.exit_code, "run/step": self.step, **best}


def _ended(error: BaseException | None) -> tuple[Literal["finished", "stopped", "failed"], int]:
    """The status and the exit code of a run that `error` ended, or nothing."""
    if error is None:
        return "finished", 0
    signals = {KeyboardInterrupt: signal.SIGINT, asyncio.CancelledError: signal.SIGTERM}
    if number := signals.get(type(error)):
        return "stopped", 128 + number
    code = error.exit_code if isinstance(error, EntrorayError) else 1
    return ("stopped" if isinstance(error, Stopped) else "failed"), code


def summarize(
    error: BaseException | None, history: Sequence[Mapping[str, Any]] = (), health: str = ""
) -> RunSummary:
    """What a run came to that has the metrics `history`, and that `error` ended."""
    status, code = _ended(error)
    last = {name: value for line in history for name, value in line.items() if value is not None}
    known = [(line["eval/greedy"], line["step"]) for line in history if line.get("eval/greedy") is not None]
    accuracy, step = max(known, key=lambda pair: pair[0], default=(None, 0))
    best = None if accuracy is None else (step, accuracy)
    reason = "" if error is None else first_line(error)
    return RunSummary(status, code, reason, int(last.pop("step", 0)), last, best, health)


@runtime_checkable
class Tracker(Protocol):
    """Takes the finite metrics of every step, in order; step 0 is an evaluation before the first.

    `finish(summary: RunSummary)`, where it has one, comes before `close`, however the run ends.
    """

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


def tensorboard(run: TrackedRun) -> Tracker:
    """Event files in the folder `tensorboard` of the run: one scalar per metric, under its own name."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.first_step)
    settings = json.dumps(run.settings, indent=2, default=str).replace("\n", "\n    ")
    writer.add_text("run/settings", f"{run.name}\n\n    {settings}", run.first_step)
    return TensorBoard(writer)


@dataclass(frozen=True)
class TensorBoard:
    """A writer of event files as a tracker."""

    writer: Any

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One scalar per metric."""
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def finish(self, summary: RunSummary) -> None:
        """The summary as a list of text."""
        lines = "\n".join(f"- {name}: {value}" for name, value in summary.flat().items())
        self.writer.add_text("run/summary", lines, summary.step)

    def close(self) -> None:
        """Writes what is still in memory."""
        self.writer.close()


def csv(run: TrackedRun) -> Tracker:
    """`metrics.csv` in the run's folder, a line a step, and `summary.csv` at the end.

    A column is empty where its metric was not measured; a new one comes last, and rewrites the file once.
    """
    table = Csv(run.folder)
    table.rewrite([{"step": step, **metrics} for step, metrics in run.lines()])
    return table


@dataclass
class Csv:
    """A table of the metrics as a tracker."""

    folder: Path
    columns: list[str] = field(default_factory=lambda: ["step"])

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append a line; write them all where a metric is new."""
        row = {"step": step, **metrics}
        if row.keys() <= set(self.columns):
            self._write("metrics.csv", self.columns, [row], mode="a")
        else:
            with (self.folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
                rows = list(DictReader(file))
            self.rewrite([*rows, row])

    def rewrite(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Have the file hold `rows`; a reader sees it as it was, or whole."""
        self.columns = list(dict.fromkeys([*self.columns, *(name for row in rows for name in row)]))
        self._write("metrics.csv.part", self.columns, [{n: n for n in self.columns}, *rows])
        os.replace(self.folder / "metrics.csv.part", self.folder / "metrics.csv")

    def finish(self, summary: RunSummary) -> None:
        """The summary, a line each."""
        rows = [{"name": name, "value": value} for name, value in summary.flat().items()]
        self._write("summary.csv", ["name", "value"], [{"name": "name", "value": "value"}, *rows])

    def close(self) -> None:
        """Nothing is open."""

    def _write(self, name: str, columns: Sequence[str], rows: Sequence[Mapping], mode: str = "w") -> None:
        with (self.folder / name).open(mode, newline="", encoding="utf-8") as file:
            DictWriter(file, columns, lineterminator="\n").writerows(rows)


@dataclass(frozen=True)
class Continued:
    """A tracker that a resumed run goes on with, and that cannot take a step back."""

    write: Callable[[int, Mapping[str, float]], None]
    finish: Callable[[RunSummary], None]
    close: Callable[[], None]
    after: int
    """It has the steps up to this one; -1: none."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write a step that it has not."""
        if step > self.after:
            self.write(step, metrics)

    def caught_up(self, run: TrackedRun) -> "Continued":
        """Write the steps from before it: it may be new in a resumed run."""
        for step, metrics in run.lines():
            self.log(step, metrics)
        return self


def _kept_id(run: TrackedRun, tracker: str, make: Callable[[], str]) -> tuple[str, int]:
    """The id of a run with a tracker, kept in its folder, and the last step that it was told of; -1: none."""
    file = run.folder / tracker / "run-id"
    if file.is_file():
        return file.read_text().strip(), run.history[-1]["step"] if run.history else -1
    file.parent.mkdir(exist_ok=True)
    file.write_text(made := make())
    return made, -1


def _refuse_missing(extra: str, *modules: str) -> None:
    """PreflightError unless every module of an extra of ours is installed."""
    if missing := [name for name in modules if find_spec(name) is None]:
        raise PreflightError(
            f"{SETTING}: {extra} needs {' and '.join(missing)}, not installed here: pip install "
            f"'entroray[{extra}]' (in a checkout: ENTRORAY_EXTRAS={extra} launch/setup.sh), or leave it out"
        )


QUIET = {"silent": True, "console": "off"}
"""What keeps wandb out of the terminal and away from standard input."""


def _wandb_ready(*, mode: str | None = None, settings: Mapping[str, Any] | None = None, **_: Any) -> None:
    """PreflightError without the package, or online without a key."""
    _refuse_missing("wandb", "wandb")
    import wandb as library

    given = library.setup(library.Settings(**QUIET)).settings.model_copy(update=dict(settings or {}))
    if (mode or given.mode) in ("offline", "dryrun", "disabled") or given.api_key:
        return
    if not library.login(host=given.base_url, prompt=False, verify=False):
        raise PreflightError(
            f"{SETTING}: wandb has no key for {given.base_url}: `wandb login`, or WANDB_API_KEY=..., or "
            "[{fn: wandb, mode: offline}] and `wandb sync` afterwards"
        )


@declare(ready=_wandb_ready)
def wandb(
    run: TrackedRun,
    *,
    project: str | None = None,
    entity: str | None = None,
    group: str | None = None,
    tags: Sequence[str] = (),
    job_type: str | None = None,
    notes: str | None = None,
    mode: Literal["online", "offline", "disabled", "shared"] | None = None,
    settings: dict | None = None,
) -> Tracker:
    """A run of Weights & Biases, with its files in the folder `wandb` of the run.

    `settings` go to `wandb.Settings`, untouched.
    """
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb as library

    library.setup(library.Settings(**QUIET))
    key, after = _kept_id(run, "wandb", lambda: secrets.token_hex(4))
    opened = library.init(
        project=project or os.environ.get("WANDB_PROJECT", "entroray"),
        entity=entity,
        group=group,
        tags=list(tags) or None,
        job_type=job_type,
        notes=notes,
        mode=mode,
        dir=run.folder,
        id=key,
        name=run.name[:128],
        config=dict(run.settings),
        resume="allow",
        reinit="create_new",
        settings={**QUIET, "init_timeout": 45, "finish_timeout": 25, "finish_timeout_raises": True}
        | (settings or {}),
    )

    def finish(summary: RunSummary) -> None:
        opened.summary.update(summary.flat())
        opened.finish(exit_code=summary.exit_code)

    write = lambda step, metrics: opened.log(dict(metrics), step=step)
    return Continued(write, finish, opened.finish, after).caught_up(run)


def _mlflow_ready(**_: Any) -> None:
    """PreflightError without the packages."""
    _refuse_missing("mlflow", "mlflow", "sqlalchemy", "alembic")


ENDS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
"""Status of a run -> that of MLflow."""


@declare(ready=_mlflow_ready)
def mlflow(
    run: TrackedRun, *, uri: str | None = None, experiment: str | None = None, tags: dict | None = None
) -> Tracker:
    """A run of MLflow, in `mlflow/mlflow.db` of the run's folder unless `uri` is a server or another store.

    Parameters are the settings, by dotted path.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")  # that its tables are made is no news
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{run.folder}/mlflow/mlflow.db"
    (run.folder / "mlflow").mkdir(exist_ok=True)
    client, name = MlflowClient(uri), experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME", "entroray")
    found = client.get_experiment_by_name(name)
    place = found.experiment_id if found else client.create_experiment(name)
    make = lambda: client.create_run(place, run_name=run.name[:250], tags=tags).info.run_id
    key, after = _kept_id(run, "mlflow", make)

    def write(step: int, metrics: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        values = [Metric(_mlflow_name(name), value, now, step) for name, value in metrics.items()]
        for start in range(0, len(values), 1000):
            client.log_batch(key, metrics=values[start : start + 1000])

    def finish(summary: RunSummary) -> None:
        words = summary.flat()
        write(summary.step, {k: float(v) for k, v in words.items() if not isinstance(v, str)})
        for word, value in words.items():
            if isinstance(value, str):
                client.set_tag(key, word, value[:5000])
        client.set_terminated(key, ENDS[summary.status])

    client.update_run(key, status="RUNNING")
    had = client.get_run(key).data.params  # of which none can be changed
    params = {_mlflow_name(path): str(value)[:6000] for path, value in _flat(run.settings)}
    values = [Param(*pair) for pair in params.items() if pair[0] not in had]
    for start in range(0, len(values), 100):
        client.log_batch(key, params=values[start : start + 100])
    return Continued(write, finish, lambda: None, after).caught_up(run)


def _mlflow_name(name: str) -> str:
    """As MLflow takes it (mlflow.utils.validation): `pass@8` is `pass_at_8`, at most 250 characters."""
    plain = re.sub(r"[^/\w.\- :]", "_", name.replace("@", "_at_"))
    return posixpath.normpath(plain).lstrip("/.")[:250] or "_"


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting by its dotted path; lists are whole."""
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
