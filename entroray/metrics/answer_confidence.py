"""CoT-decoding (arXiv 2402.10200): the tokens of a response's answer, and how confident they are.

The gap of a path is the mean of p(1) - p(2) over the tokens of its answer alone, p(1) and p(2) being the two
largest probabilities at that token, whichever token was drawn or forced there.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from enum import StrEnum
from itertools import takewhile

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray


class NoGap(StrEnum):
    """Why a path has no gap."""

    FAILED = "failed"  # it was not sampled, or not judged
    NO_ANSWER = "no_answer"  # the judge read no answer
    NOT_IN_TEXT = "not_in_text"  # the response does not contain the answer literally


def answer_span(
    token_ids: Sequence[int], answer: str | None, decode: Callable[[Sequence[int]], str]
) -> range | NoGap:
    """Positions of the tokens that hold any part of the last occurrence of `answer` in the response.

    A character made of several tokens counts with all of them. Works with any tokenizer: it decodes about
    2 log2(length) beginnings of the response.
    """
    if not answer:
        return NoGap.NO_ANSWER
    text = decode(token_ids)
    start = text.rfind(answer)
    if start < 0:
        return NoGap.NOT_IN_TEXT
    reach = lambda n: _common(decode(token_ids[:n]), text)
    lengths = range(len(token_ids))
    first = bisect_left(lengths, start, key=reach)
    first -= reach(first) > start  # one token may hold the end of the text before, too
    return range(first, bisect_left(lengths, start + len(answer), key=reach))


def _common(beginning: str, text: str) -> int:
    """Length of the longest common beginning; a character cut in two differs."""
    same = takewhile(lambda pair: pair[0] == pair[1], zip(beginning, text, strict=False))
    return sum(1 for _ in same)


def probability_gap(probabilities: Float[NDArray, "L m"], span: range) -> float:
    """Mean of p(1) - p(2) over the tokens of `span`; m >= 2 probabilities a token, the largest first."""
    chosen = probabilities[span.start : span.stop]
    return float((chosen[:, 0].astype(np.float64) - chosen[:, 1]).mean())


def most_confident(gaps: Sequence[float | NoGap]) -> int | None:
    """The path with the largest gap, the earliest of equals; None where no path has one."""
    known = [i for i, g in enumerate(gaps) if not isinstance(g, NoGap)]
    return max(known, key=lambda i: gaps[i], default=None)


def most_supported(gaps: Sequence[float | NoGap], answers: Sequence[str | None]) -> int | None:
    """The surest path of the answer with the largest sum of gaps, the earliest of equals."""
    total: dict[str | None, float] = {}
    for each, answer in zip(gaps, answers, strict=True):
        if not isinstance(each, NoGap):
            total[answer] = total.get(answer, 0.0) + each
    if not total:
        return None
    best = max(total, key=lambda a: total[a])
    return most_confident([g if a == best else NoGap.NO_ANSWER for g, a in zip(gaps, answers, strict=True)])
