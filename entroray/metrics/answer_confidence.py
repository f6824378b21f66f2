"""CoT-decoding (arXiv 2402.10200): where a response's answer stands, and how far its tokens are ahead.

The gap of a path is the mean, over the tokens of its answer alone, of p(1) - p(2): the two most probable
tokens of the distribution that stood there, the drawn one being a row of its own. On a first token that was
forced these are still the two most probable, the same for every path.
"""

from collections.abc import Callable, Sequence
from enum import StrEnum
from itertools import takewhile

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray


class NoGap(StrEnum):
    """Why a path has no gap."""

    FAILED = "failed"  # it was not sampled, or not judged
    NO_ANSWER = "no_answer"  # nothing was read from it
    NOT_IN_TEXT = "not_in_text"  # what was read does not stand in the response as it is


def answer_span(
    token_ids: Sequence[int], answer: str | None, decode: Callable[[Sequence[int]], str]
) -> range | NoGap:
    """Positions of the tokens that hold any part of the last place where `answer` stands in the response.

    A character made of several tokens counts with all of them. Found by decoding beginnings of the response,
    about 2 log2(length) of them, so any tokenizer will do.
    """
    if not answer:
        return NoGap.NO_ANSWER
    text = decode(token_ids)
    start = text.rfind(answer)
    if start < 0:
        return NoGap.NOT_IN_TEXT
    reach = lambda n: _common(decode(token_ids[:n]), text)
    first = _least(len(token_ids), lambda n: reach(n) >= start)
    first -= reach(first) > start  # one token holds the end of what stands before, too
    return range(first, _least(len(token_ids), lambda n: reach(n) >= start + len(answer)))


def _least(most: int, enough: Callable[[int], bool]) -> int:
    """The least n in 0..most that is enough; what is enough stays so."""
    low, high = 0, most
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    return low


def _common(beginning: str, text: str) -> int:
    """Length of the longest common beginning: a character cut in two is not one yet."""
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
