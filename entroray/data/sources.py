"""Sources of data: a task's name -> its questions, and how many bad rows were left out.

A source of your own is a function of the task's name in one of your `packages`, with settings by keyword:
`data.source=my_lab.data.questions data.task=algebra data.settings.level=3`.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entroray.binding import Count, Probability
from entroray.errors import ConfigError, PreflightError
from entroray.reward import gym

SETTING = "data.source"
Row = Mapping[str, Any]
Rows = Iterator[tuple[int, Row | str]]
"""(line number from 1, the row or what is wrong with it)."""


@dataclass(frozen=True)
class Question:
    """One row of data, checked: a question, its known answer, and the row itself."""

    task: str
    text: str
    answer: str
    row: Row


def reasoning_gym(
    task: str, *, size: Count = 20000, seed: int = 0, **settings: Any
) -> tuple[list[Question], int]:
    """`size` generated questions of a reasoning-gym task; ConfigError for settings that the task refuses."""
    data = gym.dataset(task, size=size, seed=seed, settings=settings)
    try:
        return [Question(task, row["question"], row["answer"], row) for row in data], 0
    except ValueError as error:  # its generators give up after so many attempts
        raise ConfigError(f"reasoning-gym task {task!r} with {settings}: {error}") from error


def table(
    task: str,
    *,
    question: str = "question",
    answer: str | None = "answer",
    marker: str = "####",
    subset: str | None = None,
    split: str = "train",
    bad_rows: Probability = 0.0,
) -> tuple[list[Question], int]:
    """Questions of a .jsonl or .parquet file, else of the hub's data set `task`, and the rows left out.

    The reference is what follows the last `marker` of the answer column, or all of it; `answer=None`: none.
    A share of `bad_rows` may be bad and is left out. Above it PreflightError lists the bad rows by line
    number: the first 20, and how many in all.
    """
    name = Path(task).stem if Path(task).suffix in _READERS else task
    questions, bad = [], []
    for line, row in _rows(task, subset, split):
        checked = row if isinstance(row, str) else _question(name, row, question, answer, marker)
        if isinstance(checked, str):
            bad.append(f"line {line}: {checked}")
        else:
            questions.append(checked)
    if len(bad) > bad_rows * (len(bad) + len(questions)):
        more = f"\n  and {len(bad) - 20} more" if len(bad) > 20 else ""
        listed = "".join(f"\n  {problem}" for problem in bad[:20])
        total = len(bad) + len(questions)
        raise PreflightError(
            f"{task}: {len(bad)} of {total} rows are bad{listed}{more}\n"
            "Mend them, or let a share of them be left out: data.settings.bad_rows=0.01"
        )
    if not questions:
        raise PreflightError(f"{task}: no rows at all")
    return questions, len(bad)


def _rows(source: str, subset: str | None, split: str) -> Rows:
    path = Path(source).expanduser()
    reader = _READERS.get(path.suffix)
    if reader is None and path.is_file():
        raise ConfigError(f"{source}: neither {' nor '.join(_READERS)}")
    if reader is None:
        return _hub(source, subset, split)
    if not path.is_file():
        raise PreflightError(f"there is no file {path.resolve()}")
    return reader(path)


def _jsonl(path: Path) -> Rows:
    for line, raw in enumerate(path.read_bytes().split(b"\n"), 1):
        if raw.strip():
            try:
                row = json.loads(raw.decode())
            except UnicodeDecodeError as error:
                yield line, f"not UTF-8 at byte {error.start}"
            except json.JSONDecodeError as error:
                yield line, f"not JSON: {error}"
            else:
                yield line, row if isinstance(row, dict) else f"a {type(row).__name__}, not an object"


def _parquet(path: Path) -> Rows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(path).read()
    except (OSError, ValueError) as error:
        raise PreflightError(f"{path} cannot be read as Parquet: {error}") from error
    texts = {f.name for f in table.schema if pa.types.is_string(f.type) or pa.types.is_large_string(f.type)}
    raw = pa.schema([f.with_type(pa.large_binary()) if f.name in texts else f for f in table.schema])
    for line, row in enumerate(table.cast(raw).to_pylist(), 1):
        try:
            yield line, {k: v.decode() if k in texts and v is not None else v for k, v in row.items()}
        except UnicodeDecodeError as error:
            yield line, f"not UTF-8 at byte {error.start}"


def _hub(name: str, subset: str | None, split: str) -> Rows:
    import datasets

    try:
        data = datasets.load_dataset(name, subset, split=split)
    except (OSError, ValueError) as error:  # not found, offline, no such subset or split
        raise PreflightError(
            f"no .jsonl or .parquet file and no data set {name!r} (subset {subset}, split {split}): {error}"
        ) from error
    yield from enumerate(data, 1)


_READERS: Mapping[str, Callable[[Path], Rows]] = {".jsonl": _jsonl, ".parquet": _parquet}


def _question(task: str, row: Row, question: str, answer: str | None, marker: str) -> Question | str:
    """The question in `row`, or what is wrong with it."""
    for column in filter(None, (question, answer)):
        if problem := _problem(row, column, numbers=column == answer):
            return problem
    reference = str(row[answer]).rpartition(marker)[2].strip() if answer else ""
    if answer and not reference:
        return f"{answer!r} has nothing behind {marker!r}"
    return Question(task, row[question], reference, row)


def _problem(row: Row, column: str, *, numbers: bool) -> str | None:
    if column not in row:
        return f"no {column!r} (columns: {', '.join(map(str, row)) or 'none'})"
    value = row[column]
    if numbers and isinstance(value, int | float) and not isinstance(value, bool):
        return None
    if not isinstance(value, str):
        return f"{column!r} is {value!r}, not a string"
    if not value.strip():
        return f"{column!r} is {value!r}, which is empty"
    try:
        value.encode()
    except UnicodeEncodeError:
        return f"{column!r} is not UTF-8 (a lone surrogate)"
    return None
