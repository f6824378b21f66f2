"""Questions of tables of 100,000 rows and more: a row is read when its question is asked for."""

import pickle
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from entroray.data.large import (
    BATCH,
    Hashes,
    find_blank,
    find_column,
    hash_column,
    keep_batches,
    strip_before,
)
from entroray.data.questions import BadRow, BadRows, Question
from entroray.data.tables import Shard, batch_rows, find
from entroray.data.text_rows import Row
from entroray.errors import PreflightError

Seen = tuple[Hashes, Hashes, NDArray[np.bool_]]
"""[rows] of a batch: hashes of what is asked and of what is right; whether the row is left out."""


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
    bad: BadRows
    forget: Callable[[], None]
    """Lets go of the memory of rows that were read."""
    asked: Hashes
    answers: Hashes
    good: NDArray[np.int64]
    """Rows that are not left out."""
    question: str = ""
    """The path of the question's column."""
    files: tuple[tuple[str, int], ...] = ()
    """What stands before the line of a row, and the number of the first such row; by that number."""

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """Of each batch its first row."""
        return np.cumsum([0, *(batch.num_rows for batch in self.batches)])

    def __len__(self) -> int:
        return len(self.good)

    def __getitem__(self, row: Any) -> Any:
        """By the number in the table, that of a row left out too."""
        batch = int(np.searchsorted(self.starts, row, side="right")) - 1
        try:
            return self.read(self.batches[batch].slice(row - int(self.starts[batch]), 1))
        finally:
            self.forget()

    def __iter__(self) -> Iterator[Question]:
        """Those of rows that are not left out; PreflightError in the end if too many are bad."""
        for row in self.good.tolist():
            try:
                question = self[row]
            except BadRow as wrong:
                self.bad.add(f"{self.place(row)}: {wrong}")
                continue
            yield question
        self.bad.refuse(PreflightError)

    def texts(self, rows: NDArray[np.integer]) -> Iterator[str]:
        """What these `rows`, in order, ask; nothing of bad ones. Columns of texts are read as a whole."""
        for start, batch in zip(self.starts[:-1].tolist(), self.batches, strict=True):
            first, last = np.searchsorted(rows, [start, start + batch.num_rows])
            some = rows[first:last]
            for row, text in zip(some.tolist(), self._last_texts(batch, some - start), strict=True):
                if text is not None:
                    yield text
                    continue
                with suppress(BadRow):
                    yield self[row].text
        self.forget()

    def _last_texts(self, batch: Any, rows: NDArray[np.integer]) -> list[str | None]:
        """What these rows of a batch ask, by columns: texts, or what the last messages say; None: unknown."""
        for path in (self.question, f"{self.question}.-1.content", f"{self.question}.-1.value"):
            column = self.column(batch, path) if self.question and len(rows) else None
            if column is not None and str(column.type) in ("string", "large_string"):
                return [None if (text or "")[:1] == "[" else text for text in column.take(rows).to_pylist()]
        return [None] * len(rows)

    def place(self, row: int) -> str:
        """Where a row stands, as in `line 3`."""
        name, first = next((f for f in reversed(self.files) if f[1] <= row), ("", 0))
        return f"{name}line {row - first + 1}"

    def hashes(self, path: str) -> Hashes | None:
        """[rows] of a column; None if there is none."""
        found = [self.column(batch, path) for batch in self.batches]
        if all(column is None for column in found):
            return None
        none = lambda batch: np.zeros(batch.num_rows, np.uint64)
        pairs = zip(found, self.batches, strict=True)
        return np.concatenate([none(batch) if c is None else hash_column(c) for c, batch in pairs])


def keep_columns(
    shards: Sequence[Shard],
    read: Callable[[Row | str], Question],
    columns: tuple[str, str | None, str],
    bad: BadRows,
) -> LargeQuestions:
    """Of Parquet files or a data set: what can be seen of a column as a whole is checked and hashed."""
    question, answer, marker = columns
    find = lambda batch, path: find_column(batch.to_struct_array(), path)

    def see(batch: Any) -> Seen:
        none = np.zeros(batch.num_rows, np.uint64)
        text, known = find(batch, question), find(batch, answer) if answer else None
        left_out = np.zeros(batch.num_rows, np.bool_) | find_blank(text, numbers=False)
        left_out |= find_blank(known, numbers=True) if answer else False
        asked = none if text is None else hash_column(text)
        return asked, none if known is None else hash_column(strip_before(known, marker)), left_out

    streams = [shard.batches(BATCH) for shard in shards if shard.batches]
    firsts = np.cumsum([0, *(shard.count for shard in shards[:-1])]).tolist()
    found = _keep(
        streams,
        see,
        bad,
        mapped=shards[0].mapped,
        read=lambda batch: read(next(batch_rows(batch, answer))),
        column=find,
        question=question,
        files=tuple((shard.name, first) for shard, first in zip(shards, firsts, strict=True)),
    )
    bad.rows = int(found.starts[-1])
    left_out = np.setdiff1d(np.arange(bad.rows), found.good) if len(found) < bad.rows else found.good[:0]
    for row in left_out[:20].tolist():
        bad.add(f"{found.place(row)}: {_wrong(found, row)}")
    bad.count = len(left_out)
    return found


def _keep(
    streams: Iterable[Iterable[Any]],
    see: Callable[[Any], Seen],
    bad: BadRows,
    *,
    mapped: bool = False,
    **more: Any,
) -> LargeQuestions:
    batches, seen, forget = keep_batches(streams, see, mapped=mapped)
    asked, answers, left_out = map(np.concatenate, zip(*seen, strict=True))
    return LargeQuestions(
        batches,
        bad=bad,
        forget=forget,
        asked=asked,
        answers=answers,
        good=np.flatnonzero(~left_out),
        **more,
    )


def _wrong(questions: LargeQuestions, row: int) -> str:
    try:
        questions[row]
    except BadRow as wrong:
        return str(wrong)
    return "it is empty"


def keep_rows(questions: Iterable[Question], bad: BadRows) -> LargeQuestions:
    """Of texts, whose rows are Python's: each whole as it was checked."""
    import pyarrow as pa

    def batches() -> Iterator[Any]:
        left, count = iter(questions), 0
        while some := list(islice(left, BATCH)):
            count += len(some)
            if count % (16 * BATCH) == 0:
                print(f"{bad.task}: {count:,} rows read", file=sys.stderr, flush=True)
            texts = [repr((q.text, q.before)) if q.before else q.text for q in some]
            known = ["\0".join([q.answer, *q.alternatives]) for q in some]
            rows = pa.array(map(pickle.dumps, some), pa.large_binary())
            yield pa.record_batch({"asked": texts, "answers": known, "row": rows})

    def column(batch: Any, path: str) -> Any | None:
        values = [find(pickle.loads(row.as_py()).row, path) for row in batch["row"]]
        if all(value is None for value in values):
            return None
        return pa.array(map(repr, values), pa.large_string())

    hashes = lambda batch: (hash_column(batch["asked"]), hash_column(batch["answers"]))
    see = lambda batch: (*hashes(batch), np.zeros(batch.num_rows, np.bool_))
    return _keep([batches()], see, bad, read=lambda b: pickle.loads(b["row"][0].as_py()), column=column)
