"""Accuracy over k against its definition by enumeration, intervals, calibration, by literal numbers."""

import math
from collections import Counter
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from entroray.errors import ConfigError
from entroray.evaluation.evaluate import plan_evaluation, score_counts
from entroray.metrics.calibration import auroc, expected_error, reliability
from entroray.metrics.confidence_interval import bootstrap_intervals, paired_difference
from entroray.metrics.pass_at_k import EXACT, majority_at_k, pass_all_k, pass_at_k
from entroray.metrics.positions import entropy_by_position, uncertain_tokens
from entroray.types import Draw

SOME = [(4, 0, 2), (4, 1, 2), (5, 2, 3), (8, 8, 1), (6, 3, 6), (8, 6, 4)]


@pytest.mark.parametrize(("n", "c", "k"), SOME)
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(n: int, c: int, k: int) -> None:
    subsets = list(combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


@pytest.mark.parametrize(("n", "c", "k"), SOME)
def test_pass_all_k_is_the_share_of_subsets_that_are_all_right(n: int, c: int, k: int) -> None:
    subsets = list(combinations([True] * c + [False] * (n - c), k))
    assert pass_all_k(n, c, k) == pytest.approx(sum(map(all, subsets)) / len(subsets))


def test_three_of_four_right_by_hand() -> None:
    assert [pass_at_k(4, 3, k) for k in (1, 2, 4)] == [0.75, 1.0, 1.0]
    assert [pass_all_k(4, 3, k) for k in (1, 2, 4)] == [0.75, 0.5, 0.0]


@pytest.mark.parametrize("score", [pass_at_k, pass_all_k])
def test_more_than_was_sampled_is_refused(score) -> None:
    with pytest.raises(ValueError, match=r"^pass.5 .* 4 .*evaluate\.samples"):
        score(4, 1, 5)
    with pytest.raises(ValueError, match=r"^maj@3 .* 2 .*evaluate\.samples"):
        majority_at_k(["1", "2"], [1, 0], 3)


def by_enumeration(answers: list[str | None], right: dict[str, bool], k: int) -> float:
    """Every subset votes; a tie of m counts 1/m for each; without a vote it is wrong."""
    found = []
    for subset in combinations(answers, k):
        votes = Counter(a for a in subset if a is not None)
        first = [a for a in votes if votes[a] == max(votes.values())]
        found.append(sum(right[a] for a in first) / len(first) if first else 0.0)
    return sum(found) / len(found)


@given(st.lists(st.sampled_from(["a", "b", "c", "d", None]), min_size=1, max_size=8), st.data())
@settings(max_examples=60, deadline=None)
def test_a_majority_is_what_every_subset_votes(answers: list[str | None], data) -> None:
    right = {a: data.draw(st.booleans()) for a in "abcd"}
    k = data.draw(st.integers(1, len(answers)))
    each = [float(a is not None and right[a]) for a in answers]
    assert majority_at_k(answers, each, k) == pytest.approx(by_enumeration(answers, right, k), abs=1e-12)


def test_a_majority_by_hand() -> None:
    answers, right = ["7", "7", "8", None], [1.0, 1.0, 0.0, 0.0]
    assert majority_at_k(answers, right, 1) == 0.5
    # pairs: 77, 7-, 7- are right, 78 and 78 tie, 8- is wrong
    assert majority_at_k(answers, right, 2) == pytest.approx((3 + 2 * 0.5) / 6)
    assert majority_at_k(answers, right, 4) == 1.0
    assert majority_at_k([None, None], [1.0, 1.0], 2) == 0.0


def test_a_majority_of_very_many_samples_is_the_mean_over_fixed_subsets() -> None:
    answers, right = ["a"] * 60 + ["b"] * 40, [1.0] * 60 + [0.0] * 40
    assert len(answers) > EXACT
    exact = sum(math.comb(60, j) * math.comb(40, 5 - j) for j in (3, 4, 5)) / math.comb(100, 5)
    assert majority_at_k(answers, right, 5) == pytest.approx(exact, abs=0.03)
    assert majority_at_k(answers, right, 100) == 1.0
    silent = [None] * 99 + ["a"]  # found by a draw of 20 in 100 with probability 1/5
    assert majority_at_k(silent, [0.0] * 99 + [1.0], 20) == pytest.approx(0.2, abs=0.03)
    assert majority_at_k(answers, right, 5) == majority_at_k(answers, right, 5)


def test_scores_are_means_over_prompts() -> None:
    assert score_counts([1, 0, 0, 1], [0, 2, 4], 4) == {
        "greedy": 0.5,
        "pass@1": pytest.approx(0.5),
        "pass@2": pytest.approx((0 + 5 / 6 + 1) / 3),
        "pass@4": pytest.approx(2 / 3),
    }


def test_a_plan_has_the_powers_of_two_the_samples_and_what_was_asked() -> None:
    assert plan_evaluation(Draw(1.0, 9), 8).ks == (1, 2, 4, 8)
    assert plan_evaluation(Draw(1.0, 9), 6, [3]).ks == (1, 2, 3, 4, 6)
    assert plan_evaluation(Draw(0.0, 9), 8) == plan_evaluation(
        Draw(0.0, 9), 1
    )  # a greedy answer drawn again is the same answer
    with pytest.raises(ConfigError, match=r"evaluate\.k=\[16\] .*evaluate\.samples .*16$"):
        plan_evaluation(Draw(1.0, 9), 8, [16])
    with pytest.raises(ConfigError, match=r"evaluate\.k=\[2\] .*evaluate\.samples .*sampler\.temperature "):
        plan_evaluation(Draw(0.0, 9), 8, [2])


def test_an_interval_over_prompts_is_that_of_all_possible_draws() -> None:
    """Of 4 rows 256 draws are equally likely; each column has the interval it has alone."""
    table = np.array([[0.0, 5.0], [1.0, 5.0], [1.0, 5.0], [1.0, 6.0]])
    every = [table[list(drawn), 0].mean() for drawn in product(range(4), repeat=4)]
    found = bootstrap_intervals(table, draws=40_000)
    assert found[0].tolist() == np.quantile(every, [0.025, 0.975]).tolist() == [0.25, 1.0]
    assert found[1] == pytest.approx([5.0, 5.75])
    assert (bootstrap_intervals(table) == bootstrap_intervals(table)).all()
    many = np.random.default_rng(0).random((400, 1))
    low, high = bootstrap_intervals(many)[0]  # close to the normal interval
    assert (high - low) / 2 == pytest.approx(1.96 * many.std() / 20, rel=0.03)


def test_pairs_tell_apart_what_two_intervals_do_not() -> None:
    hard = np.random.default_rng(1).random(200)
    above = paired_difference(hard, hard + 0.05)
    assert above.sign == "+" and above.mean == pytest.approx(0.05)
    assert paired_difference(hard + 0.05, hard).sign == "-"
    (_, high), (low, _) = (bootstrap_intervals(x[:, None])[0] for x in (hard, hard + 0.05))
    assert low < high, "unpaired, these overlap"
    assert paired_difference(np.array([0.0, 1.0, 0.0]), np.array([1.0, 0.0, 0.0])).sign == "="


def test_auroc_is_the_share_of_pairs_in_order() -> None:
    rng = np.random.default_rng(2)
    score, correct = rng.integers(0, 6, 60) / 5, rng.integers(0, 2, 60).astype(float)
    pairs = [(a > b) + (a == b) / 2 for a in score[correct == 1] for b in score[correct == 0]]
    assert auroc(score, correct) == pytest.approx(sum(pairs) / len(pairs))
    assert auroc(np.array([0.1, 0.9, 0.5]), np.array([0.0, 1.0, 0.0])) == 1.0
    assert math.isnan(auroc(score, np.ones(60)))


def test_a_reliability_diagram_gives_the_expected_error() -> None:
    sure, right = np.array([0.0, 0.05, 0.5, 0.97, 1.0]), np.array([0.0, 1.0, 1.0, 1.0, 0.0])
    bins = reliability(sure, right)
    assert len(bins.edges) == 16 and bins.count.tolist() == [2] + [0] * 6 + [1] + [0] * 6 + [2]
    assert bins.confidence[[0, 7, 14]].tolist() == pytest.approx([0.025, 0.5, 0.985])
    assert bins.accuracy[[0, 7, 14]].tolist() == [0.5, 1.0, 0.5] and math.isnan(bins.accuracy[3])
    there = bins.count > 0
    gap = np.abs(bins.confidence - bins.accuracy)[there] @ bins.count[there] / 5
    assert expected_error(sure, right) == pytest.approx(gap) == pytest.approx((0.95 + 0.5 + 0.97) / 5)


def test_entropy_by_position_leaves_out_what_nobody_drew() -> None:
    places = entropy_by_position([np.array([1.0, 2.0, 3.0]), np.array([3.0, np.nan])])
    assert [(p.first, p.last, p.tokens, p.entropy) for p in places] == [
        (0, 0, 2, 2.0),
        (1, 1, 1, 2.0),
        (2, 2, 1, 3.0),
    ]
    wide = entropy_by_position([np.arange(5.0)], maximum=2)
    assert [(p.first, p.last, p.tokens, p.entropy) for p in wide] == [(0, 2, 3, 1.0), (3, 4, 2, 3.5)]
    assert entropy_by_position([]) == []


def test_uncertain_tokens_are_those_above_the_quantile_by_count() -> None:
    ids = np.array([7, 7, 5, 5, 5, 9, 1, 1, 1, 1])
    entropy = np.array([2.0, 4.0, 3.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    above, found = uncertain_tokens(ids, entropy, quantile=0.7)
    assert above == pytest.approx(np.quantile(entropy, 0.7))
    assert [(u.token_id, u.count, u.entropy) for u in found] == [(7, 2, 3.0), (5, 1, 3.0)]
