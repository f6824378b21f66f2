"""Accuracy of k answers to a prompt, from n >= k: one right, all right, the most frequent right.

Each is the expectation over all subsets of k of the n judged answers.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from entroray.types import Group, Verdict

EXACT = 64
"""Samples up to which maj@k is exact; with more it is the mean over `SUBSETS` fixed subsets."""
SUBSETS = 2000


def is_right(verdict: Verdict) -> bool:
    """Whether the response was judged, and judged right."""
    return verdict.status.usable and verdict.correct


def count_right(group: Group) -> int:
    """How many answers of the group are right."""
    return sum(map(is_right, group.verdicts))


def powers_of_two(samples: int) -> list[int]:
    """1, 2, 4, ... up to `samples`."""
    return [2**i for i in range(samples.bit_length()) if 2**i <= samples]


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Probability that one of k draws without return is right: 1 - C(n-c, k) / C(n, k) (arXiv 2107.03374)."""
    _within(samples, k, "pass@")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def pass_all_k(samples: int, correct: int, k: int) -> float:
    """pass^k, the probability that k of k draws are right: C(c, k) / C(n, k) (arXiv 2406.12045)."""
    _within(samples, k, "pass^")
    return math.comb(correct, k) / math.comb(samples, k)


def majority_at_k(answers: Sequence[str | None], right: Sequence[float], k: int) -> float:
    """Probability that the most frequent of k draws' answers is right (self-consistency, arXiv 2203.11171).

    None is no vote; draws without a vote are wrong. If m answers are equally frequent each wins with
    probability 1/m. An answer's correctness is the mean over its samples: 0 or 1 if the judge reads only the
    answer.
    """
    _within(len(answers), k, "maj@")
    votes = Counter(a for a in answers if a is not None)
    hits = {v: [r for a, r in zip(answers, right, strict=True) if a == v] for v in votes}
    if len(answers) > EXACT:
        return _sampled(answers, {v: sum(h) / len(h) for v, h in hits.items()}, k)
    silent = len(answers) - votes.total()
    others = lambda v: tuple(sorted((votes - Counter({v: votes[v]})).values()))
    return sum(sum(h) / len(h) * _leads(votes[v], others(v), silent, k) for v, h in hits.items() if any(h))


def _within(samples: int, k: int, name: str) -> None:
    if not 1 <= k <= samples:
        raise ValueError(
            f"{name}{k} of {samples} samples: k must lie between 1 and {samples}; raise evaluate.samples"
        )


@cache
def _leads(own: int, others: tuple[int, ...], silent: int, k: int) -> float:
    """Probability that an answer with `own` votes leads among k draws; in a tie of m it counts 1/m."""
    ways = 0.0
    total = math.comb(own + sum(others) + silent, k)
    for mine in range(1, min(own, k) + 1):
        harmless = silent + sum(v for v in others if v < mine)  # these can neither tie nor win
        for (ties, votes), count in _rivals(tuple(v for v in others if v >= mine), mine, k - mine).items():
            chosen = count * math.comb(own, mine) * math.comb(harmless, k - mine - votes)
            ways += chosen / (total * (1 + ties))
    return ways


@cache
def _rivals(rivals: tuple[int, ...], maximum: int, room: int) -> dict[tuple[int, int], int]:
    """(rivals with `maximum` votes, votes of all) -> ways in which none has more and all fit in `room`."""
    table = {(0, 0): 1}
    for votes in rivals:
        longer: dict[tuple[int, int], int] = defaultdict(int)
        for (ties, used), count in table.items():
            for drawn in range(min(votes, maximum, room - used) + 1):
                longer[ties + (drawn == maximum), used + drawn] += count * math.comb(votes, drawn)
        table = longer
    return table


def _sampled(answers: Sequence[str | None], right: dict[str, float], k: int) -> float:
    """The mean over `SUBSETS` subsets of k, the same for every prompt with as many answers."""
    names = list(right)
    if not names:
        return 0.0
    place = {name: i for i, name in enumerate(names)}
    who = np.array([len(names) if a is None else place[a] for a in answers])
    cells = who[_shuffled(len(answers))[:, :k]] + (len(names) + 1) * np.arange(SUBSETS)[:, None]
    counts = np.bincount(cells.ravel(), minlength=SUBSETS * (len(names) + 1)).reshape(SUBSETS, -1)[:, :-1]
    leading = (counts == counts.max(axis=1, keepdims=True)) & (counts > 0)
    share = leading / np.maximum(leading.sum(axis=1, keepdims=True), 1)
    return float((share @ np.array([right[name] for name in names])).mean())


@cache
def _shuffled(samples: int) -> NDArray[np.int64]:
    """[SUBSETS, samples] places in a random order; the first k of a row are a subset."""
    rows = np.tile(np.arange(samples), (SUBSETS, 1))
    return np.random.default_rng(0).permuted(rows, axis=1)
