"""A run's folder read again: metrics, events, token and rollout records. It needs no torch."""

import csv
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from entroray.errors import DataError, first_line, nearest

METRICS, EVENTS = "metrics.jsonl", "events.jsonl"
WORD = pa.dictionary(pa.int32(), pa.string())
TYPES = {
    **{"text": WORD, "int32": pa.int32(), "int64": pa.int64(), "float": pa.float32(), "bool": pa.bool_()},
    "rows": pa.list_(pa.int32()),
}


def record_schema(name: str) -> pa.Schema:
    """Every column of the table `name` beside this file with its type, unit and meaning, as in README.md."""
    with Path(__file__).with_name(name).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    meta = lambda row: {name: row[name] for name in ("unit", "meaning")}
    return pa.schema([pa.field(row["column"], TYPES[row["type"]], metadata=meta(row)) for row in rows])


SCHEMAS = {kind: record_schema(f"{kind[:-1]}_records.tsv") for kind in ("tokens", "rollouts")}


def record_path(run_dir: Path, step: int, kind: str = "tokens") -> Path:
    """The file of the records of `step`; `kind` is tokens or rollouts."""
    return run_dir / kind / f"step-{step:06d}.parquet"


def step_of(file: Path) -> int:
    """The step whose records `file` holds."""
    return int(file.stem.removeprefix("step-"))


def files(run_dir: Path, kind: str = "tokens") -> list[Path]:
    """Every record file of the run, oldest step first; a copy under another name is none."""
    found = (run_dir / kind).glob("step-*.parquet")
    return sorted((file for file in found if file.stem.removeprefix("step-").isdecimal()), key=step_of)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a .jsonl file, oldest first, without a last line that a crash cut short.

    Empty where there is no file; DataError names the first line that is no JSON object.
    """
    entries = []
    for number, line in enumerate(complete_lines(path), 1):
        if (entry := json_object(line, path)) is None:
            raise DataError(
                f"{path}, line {number} is no JSON object, as after a power cut: delete the line, or "
                "go on with the run (run.resume=auto), which does"
            )
        entries.append(entry)
    return entries


def complete_lines(path: Path) -> list[bytes]:
    """Every line that ends, but empty ones; DataError if `path` is there and cannot be read."""
    try:
        return [line for line in path.read_bytes().split(b"\n")[:-1] if line]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): a file belongs there") from error


def json_object(line: bytes, path: Path) -> dict[str, Any] | None:
    """The object of a line, or None if it holds none, or none of a step where the file is of steps."""
    try:
        entry = json.loads(line)
    except ValueError:  # no JSON, or no UTF-8
        return None
    stepped = path.name != METRICS or (isinstance(entry, dict) and isinstance(entry.get("step"), int))
    return entry if isinstance(entry, dict) and stepped else None


DAMAGED = (OSError, ValueError, KeyError, TypeError, AttributeError, NotImplementedError)
"""What a file that is cut short or foreign raises; Arrow's errors are all of these."""
Columns = str | Iterable[str] | None
Steps = int | Iterable[int] | None
Made = TypeVar("Made")


@dataclass(frozen=True)
class Run:
    """A run on disk, also one under way. Each call reads what it gives and no more; `.to_pandas()` follows.

    DataError names the file that is missing, damaged, or without what is asked for.
    """

    folder: Path

    @property
    def recorded(self) -> list[int]:
        """The steps with token records."""
        return [step_of(file) for file in files(self.folder)]

    def vocabulary(self) -> dict[int, str]:
        """Text by token id."""
        file = self._file("tokens/vocabulary.json")
        words = lambda: json.loads(file.read_text(encoding="utf-8")).items()
        return _made(lambda: {int(token): str(text) for token, text in words()}, file)

    def metrics(self) -> pa.Table:
        """A row for each step, a float column for each metric, null where it was not measured."""
        rows = read_metrics(self._file(METRICS))
        names = dict.fromkeys(name for row in rows for name in row if name != "step")
        make = lambda: {name: pa.array([row.get(name) for row in rows], pa.float64()) for name in names}
        steps = {"step": pa.array([row["step"] for row in rows], pa.int64())}
        return pa.table(steps | _made(make, self.folder / METRICS))

    def events(self) -> pa.Table:
        """A row for each event: time (UTC), kind, step (null without one) and fields (a JSON object)."""
        rows = read_metrics(self._file(EVENTS))
        make = lambda: {
            "time": pa.array([datetime.fromisoformat(r["time"]) for r in rows], pa.timestamp("ms", "UTC")),
            "kind": pa.array([r["kind"] for r in rows], pa.string()),
            "step": pa.array([r["fields"].get("step") for r in rows], pa.int64()),
            "fields": pa.array([json.dumps(r["fields"]) for r in rows], pa.string()),
        }
        return pa.table(_made(make, self.folder / EVENTS))

    def tokens(self, columns: Columns = None, steps: Steps = None) -> pa.Table:
        """A row for each response token: these columns of these steps, otherwise all of them."""
        return self._records("tokens", columns, steps)

    def rollouts(self, columns: Columns = None, steps: Steps = None) -> pa.Table:
        """A row for each rollout: these columns of these steps, otherwise all of them."""
        return self._records("rollouts", columns, steps)

    def _records(self, kind: str, columns: Columns, steps: Steps) -> pa.Table:
        there = {step_of(file): file for file in files(self.folder, kind)}
        if not there:
            raise DataError(
                f"{self.folder / kind} holds no records: the run made none (observe.tokens.every=0), has not "
                "begun its first step, or was copied without them"
            )
        wanted = [*there] if steps is None else [steps] if isinstance(steps, int) else [*steps]
        if lacking := [step for step in wanted if step not in there]:
            raise DataError(
                f"{self.folder / kind} has no step {lacking[0]}: it has {len(there)}, from {min(there)} to "
                f"{max(there)}, see Run.recorded"
            )
        names = [columns] if isinstance(columns, str) else None if columns is None else [*columns]
        if names is None:  # footers only
            names = [*dict.fromkeys(name for step in wanted for name in _stored(there[step]).names)]
        tables = [_columns(there[step], names, SCHEMAS[kind]) for step in wanted]
        return pa.concat_tables(tables or [SCHEMAS[kind].empty_table()]).unify_dictionaries()

    def _file(self, name: str) -> Path:
        if not (self.folder / name).is_file():
            raise DataError(f"{self.folder / name} is not there: copy the whole folder of the run")
        return self.folder / name


def read_run(folder: str | Path) -> Run:
    """The run in `folder`, as in runs/latest; DataError if there is none. Nothing is read yet."""
    place = Path(folder)
    if any((place / name).exists() for name in (METRICS, EVENTS, "tokens")):
        return Run(place.resolve())
    inside = sorted({file.parent for depth in ("*", "*/*") for file in place.glob(f"{depth}/{METRICS}")})
    hint = f"the folder of one is {inside[-1]}" if inside else f"it has no {METRICS}, no {EVENTS}, no tokens/"
    raise DataError(f"{place} {'holds no run' if place.is_dir() else 'is no folder'}: {hint}")


def _made(make: Callable[[], Made], file: Path) -> Made:
    """What `make` makes of a file; DataError if the file is damaged, or is gone by now."""
    try:
        return make()
    except DAMAGED as error:
        raise DataError(
            f"{file} cannot be read ({type(error).__name__}: {first_line(error)}): it is cut short, another "
            "program's, or was removed by a resumed run: copy it again, or leave it out"
        ) from error


def _columns(file: Path, names: Sequence[str], schema: pa.Schema) -> pa.Table:
    """These columns of a record file in the types of `schema`; DataError for one that it lacks."""
    there = _stored(file)
    if lacking := [name for name in names if name not in there.names]:
        raise DataError(f"{file} has no column `{lacking[0]}`: {nearest(lacking[0], there.names)}")
    wanted = pa.schema([(schema if name in schema.names else there).field(name) for name in names])
    read = _made(lambda: pq.ParquetFile(file).read(columns=[*names]), file)
    return _made(lambda: read.select([*names]).cast(wanted), file)


def _stored(file: Path) -> pa.Schema:
    return _made(lambda: pq.read_schema(file), file)
