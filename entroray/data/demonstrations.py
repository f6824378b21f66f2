"""Right answers to imitate: what a row's own solution looks like as a response."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from entroray.data.text_rows import Row
from entroray.errors import ConfigError, DataError, nearest
from entroray.reward import gym
from entroray.reward.verdicts import CORRECT_FROM


@dataclass(frozen=True)
class WorkedAnswer:
    """A right response with tool calls in it: what is asked and answered, call by call, and how it ends."""

    calls: tuple[tuple[str, str], ...]
    end: str


def chain_sum_steps(row: Row) -> str:
    """`12 + 34 - 5` -> `12+34=46,46-5=41`: one running sum a step; rule `after` with marker `=` reads it."""
    return ",".join(f"{left}={total}" for left, total in _running_sums(row))


def chain_sum_calls(row: Row) -> WorkedAnswer:
    """The same steps, each asked of a calculator, then `=41`; rule `after` with marker `=` reads it."""
    return WorkedAnswer(tuple(_running_sums(row)), f"={row['answer']}")


def _running_sums(row: Row) -> list[tuple[str, str]]:
    """`12 + 34 - 5` -> (12+34, 46), (46-5, 41); a number alone is its own sum."""
    first, *rest = row["metadata"]["expression"].split()
    total, steps = int(first), []
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        before, total = total, total + int(term) * (1 if sign == "+" else -1)
        steps.append((f"{before}{sign}{term}", str(total)))
    if str(total) != row["answer"]:
        raise DataError(f"chain_sum row says {row['answer']} where its expression gives {total}: {row}")
    return steps or [(first, str(total))]


def countdown_expression(row: Row) -> str:
    """The row's own solution without spaces, checked by the scorer; rule `whole` reads it."""
    expression = "".join(row["answer"].split())
    if gym.scorer("countdown")(expression, row) < CORRECT_FROM:
        raise DataError(f"countdown row whose own answer {expression!r} is not right: {row}")
    return expression


def gsm8k_solution(row: Row) -> str:
    """The worked answer without its `<<48/2=24>>` notes, up to `#### 24`; rule `after`, marker `####`."""
    return re.sub(r"<<[^<>]*>>", "", row["answer"]).strip()


_DEMONSTRATIONS: Mapping[str, Callable[[Row], str | WorkedAnswer]] = {
    "chain_sum": chain_sum_steps,
    "chain_sum_calls": chain_sum_calls,
    "countdown": countdown_expression,
    "gsm8k": gsm8k_solution,
}

NAMES = tuple(_DEMONSTRATIONS)


def find_demonstration(name: str) -> Callable[[Row], str | WorkedAnswer]:
    """The function row -> right response called `name`; give it `Prompt.entry`."""
    if name not in _DEMONSTRATIONS:
        raise ConfigError(f"data.demonstration={name!r} is unknown; {nearest(name, _DEMONSTRATIONS)}")
    return _DEMONSTRATIONS[name]
