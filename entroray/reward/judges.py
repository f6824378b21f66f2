"""Judges by name: settings -> a function (response text, prompt) -> verdict, built once in each process.

One of your own is a function in one of your `packages`: settings by keyword, and it returns the judge, which
may return a number, a bool or a Verdict. A number is the reward, and right from 0.99 on.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any

from entroray.reward import gym as reasoning_gym
from entroray.reward.extract import rule
from entroray.reward.user_file import load_function
from entroray.reward.verdicts import CORRECT_FROM, Judge, failed, graded, guarded, last_line, scored
from entroray.types import Prompt, Verdict

SETTING = "reward.judge"
OWN = ("math", "gym")
"""Judges of ours, which any answer may be given to: one that they cannot finish with is a wrong answer."""


def math(*, extract: str = "boxed", marker: str = "####") -> Judge:
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
            if (reference := read_reference(text)) is None:
                return failed(f"prompt {prompt.id}: math-verify cannot read the reference {text!r}")
            references.append(reference)
        answer = find(response)
        if answer is None:
            return graded(False, None, f"no answer by rule {extract!r}")
        try:
            return graded(any(is_equal(reference, answer) for reference in references), answer)
        except Exception as error:  # boundary: sympy raises whatever an answer makes it
            return graded(False, answer, last_line(error))

    return by_value


def gym(*, task: str, extract: str = "response", marker: str = "=", partial: bool = False) -> Judge:
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


def custom(*, path: str) -> Judge:
    """`my_file.py:my_function`, called with (response, prompt), found from the working directory."""
    return guarded(load_function(path, "reward.path"), path)
