"""pass@k against its definition by enumeration."""

from itertools import combinations

import pytest

from entroray.loop.evaluate import pass_at_k, scores


@pytest.mark.parametrize(("n", "c", "k"), [(4, 0, 2), (4, 1, 2), (5, 2, 3), (8, 8, 1), (6, 3, 6)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(n: int, c: int, k: int) -> None:
    subsets = list(combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_more_than_was_sampled_is_refused() -> None:
    with pytest.raises(ValueError, match="between 1 and 4"):
        pass_at_k(4, 1, 5)


def test_scores_are_means_over_prompts() -> None:
    assert scores([0, 2, 4], 4) == {
        "pass@1": pytest.approx(0.5),
        "pass@2": pytest.approx((0 + 5 / 6 + 1) / 3),
        "pass@4": pytest.approx(2 / 3),
    }
