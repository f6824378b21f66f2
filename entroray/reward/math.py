"""Mathematical equality with the reference, by math-verify (Hugging Face), without its timers.

Its timers are alarms: they raise off the main thread and are deaf to C code. The verifier kills from outside.
"""

import logging

from entroray.reward.extract import rule
from entroray.reward.verdicts import Judge, failed, graded
from entroray.types import Prompt, Verdict


def judge(*, extract: str = "boxed", marker: str = "####") -> Judge:
    """Right when the extracted answer equals `prompt.reference`: 1,000 is 1000, 0.5 is \\frac12, 5 is x=5.

    An answer that does not parse is wrong; a reference that does not parse is DATA_FAILED.
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
