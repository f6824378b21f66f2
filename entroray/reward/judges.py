"""Judges by name: settings -> a function (response text, prompt) -> verdict, built once in each process.

One of your own is a function in one of your `packages`: settings by keyword, and it returns the judge, which
may return a number, a bool or a Verdict. A number is the reward, and right from 0.99 on.
"""

import logging

from entroray.reward import gym as reasoning_gym
from entroray.reward.extract import rule
from entroray.reward.user_file import load_function
from entroray.reward.verdicts import CORRECT_FROM, Judge, failed, graded, guarded, scored
from entroray.types import Prompt, Verdict

SETTING = "reward.judge"


def math(*, extract: str = "boxed", marker: str = "####") -> Judge:
    """Right if the extracted answer equals `prompt.reference`: 1,000 is 1000, 0.5 is \\frac12, 5 is x=5.

    By math-verify (Hugging Face) without its timers, which are alarms: they raise off the main thread and do
    not reach C code. The verifier kills from outside. An answer that does not parse is wrong; a reference
    that does not parse is DATA_FAILED.
    """
    find = rule(extract, marker)
    for name in ("math_verify.parser", "math_verify.grader"):  # each warns once that its timer is off
        logging.getLogger(name).setLevel(logging.ERROR)
    from math_verify import parse, verify

    one = parse("$1$", parsing_timeout=None)
    verify(one, one, timeout_seconds=None)  # loads the grammar, 0.5 s: here, not in every judge process

    def by_value(response: str, prompt: Prompt) -> Verdict:
        gold = parse(f"${prompt.reference}$", parsing_timeout=None)
        if not gold:
            return failed(f"prompt {prompt.id}: math-verify cannot read the reference {prompt.reference!r}")
        answer = find(response)
        if answer is None:
            return graded(False, None, f"no answer by rule {extract!r}")
        target = parse(f"${answer}$", parsing_timeout=None)
        return graded(bool(verify(gold, target, timeout_seconds=None)), answer)

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
        value = score(answer, prompt.entry)
        return scored(value, answer) if partial else graded(value >= CORRECT_FROM, answer)

    return by_score


def custom(*, path: str) -> Judge:
    """`my_file.py:my_function`, called with (response, prompt), found from the working directory."""
    return guarded(load_function(path, "reward.path"), path)
