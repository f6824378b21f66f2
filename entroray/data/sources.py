"""Sources of data: a task's name -> its questions, and how many bad rows were left out.

A source of your own is a function of the task's name in one of your `packages`, with settings by keyword:
`data.source=my_lab.data.questions data.task=algebra 'data.settings={level: 3}'`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, islice
from typing import Any

from entroray.binding import Count, Probability
from entroray.data import large
from entroray.data.large_questions import keep_columns, keep_rows
from entroray.data.questions import BadRow, BadRows, Question, read_question
from entroray.data.tables import open_table, read_rows, table_name
from entroray.data.text_rows import Row
from entroray.errors import ConfigError, PreflightError
from entroray.reward import gym

SETTING = "data.source"


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
    read = partial(read_question, table_name(task), question=question, answer=answer, marker=marker)
    bad = BadRows(task, bad_rows)
    if all(shard.batches for shard in shards) and sum(shard.count for shard in shards) >= large.LARGE:
        questions: Sequence[Question] = keep_columns(shards, read, (question, answer, marker), bad)
    else:
        good = _good(read_rows(shards, answer), read, bad)
        few = list(islice(good, large.LARGE))
        questions = few if len(few) < large.LARGE else keep_rows(chain(few, good), bad)
        bad.rows = bad.count + len(questions)
    bad.refuse(PreflightError)
    if not questions:
        raise PreflightError(f"{task}: no rows at all")
    return questions, bad.count


def _good(
    rows: Iterable[tuple[str, Row | str]], read: Callable[[Row | str], Question], bad: BadRows
) -> Iterator[Question]:
    for place, row in rows:
        try:
            yield read(row)
        except BadRow as wrong:
            bad.add(f"{place}: {wrong}")
