"""A share of a count is the whole number that was meant, wherever one is taken: floats may miss it."""

import math

import pytest
import torch

from entroray.objective.estimator import quantile
from entroray.objective.select import random_positive, top_entropy, top_entropy_of_rollout
from entroray.objective.step_statistics import _rungs
from entroray.ops import as_count
from entroray.rollout.stream import wave
from entroray.types import Tokens
from tests.cases import group


def step(*lengths: int) -> Tokens:
    """Rows of these lengths, every token reinforced, the entropy rising from token to token."""
    n = sum(lengths)
    rising = torch.arange(n, dtype=torch.float64)
    return Tokens.from_columns(
        logprobs=-rising,
        old_logprobs=-rising,
        entropy=rising,
        lengths=lengths,
        advantages=[1.0] * len(lengths),
    )


@pytest.mark.parametrize(
    ("product", "below", "above"),
    [
        *(
            (0.29 * 100, 29, 29),
            (0.07 * 100, 7, 7),
            ((0.1 + 0.2) * 10, 3, 3),
            (0.29 * 1e8, 29_000_000, 29_000_000),
        ),
        *((2.5, 2, 3), (28.9999, 28, 29), (0.0002 * 2500.5, 0, 1), (0.0, 0, 0), (1e-9, 0, 1)),
    ],
)
def test_a_product_next_to_a_whole_number_is_that_number(product: float, below: int, above: int) -> None:
    assert (as_count(product, math.floor), as_count(product, math.ceil)) == (below, above)


def test_every_hundredth_of_every_count_is_exact() -> None:
    for percent in range(1, 101):
        for n in range(1, 301):
            product = percent / 100 * n
            assert as_count(product, math.floor) == percent * n // 100
            assert as_count(product, math.ceil) == -(-percent * n // 100)


@pytest.mark.parametrize("select", [top_entropy, random_positive])
@pytest.mark.parametrize(("share", "of_100"), [(0.29, 29), (0.57, 57), (0.58, 58), (0.285, 28), (0.001, 1)])
def test_a_share_of_a_steps_tokens_is_rounded_down_and_at_least_one(
    select, share: float, of_100: int
) -> None:
    assert select(step(40, 60), share=share).sum() == of_100


def test_a_share_of_each_rollout_is_rounded_up() -> None:
    lengths = tuple(range(1, 120))
    t = step(*lengths)
    for tenth in range(1, 11):
        chosen = top_entropy_of_rollout(t, share=tenth / 10)
        each = [int(chosen[t.row == row].sum()) for row in range(len(lengths))]
        assert each == [-(-tenth * n // 10) for n in lengths]


@pytest.mark.parametrize(("k", "place"), [(0.3, 2), (0.31, 3), (0.7, 6), (0.1 + 0.2, 2), (1.0, 9), (0.01, 0)])
def test_a_quantile_of_ten_rewards_is_one_of_them(k: float, place: int) -> None:
    rewards = [float(i) for i in range(10)]
    g = group(rewards=rewards, correct=[0] * 10, lengths=[5] * 10)
    assert quantile(g, k=k).tolist()[place] == 0.0


@pytest.mark.parametrize(
    ("missing", "kept", "judged", "groups"), [(3, 2, 27, 63), (32, 1, 9, 336), (4, 3, 4, 7)]
)
def test_a_wave_of_a_whole_number_of_groups_is_that_many(
    missing: int, kept: int, judged: int, groups: int
) -> None:
    assert wave(missing, kept / judged) == groups


def test_the_rungs_between_two_bounds_are_as_many_as_there_are_strides() -> None:
    assert [len(_rungs(0.6, 0.8, 0.05)), len(_rungs(1.2, 2.0, 0.05)), len(_rungs(0.1, 0.35, 0.1))] == [
        5,
        17,
        4,
    ]
