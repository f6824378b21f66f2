"""Where metrics are copied to, beside the journal; the journal alone is the truth.

A tracker is a function of `TrackedRun`, with settings by keyword, that returns a `Tracker`. It is opened and
called in a thread of its own (tracker_thread.py). One that may have a `finish` is told how the run ended.
"""

import json
import logging
import os
import posixpath
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from csv import DictReader, writer
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable
from urllib.parse import urlsplit

from entroray.binding import declare
from entroray.errors import PreflightError
from entroray.installation import install_line
from entroray.observe.run_summary import STEP, RunSummary

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


@runtime_checkable
class Tracker(Protocol):
    """Takes the finite metrics of every step, in order; step 0 is an evaluation before the first.

    `finish(summary: RunSummary)`, where it has one, comes before `close`, however the run ends.
    """

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class Functions:
    """A tracker of three functions; steps up to `after` are there from before a resumption."""

    write: Callable[[int, Mapping[str, float]], None]
    finish: Callable[[RunSummary], None]
    close: Callable[[], None]
    after: int = -1

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write a step that is not there."""
        if step > self.after:
            self.write(step, metrics)

    def caught_up(self, run: TrackedRun) -> "Functions":
        """Write the steps that are missing: a killed run did not write all, or was not tracked."""
        for step, metrics in run.lines():
            self.log(step, metrics)
        return self


def tensorboard(run: TrackedRun) -> Tracker:
    """Event files in the folder `tensorboard` of the run: one scalar per metric, under its own name."""
    from torch.utils.tensorboard import SummaryWriter

    events: Any = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.first_step)
    settings = json.dumps(run.settings, indent=2, default=str).replace("\n", "\n    ")
    events.add_text("run/settings", f"{run.name}\n\n    {settings}", run.first_step)

    def write(step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            events.add_scalar(name, value, step)

    def finish(summary: RunSummary) -> None:
        lines = "\n".join(f"- {name}: {value}" for name, value in summary.flat().items())
        events.add_text("run/summary", lines, summary.step)

    return Functions(write, finish, events.close)


def csv(run: TrackedRun) -> Tracker:
    """`metrics.csv` in the run's folder, a line a step, and `summary.csv` at the end.

    A column is empty where its metric was not measured; a new one comes last, and rewrites the file once.
    """
    file, columns = run.folder / "metrics.csv", ["step"]

    def rows() -> list[dict[str, Any]]:
        with file.open(newline="", encoding="utf-8") as opened:
            return list(DictReader(opened))

    def cells(row: Mapping[str, Any]) -> list[Any]:
        return [row.get(name, "") for name in columns]

    def rewrite(new: Sequence[Mapping[str, Any]]) -> None:
        columns[:] = dict.fromkeys([*columns, *(name for row in new for name in row)])
        aside = file.with_name("metrics.csv.part")
        _put_lines(aside, [columns, *map(cells, new)])
        os.replace(aside, file)

    def write(step: int, metrics: Mapping[str, float]) -> None:
        row = {"step": step, **metrics}
        if row.keys() <= set(columns):
            _put_lines(file, [cells(row)], "a")
        else:
            rewrite([*rows(), row])

    def finish(summary: RunSummary) -> None:
        _put_lines(run.folder / "summary.csv", [("name", "value"), *summary.flat().items()])

    resumed = run.first_step > 1 and file.is_file()
    before = (
        [row for row in rows() if row.get("step") == "0"] if resumed else []
    )  # in no line of metrics.jsonl
    rewrite([*before, *({"step": step, **metrics} for step, metrics in run.lines())])
    return Functions(write, finish, lambda: None)


def _put_lines(file: Path, lines: Sequence[Sequence[Any]], mode: str = "w") -> None:
    with file.open(mode, newline="", encoding="utf-8") as opened:
        writer(opened, lineterminator="\n").writerows(lines)


def _kept_id(run: TrackedRun, tracker: str, make: Callable[[], str]) -> str:
    """The id of a run with a tracker, made once and kept in its folder."""
    file = run.folder / tracker / "run-id"
    file.parent.mkdir(exist_ok=True)
    if not file.is_file():
        file.write_text(make())
    return file.read_text().strip()


def _refuse_missing(extra: str, *modules: str) -> None:
    """PreflightError unless every module of an extra of ours is installed."""
    found = {name: find_spec(name) for name in modules}  # a folder of that name has no origin
    if missing := [name for name, spec in found.items() if spec is None or spec.origin is None]:
        raise PreflightError(
            f"{SETTING}: {extra} needs {' and '.join(missing)}, not installed here: "
            f"{install_line(extra)}, or leave it out"
        )


QUIET = {"silent": True, "console": "off"}
"""What keeps wandb out of the terminal and away from standard input."""


def _wandb_ready(*, mode: str | None = None, settings: Mapping[str, Any] | None = None, **_: Any) -> None:
    """PreflightError without the package, with a key that would be written, or online without a key."""
    if "api_key" in (settings or {}):
        raise PreflightError(
            f"{SETTING}: wandb's settings.api_key would be written with the run: set WANDB_API_KEY instead"
        )
    _refuse_missing("wandb", "wandb")
    import wandb as library

    base, own = library.setup(library.Settings(**QUIET)).settings, settings or {}
    online = (mode or own.get("mode") or base.mode) not in ("offline", "dryrun", "disabled")
    if online and "base_url" not in own and not library.login(prompt=False, verify=False):
        raise PreflightError(
            f"{SETTING}: wandb has no key for {base.base_url}: `wandb login`, or WANDB_API_KEY=..., or "
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

    `settings` go to `wandb.Settings`, untouched. A resumed run is the same one. Of it W&B keeps what it has:
    offline, that is in a folder of each process, and the last one's has every step.
    """
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb as library

    library.setup(library.Settings(**QUIET))
    opened = library.init(
        project=project or os.environ.get("WANDB_PROJECT", "entroray"),
        entity=entity,
        group=group,
        tags=list(tags) or None,
        job_type=job_type,
        notes=notes,
        mode=mode,
        dir=run.folder,
        id=_kept_id(run, "wandb", lambda: secrets.token_hex(4)),
        name=os.environ.get("WANDB_NAME", run.name)[:128],
        config=json.loads(json.dumps(run.settings, default=str)),
        resume="allow",
        allow_val_change=True,
        reinit="create_new",
        settings={**QUIET, "init_timeout": 45, "finish_timeout": 25, "finish_timeout_raises": True}
        | (settings or {}),
    )

    def finish(summary: RunSummary) -> None:
        opened.summary.update(summary.flat())
        opened.finish(exit_code=summary.exit_code)

    write = lambda step, metrics: opened.log(dict(metrics), step=step)
    return Functions(write, finish, opened.finish).caught_up(run)


def _mlflow_ready(*, uri: str | None = None, **_: Any) -> None:
    """PreflightError without the packages, or with a password that would be written."""
    if "@" in urlsplit(uri or "").netloc:
        raise PreflightError(
            f"{SETTING}: mlflow's uri holds a password, which would be written with the run: set "
            "MLFLOW_TRACKING_URI, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, instead"
        )
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
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    logging.getLogger("mlflow").setLevel(logging.WARNING)  # that its tables are made is no news
    folder = run.folder / "mlflow"
    folder.mkdir(exist_ok=True)
    own = f"sqlite:///{folder}/mlflow.db"
    store = uri or os.environ.get("MLFLOW_TRACKING_URI") or own
    client, artifacts = MlflowClient(store), str(folder / "artifacts") if store == own else None
    name = experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME", "entroray")
    found = client.get_experiment_by_name(name)
    place = found.experiment_id if found else client.create_experiment(name, artifacts)
    make = lambda: client.create_run(place, run_name=run.name[:250], tags=tags).info.run_id
    key = _kept_id(run, "mlflow", make)
    had = client.get_run(key).data.params  # of which none can be changed
    params = {_mlflow_name(path): str(value)[:6000] for path, value in _flat(run.settings)}
    for some in _chunks([Param(*pair) for pair in params.items() if pair[0] not in had], 100):
        client.log_batch(key, params=some)
    client.update_run(key, status="RUNNING")

    def put(*lines: tuple[int, Mapping[str, float]]) -> None:
        now = int(time.time() * 1000)
        rows = [Metric(_mlflow_name(k), v, now, step) for step, each in lines for k, v in each.items()]
        for some in _chunks(rows, 1000):
            client.log_batch(key, metrics=some)

    def finish(summary: RunSummary) -> None:
        words = {name: value for name, value in summary.flat().items() if name != STEP}
        put((summary.step, {name: float(v) for name, v in words.items() if not isinstance(v, str)}))
        for name, value in words.items():
            if isinstance(value, str):
                client.set_tag(key, name, value[:5000])
        client.set_terminated(key, ENDS[summary.status])

    after = max((m.step for m in client.get_metric_history(key, STEP)), default=-1)
    stepped = lambda step, metrics: (step, {**metrics, STEP: step})
    put(*(stepped(*line) for line in run.lines() if line[0] > after))  # in few calls, for they may be many
    return Functions(lambda *line: put(stepped(*line)), finish, lambda: None, after)


def _chunks(values: Sequence[Any], most: int) -> Iterator[Sequence[Any]]:
    return (values[start : start + most] for start in range(0, len(values), most))


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
