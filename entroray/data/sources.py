"""Sources of data: a task's name -> its questions, and how many bad rows were left out.

A source of your own is a function of the task's name in one of your `packages`, with settings by keyword:
`data.source=my_lab.data.questions data.task=algebra 'data.settings={level: 3}'`.
"""

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from entroray.binding import Count, Probability
from entroray.data.tables import Row, lookup, message_text, read_rows, recoded, table_name, written
from entroray.errors import ConfigError, PreflightError
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
    """Questions of a file, a glob of files, else of the hub's data set `task`, and the rows left out.

    A column is named by its path (`reward_model.ground_truth`). The reference is what follows the last
    `marker` of the answer column, or all of it, numbers in digits; `answer=None`: none.
    A share of `bad_rows` may be bad and is left out. Above it PreflightError lists the bad rows by line
    number: the first 20, and how many in all.
    """
    name, questions, bad = table_name(task), [], []
    for place, row in read_rows(task, subset, split, answer):
        try:
            questions.append(_question(name, row, question, answer, marker))
        except _BadRow as wrong:
            bad.append(f"{place}: {wrong}")
    if len(bad) > bad_rows * (len(bad) + len(questions)):
        more = f"\n  and {len(bad) - 20} more" if len(bad) > 20 else ""
        listed = "".join(f"\n  {problem}" for problem in bad[:20])
        recode = f" ({recoded(task, 'LATIN1')})" if any("not UTF-8 at" in problem for problem in bad) else ""
        raise PreflightError(
            f"{task}: {len(bad)} of {len(bad) + len(questions)} rows are bad{listed}{more}\n"
            f"Mend them{recode}, or let a share of them be left out: data.settings.bad_rows=0.01"
        )
    if not questions:
        raise PreflightError(f"{task}: no rows at all")
    return questions, len(bad)


class _BadRow(Exception):
    """What is wrong with a row."""


def _question(task: str, row: Row | str, question: str, answer: str | None, marker: str) -> Question:
    if isinstance(row, str):
        raise _BadRow(row)
    *before, last = _conversation(row, question)
    reference = _reference(row, answer, marker) if answer else ""
    return Question(task, last["content"], reference, row, tuple(before))


def _reference(row: Row, column: str, marker: str) -> str:
    value = _value(row, column)
    text = written(value)
    if text is None:
        raise _BadRow(f"{column!r} is {_shown(value)}, neither a text nor a number")
    _check_filled(column, text)
    reference = text.rpartition(marker)[2].strip()
    if not reference:
        raise _BadRow(f"{column!r} has nothing behind {marker!r}")
    return reference


def _conversation(row: Row, column: str) -> list[Message]:
    """The messages that a column holds, the last one the user's; a text is one message."""
    value = _value(row, column)
    if isinstance(value, str):
        _check_filled(column, value)
        return [{"role": "user", "content": value}]
    if not isinstance(value, list | tuple) or not value or not all(isinstance(m, Mapping) for m in value):
        raise _BadRow(f"{column!r} is {_shown(value)}, not a text or a list of messages (role, content)")
    messages = [_message(m, column) for m in value]
    if messages[-1]["role"] != "user":
        raise _BadRow(
            f"{column!r} ends with a message of {messages[-1]['role']!r}, and the user's is answered: "
            f"data.settings.question={column}.0.content takes the first alone"
        )
    _check_filled(column, messages[-1]["content"])
    return messages


def _message(message: Message, column: str) -> Message:
    """Without its nulls, which Parquet puts where other rows have a value; its parts of text joined."""
    content = message_text(message)
    if not isinstance(content, str) or not isinstance(message.get("role"), str):
        raise _BadRow(f"{column!r} has a message {_shown(message)} without role and content as texts")
    _check_encoding(column, content)
    return {name: value for name, value in message.items() if value is not None} | {"content": content}


def _value(row: Row, column: str) -> Any:
    try:
        return lookup(row, column)
    except KeyError:
        inner = [f"{name}.{key}" for name, v in row.items() if isinstance(v, Mapping) for key in v]
        known = ", ".join(map(str, [*row, *inner])) or "none"
        raise _BadRow(f"no {column!r} (columns: {known})") from None


def _check_filled(column: str, text: str) -> None:
    if not text.strip():
        raise _BadRow(f"{column!r} is {text!r}, which is empty")
    _check_encoding(column, text)


def _check_encoding(column: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _BadRow(f"{column!r} is not UTF-8 (a lone surrogate)") from None


def _shown(value: Any) -> str:
    return textwrap.shorten(repr(value), 200, placeholder=" ...")
