"""Judges by name: settings -> a function (response text, prompt) -> verdict, built once in each process.

One of your own is a function in one of your `packages`: settings by keyword, and it returns the judge, which
may return a number, a bool or a Verdict. A number is the reward, and right from 0.99 on. Judges on servers
are in `remote_judges`.
"""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, Literal

from entroray.binding import Count, NonNegative, Positive, declare
from entroray.reward import gym as reasoning_gym
from entroray.reward.code_judge import CodeJudge
from entroray.reward.extract import Extract, rule
from entroray.reward.isolation import Isolation
from entroray.reward.programs import Programs
from entroray.reward.text_match import normalise
from entroray.reward.user_file import load_function
from entroray.reward.verdicts import CORRECT_FROM, Judge, failed, graded, guarded, last_line, scored
from entroray.types import Prompt, Verdict

SETTING = "reward.judge"
OWN = ("math", "gym", "code")
"""Judges of ours, which any answer may be given to: one that they cannot finish with is a wrong answer."""


def math(*, extract: Extract = "boxed", marker: str = "####") -> Judge:
    """Right if the extracted answer equals `prompt.reference` or one of its alternatives: 0.5 is \\frac12.

    By math-verify (Hugging Face) without its timers, which are alarms: they raise off the main thread and do
    not reach C code. The verifier kills from outside. An answer that does not parse is wrong; a reference
    that does not parse is DATA_FAILED. conf/README.md says what is read.
    """
    find = rule(extract, marker)
    for name in ("math_verify.parser", "math_verify.grader"):  # each warns once that its timer is off
        logging.getLogger(name).setLevel(logging.ERROR)
    from entroray.reward.math_answers import is_equal, read_reference

    one = read_reference("1+0")
    assert one and is_equal(one, "1")  # loads the grammar, 0.5 s: here, not in every judge process

    def by_value(response: str, prompt: Prompt) -> Verdict:
        references = []
        for text in (prompt.reference, *prompt.alternatives):
            try:
                reference, why = read_reference(text), ""
            except ValueError as error:  # more digits than Python reads
                reference, why = None, f": {error}"
            if reference is None:
                return failed(
                    f"prompt {prompt.id}: math-verify cannot read the reference {text[:200]!r}{why}"
                )
            references.append(reference)
        answer = find(response)
        if answer is None:
            return graded(False, None, f"no answer by rule {extract!r}")
        try:
            return graded(any(is_equal(reference, answer) for reference in references), answer)
        except Exception as error:  # boundary: sympy raises whatever an answer makes it
            return graded(False, answer, last_line(error))

    return by_value


def gym(*, task: str, extract: Extract = "response", marker: str = "=", partial: bool = False) -> Judge:
    """The reasoning-gym task's own scorer on `prompt.entry`; right from 0.99 on.

    The reward is 1 if right, else 0; with `partial` it is the score.
    """
    find, score = rule(extract, marker), reasoning_gym.scorer(task)

    def by_score(response: str, prompt: Prompt) -> Verdict:
        answer = find(response)
        if answer is None:
            return graded(False, None, f"no answer by rule {extract!r}")
        value = _score(score, answer, prompt.entry)
        return scored(value, answer) if partial else graded(value >= CORRECT_FROM, answer)

    return by_score


def _score(score: Callable[[str, Mapping[str, Any]], float], answer: str, entry: Mapping[str, Any]) -> float:
    """0 for an answer that the scorer fails at, if it does not fail at any: then it is the row."""
    try:
        return score(answer, entry)
    except Exception:  # boundary: the gym's scorers raise whatever an answer makes them
        score("", entry)
        return 0.0


def text(
    *,
    extract: Extract = "response",
    marker: str = "####",
    keep: Sequence[Literal["case", "punctuation", "articles"]] = (),
) -> Judge:
    """Right if the extracted answer is the reference or one of its alternatives, written anyhow.

    Case, white space, punctuation, articles and forms of Unicode do not count, but for those to `keep`.
    """
    find = rule(extract, marker)

    def by_text(response: str, prompt: Prompt) -> Verdict:
        known = [each for each in (prompt.reference, *prompt.alternatives) if each.strip()]
        if not known:
            return failed(f"prompt {prompt.id} has no reference: name its column, data.settings.answer")
        answer = find(response)
        if answer is None:
            return graded(False, None, f"no answer by rule {extract!r}")
        said = normalise(answer, keep)
        return graded(any(said == normalise(each, keep) for each in known), answer)

    return by_text


def _pattern_misfit(*, pattern: str) -> str:
    try:
        re.compile(pattern, re.DOTALL)
    except (re.error, RecursionError, OverflowError) as error:
        return f"pattern={pattern!r} is no regular expression: {error}"
    return ""


@declare(misfit=_pattern_misfit)
def format(*, pattern: str) -> Judge:
    """Right if all of the response, but white space around it, matches a regular expression.

    `.` is any character, line breaks too: `pattern: "<think>.*</think>\\s*<answer>.*</answer>"`. To look
    for something within a response, put `.*` around it.
    """
    form = re.compile(pattern, re.DOTALL)
    return lambda response, prompt: graded(form.fullmatch(response.strip()) is not None, None)


def _length_misfit(*, target: int | str | None, maximum: int | None, buffer: int, **_: object) -> str:
    if (target is None) == (maximum is None):
        return "`length` needs either target=N or maximum=N"
    if isinstance(target, int) and target < 1:
        return f"target={target} must be above 0"
    return (
        f"buffer={buffer} must be within maximum={maximum}" if maximum and not 0 <= buffer <= maximum else ""
    )


@declare(misfit=_length_misfit)
def length(
    *,
    target: int | str | None = None,
    maximum: Count | None = None,
    buffer: int = 0,
    unit: Literal["tokens", "words", "characters"] = "tokens",
) -> Judge:
    """A penalty on the length of the response, from 0 to -1; right where there is none.

    With `maximum`, as DAPO's (arXiv 2503.14476): 0 up to `buffer` below it, then straight to -1. With
    `target`, as L1's (arXiv 2503.04697): -|length - target| / target; a text names the row's column of it.
    """
    measure: Mapping[str, Callable[[Any], int]] = {
        "tokens": lambda response: response.tokens,
        "words": lambda response: len(response.split()),
        "characters": len,
    }

    def by_length(response: str, prompt: Prompt) -> Verdict:
        count = measure[unit](response)
        if maximum is not None:
            over = count - (maximum - buffer)
            reward = -min(1.0, max(0, over) / buffer) if buffer else -float(over > 0)
        else:
            goal = prompt.entry.get(target) if isinstance(target, str) else target
            if not isinstance(goal, int | float) or not goal > 0:
                columns = ", ".join(map(str, prompt.entry)) or "none"
                return failed(f"length.target={target}: {goal!r} is no length above 0 (columns: {columns})")
            goal = float(goal)
            reward = -min(1.0, abs(count - goal) / goal)
        return Verdict(reward + 0.0, reward == 0, detail=f"{count} {unit}")

    return by_length


def code(
    *,
    tests: str | None = None,
    timeout: Positive = 4.0,
    deadline: Positive = 20.0,
    memory_mb: Count = 1024,
    tolerance: NonNegative = 1e-6,
    partial: bool = False,
    isolation: Isolation = "auto",
) -> Judge:
    """Right if the response's Python passes all tests of the row; the reward is 1, with `partial` the share.

    It is run shut in (Landlock, seccomp, namespaces, limits), within `timeout` seconds a test and `deadline`
    for all; what is late, too large, too loud or forbidden is wrong. `tests` is the path of their column,
    by default the first there is of `code_tests.COLUMNS`. `tolerance` is relative, of numbers with a point.
    ConfigError where neither Landlock nor seccomp holds, unless `isolation` (which `verifier.isolation`
    sets) is "contained".
    """
    programs = _programs()
    programs.require(isolation)
    return CodeJudge(programs, tests, timeout, deadline, memory_mb, tolerance, partial)


@cache
def _programs() -> Programs:
    """One server of programs for all judges of code in this process and its forks."""
    return Programs()


def custom(*, path: str, setting: str = "reward.path") -> Judge:
    """`my_file.py:my_function`, called with (response, prompt), found from the working directory."""
    return guarded(load_function(path, setting), f"{setting}={path}")
