"""Whatever a judge does becomes a typed verdict: a failure is never a zero."""

import math
import traceback
from collections.abc import Callable
from numbers import Real
from typing import Any

import numpy as np

from entroray.types import Prompt, Status, Verdict

Judge = Callable[[str, Prompt], Verdict]
"""(response text, prompt) -> verdict; plain, synchronous, and free to be slow: it is killed from outside."""


class Response(str):
    """What a judge is given: the text of a response, which knows how many tokens it has."""

    tokens: int
    """Of the response, those of tools' answers included."""

    def __new__(cls, text: str, tokens: int = 0) -> "Response":
        made = super().__new__(cls, text)
        made.tokens = tokens
        return made


CORRECT_FROM = 0.99
"""Score from which an answer is right; reasoning-gym gives 0.01 to 0.125 for garbage."""

_DETAIL = 2000


def failed(detail: str, status: Status = Status.DATA_FAILED) -> Verdict:
    """A verdict on nothing: reward is NaN, correct is False, `status` and `detail` say why."""
    return Verdict(math.nan, False, status=status, detail=" ".join(detail.split())[:_DETAIL])


def graded(right: bool, answer: str | None, detail: str = "") -> Verdict:
    """A verdict whose reward is 1 if the answer is right, else 0."""
    return Verdict(float(right), right, answer=answer, detail=detail[:_DETAIL])


def scored(score: float, answer: str | None = None) -> Verdict:
    """A verdict whose reward is the score, right from `CORRECT_FROM` on."""
    return Verdict(score, score >= CORRECT_FROM, answer=answer)


def as_verdict(value: Any, source: str) -> Verdict:
    """The verdict of what a judge at `source` returned: a bool, a finite number or a Verdict.

    Anything else is DATA_FAILED.
    """
    if isinstance(value, Verdict):
        return _plain(value, source)
    if isinstance(value, bool | np.bool_):
        return graded(bool(value), None)
    if isinstance(value, Real) and math.isfinite(value):
        return scored(float(value))
    kind = type(value).__name__
    return failed(f"{source} returned {value!r} ({kind}), not a finite number, a bool or a Verdict")


def _plain(verdict: Verdict, source: str) -> Verdict:
    """A user's own Verdict with plain values; DATA_FAILED if it is usable and its values are not."""
    reward, status = float(verdict.reward), Status(verdict.status)
    correct = verdict.correct if status.usable else False
    if status.usable and not math.isfinite(reward):
        return failed(f"{source} returned {verdict!r}, whose reward is not finite")
    if correct not in (0, 1):
        return failed(
            f"{source} returned Verdict.correct={correct!r}: return True or False there, "
            "and a partial score as Verdict.reward"
        )
    answer = None if verdict.answer is None else str(verdict.answer)
    parts = {str(name): float(value) for name, value in verdict.parts.items()}
    return Verdict(reward, bool(correct), answer, parts, status, str(verdict.detail)[:_DETAIL])


def guarded(function: Callable[[str, Prompt], Any], source: str) -> Judge:
    """`function` as a judge that cannot raise: an exception is DATA_FAILED with its last line and place."""

    def judge(response: str, prompt: Prompt) -> Verdict:
        try:
            return as_verdict(function(response, prompt), source)
        except (Exception, SystemExit, KeyboardInterrupt) as error:  # boundary: user code fails this alone
            return failed(f"{source} raised {last_line(error)}")

    return judge


def last_line(error: BaseException) -> str:
    """What was raised, and where."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{traceback.format_exception_only(error)[-1].strip()} ({place.filename}:{place.lineno})"
