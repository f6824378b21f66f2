"""Rows of data -> questions -> prompts -> an endless stream of them."""

import hashlib
import json
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from entroray.errors import ConfigError, PreflightError, nearest
from entroray.reward import gym
from entroray.types import Prompt

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


# Rows.


def reasoning_gym_rows(task: str, *, size: int, seed: int, settings: Row) -> list[Question]:
    """`size` generated questions of a reasoning-gym task; raises ConfigError for settings it cannot meet."""
    data = gym.dataset(task, size=size, seed=seed, settings=settings)
    try:
        return [Question(task, row["question"], row["answer"], row) for row in data]
    except ValueError as error:  # its generators give up after so many attempts
        raise ConfigError(f"reasoning-gym task {task!r} with {dict(settings)}: {error}") from error


def table_rows(
    source: str,
    *,
    question: str = "question",
    answer: str | None = "answer",
    marker: str = "####",
    subset: str | None = None,
    split: str = "train",
    bad_rows: float = 0.0,
) -> tuple[list[Question], int]:
    """Questions of a .jsonl or .parquet file, else of the hub's data set `source`, and the rows left out.

    The reference is what follows the last `marker` of the answer column, or all of it; `answer=None`: none.
    A share of `bad_rows` may be bad and is left out. Above it PreflightError lists the bad rows by line
    number: the first 20, and how many in all.
    """
    task = Path(source).stem if Path(source).suffix in _READERS else source
    questions, bad = [], []
    for line, row in _rows(source, subset, split):
        checked = row if isinstance(row, str) else _question(task, row, question, answer, marker)
        if isinstance(checked, str):
            bad.append(f"line {line}: {checked}")
        else:
            questions.append(checked)
    if len(bad) > bad_rows * (len(bad) + len(questions)):
        more = f"\n  and {len(bad) - 20} more" if len(bad) > 20 else ""
        listed = "".join(f"\n  {problem}" for problem in bad[:20])
        total = len(bad) + len(questions)
        raise PreflightError(
            f"{source}: {len(bad)} of {total} rows are bad{listed}{more}\n"
            "Mend them, or let a share of them be left out: data.bad_rows=0.01"
        )
    if not questions:
        raise PreflightError(f"{source}: no rows at all")
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
        return f"{column!r} is empty"
    try:
        value.encode()
    except UnicodeEncodeError:
        return f"{column!r} is not UTF-8 (a lone surrogate)"
    return None


# Rendering.


class _Formatter(string.Formatter):
    """str.format, plus `{text:compact}` without white space and `{list:,}` joined by what follows `:`."""

    def format_field(self, value: Any, format_spec: str) -> str:
        if isinstance(value, list | tuple):
            return (format_spec or " ").join(map(str, value))
        if format_spec == "compact":
            return "".join(str(value).split())
        return super().format_field(value, format_spec)


def render(question: Question, template: str | None) -> str:
    """`template` filled with the row's fields and those of its metadata; None: the row's own question.

    `"{expression:compact}="` -> `12+34-5=`; `"{numbers}->{target}"` -> `3 5 7->22`, `{numbers:,}` -> `3,5,7`.
    """
    if template is None:
        return question.text
    metadata = question.row.get("metadata")
    fields = {**(metadata if isinstance(metadata, Mapping) else {}), **question.row}
    try:
        return _Formatter().vformat(template, (), fields)
    except KeyError as error:
        near = nearest(error.args[0], map(str, fields))
        raise ConfigError(f"template {template!r}: there is no field {error}; {near}") from error
    except (ValueError, IndexError, AttributeError, TypeError) as error:
        raise ConfigError(f"template {template!r} cannot be filled: {error}") from error


@dataclass(frozen=True)
class PromptSet:
    """Prompts in order of their ids, each once, and how many rows were dropped on the way."""

    prompts: tuple[Prompt, ...]
    duplicates: int
    too_long: int


def prompt_id(task: str, text: str) -> str:
    """16 hex digits of SHA-256 of task and rendered text: the same in every run, on every machine."""
    return hashlib.sha256(f"{task}\0{text}".encode()).hexdigest()[:16]


def make_prompts(
    questions: Iterable[Question],
    *,
    tokenize: Callable[[str], tuple[int, ...]],
    template: str | None = None,
    max_tokens: int | None = None,
    domain: str = "",
) -> PromptSet:
    """Render, tokenise, drop duplicates (the first stays) and what is longer than `max_tokens`.

    Raises PreflightError when nothing is left or a prompt has no token at all.
    """
    found: dict[str, Prompt] = {}
    shortest, too_long, seen = float("inf"), set[str](), 0
    for question in questions:
        seen += 1
        text = render(question, template)
        key = prompt_id(question.task, text)
        if key in found or key in too_long:
            continue
        tokens = tuple(tokenize(text))
        if not tokens:
            raise PreflightError(f"the prompt {text!r} has no tokens")
        shortest = min(shortest, len(tokens))
        if max_tokens is not None and len(tokens) > max_tokens:
            too_long.add(key)
        else:
            found[key] = Prompt(key, text, tokens, question.answer, question.row, domain)
    if not found:
        raise PreflightError(
            f"no prompt is left of {seen} rows: the shortest has {shortest} tokens, the limit is {max_tokens}"
        )
    prompts = tuple(found[key] for key in sorted(found))
    return PromptSet(prompts, seen - len(found) - len(too_long), len(too_long))


# Parts and order.


@dataclass(frozen=True)
class Split:
    """Three parts without a prompt in common, each in order of ids."""

    heldout: tuple[Prompt, ...]
    demonstrations: tuple[Prompt, ...]
    training: tuple[Prompt, ...]


def split(prompts: Iterable[Prompt], *, heldout: float, demonstrations: float = 0.0) -> Split:
    """Fractions in [0, 1), decided by each id alone: more rows never move a prompt to another part."""
    if min(heldout, demonstrations) < 0 or heldout + demonstrations >= 1:
        raise ConfigError(
            f"heldout={heldout} and demonstrations={demonstrations} are fractions whose sum is below 1"
        )
    parts: tuple[list[Prompt], ...] = ([], [], [])
    for prompt in sorted(prompts, key=lambda p: p.id):
        place = int(prompt.id[:13], 16) / 16**13  # 52 bits: exact in a float
        parts[0 if place < heldout else 1 if place >= 1 - demonstrations else 2].append(prompt)
    return Split(*map(tuple, parts))


class PromptStream(Iterator[Prompt]):
    """Prompts for ever, in a new order every epoch; the order depends on `seed` and the set of ids alone.

    `position` counts the prompts given so far; setting it continues from there, exactly.
    """

    def __init__(self, prompts: Sequence[Prompt], *, seed: int, position: int = 0):
        if not prompts:
            raise PreflightError("no prompts to train on")
        self._prompts = sorted(prompts, key=lambda p: p.id)
        self._seed, self.position = seed, position
        self._shuffled: tuple[int, list[int]] | None = None

    def __next__(self) -> Prompt:
        prompt = self.at(self.position)
        self.position += 1
        return prompt

    def at(self, position: int) -> Prompt:
        """The prompt at `position`, without moving: for those in flight when a run was stopped."""
        epoch, index = divmod(position, len(self._prompts))
        if self._shuffled is None or self._shuffled[0] != epoch:
            self._shuffled = (epoch, _order(len(self._prompts), self._seed, epoch))
        return self._prompts[self._shuffled[1][index]]


def _order(count: int, seed: int, epoch: int) -> list[int]:
    """Raw PCG64 words, sorted: NumPy promises those streams for ever, and `permutation` only for now."""
    words = np.random.PCG64([seed, epoch]).random_raw(count)
    return np.argsort(words, kind="stable").tolist()
