"""Sources of data: a task's name -> its questions, and how many bad rows were left out.

A source of your own is a function of the task's name in one of your `packages`, with settings by keyword:
`data.source=my_lab.data.questions data.task=algebra 'data.settings={level: 3}'`.
"""

import ast
import json
import pickle
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from entroray.binding import Count, Probability
from entroray.data import large
from entroray.data.tables import (
    Shard,
    batch_rows,
    lookup,
    message_text,
    open_table,
    read_rows,
    table_name,
    written,
)
from entroray.data.text_rows import Row, recoded
from entroray.errors import ConfigError, EntrorayError, PreflightError
from entroray.reward import gym

SETTING = "data.source"
Message = Mapping[str, Any]
"""`{role, content}`, as chat templates take them."""


@dataclass(frozen=True)
class Question:
    """One row of data, checked: a question, its known answer, and the row itself."""

    task: str
    text: str
    """What is asked; of a conversation its last message, the user's."""
    answer: str
    row: Row
    before: tuple[Message, ...] = ()
    """The messages of a conversation before `text`."""
    alternatives: tuple[str, ...] = ()
    """Further right answers, besides `answer`."""


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
    revision: str | None = None,
    bad_rows: Probability = 0.0,
) -> tuple[Sequence[Question], int]:
    """Questions of a file, a glob of files, else of the hub's data set `task`, and the rows left out.

    A column is named by its path (`reward_model.ground_truth`). The reference is what follows the last
    `marker` of the answer column, or all of it, numbers in digits; of a list the first, and the others are
    right too; `answer=None`: none. A share of `bad_rows` may be bad and is left out. Above it PreflightError
    lists the bad rows by line number: the first 20, and how many in all. From 100,000 rows on a question is
    read when it is asked for, see `LargeQuestions`.
    """
    shards = open_table(task, subset, split, revision)
    read = partial(_question, table_name(task), question=question, answer=answer, marker=marker)
    bad = BadRows(task, bad_rows)
    if all(shard.batches for shard in shards) and sum(shard.count for shard in shards) >= large.LARGE:
        columns = (question, answer, marker)
        questions: Sequence[Question] = _large_columns(shards, read, columns, bad)
    else:
        good = _good(read_rows(shards, answer), read, bad)
        few = list(islice(good, large.LARGE))
        questions = few if len(few) < large.LARGE else _large_rows(chain(few, good), bad)
        bad.rows = bad.count + len(questions)
    bad.refuse(PreflightError)
    if not questions:
        raise PreflightError(f"{task}: no rows at all")
    return questions, bad.count


@dataclass
class BadRows:
    """Rows of a table that are left out, and how many may be."""

    task: str
    allowed: float
    """Share of all rows."""
    rows: int = 0
    count: int = 0
    listed: tuple[str, ...] = ()
    """The first 20, each with its place and what is wrong."""

    def add(self, problem: str) -> None:
        """One more."""
        self.count += 1
        if len(self.listed) < 20:
            self.listed += (problem,)

    def refuse(self, error: type[EntrorayError]) -> None:
        """Raise `error` if they are too many."""
        if self.count <= self.allowed * self.rows:
            return
        more = f"\n  and {self.count - len(self.listed)} more" if self.count > len(self.listed) else ""
        listed = "".join(f"\n  {problem}" for problem in self.listed)
        latin = any("not UTF-8 at" in problem for problem in self.listed)
        recode = f" ({recoded(self.task, 'LATIN1')})" if latin else ""
        raise error(
            f"{self.task}: {self.count} of {self.rows} rows are bad{listed}{more}\n"
            f"Mend them{recode}, or let a share of them be left out: data.settings.bad_rows=0.01"
        )


def _good(
    rows: Iterable[tuple[str, Row | str]], read: Callable[[Row | str], Question], bad: BadRows
) -> Iterator[Question]:
    for place, row in rows:
        try:
            yield read(row)
        except BadRow as wrong:
            bad.add(f"{place}: {wrong}")


# Large tables.


@dataclass(frozen=True)
class LargeQuestions(Sequence[Question]):
    """Questions of 100,000 rows or more, each read from its row when it is asked for.

    Rows with nothing in the columns of question and answer are left out when the table is read; what else is
    wrong with a row shows when it is asked for, as BadRow.
    """

    batches: Sequence[Any]
    read: Callable[[Any], Question]
    """Of an Arrow batch of one row."""
    column: Callable[[Any, str], Any | None]
    """The column of a batch that a path names, for its hashes."""
    question: str
    """The path of the question's column."""
    bad: BadRows
    forget: Callable[[], None]
    """Lets go of the memory of rows that were read."""
    files: tuple[tuple[str, int], ...] = ()
    """What stands before the line of a row, and the number of the first such row; by that number."""
    asked: large.Hashes | None = None
    """[rows] of questions; None where nobody needs them any more."""
    answers: large.Hashes | None = None
    good: NDArray[np.int64] | None = None
    """Rows that are not left out."""

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """Of each batch its first row."""
        sizes = [batch.num_rows for batch in self.batches]
        return np.cumsum([0, *sizes])

    def __len__(self) -> int:
        return int(self.starts[-1]) if self.good is None else len(self.good)

    def __getitem__(self, row: Any) -> Any:
        batch = int(np.searchsorted(self.starts, row, side="right")) - 1
        try:
            return self.read(self.batches[batch].slice(row - int(self.starts[batch]), 1))
        finally:
            self.forget()

    def place(self, row: int) -> str:
        """Where a row stands, as in `line 3`."""
        name, first = next((f for f in reversed(self.files) if f[1] <= row), ("", 0))
        return f"{name}line {row - first + 1}"

    def hashes(self, path: str) -> large.Hashes | None:
        """[rows] of a column; None if there is none."""
        found = [self.column(batch, path) for batch in self.batches]
        if any(column is None for column in found):
            return None
        return np.concatenate([large.hash_column(column) for column in found])


def _large_columns(
    shards: Sequence[Shard],
    read: Callable[[Row | str], Question],
    columns: tuple[str, str | None, str],
    bad: BadRows,
) -> LargeQuestions:
    """Of Parquet files or a data set: what can be seen of a column as a whole is checked and hashed."""
    question, answer, marker = columns
    firsts = np.cumsum([0, *(shard.count for shard in shards)])
    asked, answers = np.zeros((2, firsts[-1]), np.uint64)
    left_out, seen = np.zeros(firsts[-1], np.bool_), slice(0, 0)
    find = lambda batch, path: large.find_column(batch.to_struct_array(), path)

    def see(batch: Any) -> None:
        nonlocal seen
        seen = slice(seen.stop, seen.stop + batch.num_rows)
        text, known = find(batch, question), find(batch, answer) if answer else None
        left_out[seen] = large.find_blank(text, numbers=False)
        if answer:
            left_out[seen] |= large.find_blank(known, numbers=True)
        if text is not None:
            asked[seen] = large.hash_column(text)
        if known is not None:
            answers[seen] = large.hash_column(large.behind(known, marker))

    streams = [shard.batches(large.BATCH) for shard in shards if shard.batches]
    batches, forget = large.keep_batches(streams, see, mapped=shards[0].mapped)
    found = LargeQuestions(
        batches,
        read=lambda batch: read(next(batch_rows(batch, answer))),
        column=find,
        question=question,
        bad=bad,
        forget=forget,
        files=tuple((shard.name, int(first)) for shard, first in zip(shards, firsts, strict=False)),
        asked=asked,
        answers=answers,
        good=np.flatnonzero(~left_out),
    )
    for row in np.flatnonzero(left_out)[:20].tolist():
        bad.add(f"{found.place(row)}: {_wrong(found, row)}")
    bad.rows, bad.count = len(left_out), int(left_out.sum())
    return found


def _wrong(questions: LargeQuestions, row: int) -> str:
    try:
        questions[row]
    except BadRow as wrong:
        return str(wrong)
    return "it is empty"


def _large_rows(questions: Iterable[Question], bad: BadRows) -> LargeQuestions:
    """Of rows that are Python's: each whole as it was checked."""
    import pyarrow as pa

    asked, answers = list[large.Hashes](), list[large.Hashes]()

    def see(batch: Any) -> None:
        asked.append(large.hash_column(batch["asked"]))
        answers.append(large.hash_column(batch["answers"]))

    def batches() -> Iterator[Any]:
        left, number = iter(questions), 0
        while some := list(islice(left, large.BATCH)):
            number += len(some)
            if number % (large.BATCH * 16) == 0:
                print(f"{bad.task}: {number:,} rows read", file=sys.stderr, flush=True)
            texts = [repr((q.text, q.before)) if q.before else q.text for q in some]
            known = ["\0".join([q.answer, *q.alternatives]) for q in some]
            rows = [pickle.dumps(q) for q in some]
            yield pa.record_batch(
                {"asked": texts, "answers": known, "row": pa.array(rows, pa.large_binary())}
            )

    def column(batch: Any, path: str) -> Any:
        rows = (pickle.loads(row.as_py()).row for row in batch["row"])
        return pa.array([repr(_found(row, path)) for row in rows], pa.large_string())

    kept, forget = large.keep_batches([batches()], see)
    read = lambda batch: pickle.loads(batch["row"][0].as_py())
    hashes = np.concatenate(asked)
    return LargeQuestions(
        kept, read, column, "", bad, forget, (), hashes, np.concatenate(answers), np.arange(len(hashes))
    )


def _found(row: Row, path: str) -> Any:
    try:
        return lookup(row, path)
    except KeyError:
        return None


# One row.


class BadRow(Exception):
    """What is wrong with a row."""


def _question(task: str, row: Row | str, *, question: str, answer: str | None, marker: str) -> Question:
    if isinstance(row, str):
        raise BadRow(row)
    value = _messages(_value(row, question))
    if question in row:
        row = {**row, question: value}  # a template reads messages from here, too
    *before, last = _conversation(value, question)
    reference, *others = _references(_value(row, answer), answer, marker) if answer else [""]
    return Question(task, last["content"], reference, row, tuple(before), tuple(others))


def _references(value: Any, column: str, marker: str) -> list[str]:
    """The right answers: those of a list, each once, else the one."""
    several = value if isinstance(value, list | tuple) else [value]
    if not several:
        raise BadRow(f"{column!r} is [], which is empty")
    return list(dict.fromkeys(_reference(each, column, marker) for each in several))


def _reference(value: Any, column: str, marker: str) -> str:
    text = written(value)
    if text is None:
        raise BadRow(f"{column!r} is {_shown(value)}, neither a text nor a number, nor a list of them")
    _check_filled(column, text)
    reference = text.rpartition(marker)[2].strip()
    if not reference:
        raise BadRow(f"{column!r} has nothing behind {marker!r}")
    return reference


def _messages(value: Any) -> Any:
    """Messages without the nulls among them, also where a text holds them as JSON or Python does."""
    if isinstance(value, str) and value.lstrip()[:1] == "[" and "role" in value and "content" in value:
        for parse in (json.loads, ast.literal_eval):
            try:
                found = parse(value)
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
            if isinstance(found, list) and found and all(_is_message(m) for m in found if m is not None):
                value = found
                break
    if isinstance(value, list | tuple) and any(map(_is_message, value)):
        return [message for message in value if message is not None]
    return value


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and "role" in value and "content" in value


def _conversation(value: Any, column: str) -> list[Message]:
    """The messages that a column holds, the last one the user's; a text is one message."""
    if isinstance(value, str):
        _check_filled(column, value)
        return [{"role": "user", "content": value}]
    if not isinstance(value, list | tuple) or not value or not all(isinstance(m, Mapping) for m in value):
        raise BadRow(f"{column!r} is {_shown(value)}, not a text or a list of messages (role, content)")
    messages = [_message(m, column) for m in value]
    if messages[-1]["role"] != "user":
        raise BadRow(
            f"{column!r} ends with a message of {messages[-1]['role']!r}, and the user's is answered: "
            f"data.settings.question={column}.0.content takes the first alone"
        )
    _check_filled(column, messages[-1]["content"])
    return messages


def _message(message: Message, column: str) -> Message:
    """Without its nulls, which Parquet puts where other rows have a value; its parts of text joined."""
    content = message_text(message)
    if not isinstance(content, str) or not isinstance(message.get("role"), str):
        raise BadRow(f"{column!r} has a message {_shown(message)} without role and content as texts")
    _check_encoding(column, content)
    return {name: value for name, value in message.items() if value is not None} | {"content": content}


def _value(row: Row, column: str) -> Any:
    try:
        return lookup(row, column)
    except KeyError:
        inner = [f"{name}.{key}" for name, v in row.items() if isinstance(v, Mapping) for key in v]
        known = ", ".join(map(str, [*row, *inner])) or "none"
        raise BadRow(f"no {column!r} (columns: {known})") from None


def _check_filled(column: str, text: str) -> None:
    if not text.strip():
        raise BadRow(f"{column!r} is {text!r}, which is empty")
    _check_encoding(column, text)


def _check_encoding(column: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRow(f"{column!r} is not UTF-8 (a lone surrogate)") from None


def _shown(value: Any) -> str:
    return textwrap.shorten(repr(value), 200, placeholder=" ...")
