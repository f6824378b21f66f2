"""Single functions of the slots against literal numbers and simple laws."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from entroray.errors import ConfigError
from entroray.objective import build_objective, check_group_size
from entroray.objective.correction import (
    icepop,
    sequence_geometric,
    sequence_mask,
    sequence_product,
    truncated_importance,
)
from entroray.objective.estimator import (
    center,
    constant,
    leave_one_out,
    length_weighted,
    quantile,
    raw,
    subtree,
    zscore,
)
from entroray.objective.keep import always, informative
from entroray.objective.masking import masked_in
from entroray.objective.penalties import entropy_bonus, kl, kl_k3
from entroray.objective.rewards import soft_overlong
from entroray.objective.shapes import by_sign
from entroray.objective.surrogate import cispo, clip, likelihood, reinforce
from entroray.types import Counts, Group, MaskReason, Prompt, Rollout, Span, Tokens, Verdict
from tests import cases

GRPO = {
    "estimator": {"fn": "zscore"},
    "surrogate": {"fn": "clip"},
    "aggregate": {"fn": "rollout_mean"},
    "denominator": {"fn": "rollouts"},
}
numbers = st.floats(-3, 3, allow_subnormal=False)


def group(rewards, correct=None, lengths=None, limit=100) -> Group:
    correct = rewards if correct is None else correct
    lengths = [10] * len(rewards) if lengths is None else lengths
    ids, logprobs = np.zeros(max(lengths), np.int32), np.zeros(max(lengths), np.float32)
    rollouts = tuple(Rollout("q", ids[:n], logprobs[:n], ids[:n], "", 1.0, limit) for n in lengths)
    verdicts = tuple(Verdict(float(r), bool(c)) for r, c in zip(rewards, correct, strict=True))
    return Group(Prompt("q", "", (), ""), rollouts, verdicts)


def tokens(advantage=1.0, logprob=-1.0, **given_columns) -> Tokens:
    """One token, live, of one row; the ratio is handed to the surrogates by hand."""
    column = lambda x: torch.tensor([x], dtype=torch.float64)
    old = {"logprobs": logprob, "entropy": 0.5, "varentropy": 0.5, "old_logprobs": -1.0}
    rest = {
        "behavior_logprobs": -1.0,
        "ref_logprobs": -1.0,
        "temperature": 1.0,
        "scale": 1.0,
        "correction": 1.0,
    }
    columns = {n: column(x) for n, x in (old | rest | {"advantages": advantage} | given_columns).items()}
    live = {n: columns[n].requires_grad_() for n in ("logprobs", "entropy")}
    zero, one = torch.tensor([0]), torch.ones(1)
    rows = {"group": zero, "length": one.long(), "reward": one, "correct": one, "version": zero}
    flags = {"mask": one.bool(), "selected": one.bool()}
    return Tokens(
        row=zero,
        position=zero,
        uid=zero,
        step=0,
        counts=Counts(1, 1, 1, 1),
        **rows,
        **flags,
        **columns | live,
    )


def slope(surrogate, advantage: float, ratio: float, **chosen) -> float:
    """-d loss / d log π at this advantage and ratio."""
    t = tokens(advantage, math.log(ratio))
    surrogate(t, t.logprobs.exp(), **chosen).sum().backward()
    return -t.logprobs.grad.item()


# Estimators


@pytest.mark.parametrize(
    "right, size, winner, loser",
    [(1, 8, 2.4749, -0.3536), (1, 16, 3.75, -0.25), (4, 8, 0.9354, -0.9354), (8, 16, 0.9682, -0.9682)],
)
def test_zscore_of_some_right(right, size, winner, loser):
    advantage = zscore(group([1.0] * right + [0.0] * (size - right)))
    assert advantage[0].item() == pytest.approx(winner, abs=1e-4)
    assert advantage[-1].item() == pytest.approx(loser, abs=1e-4)


def test_estimators_on_one_right_in_four():
    g = group([1, 0, 0, 0])
    assert center(g).tolist() == [0.75, -0.25, -0.25, -0.25]
    assert leave_one_out(g).tolist() == pytest.approx([1, -1 / 3, -1 / 3, -1 / 3])
    assert raw(g).tolist() == [1, 0, 0, 0]
    assert raw(g, baseline=0.5).tolist() == [0.5, -0.5, -0.5, -0.5]
    assert constant(g).tolist() == [1, 1, 1, 1]


def family(rewards, parents, inherited) -> Group:
    """A group whose members hold the first tokens of their parents."""
    g = group(rewards)
    grown = [
        replace(r, parent=parent, spans=(Span(0, shared, MaskReason.PREFIX),) if shared else ())
        for r, parent, shared in zip(g.rollouts, parents, inherited, strict=True)
    ]
    return replace(g, rollouts=tuple(grown))


def test_a_branch_is_compared_with_what_shares_its_beginning():
    """Two roots; 2 and 3 branched off 0 after 3 and 6 tokens, 4 off 3 after 8."""
    g = family([1, 0, 0, 1, 0], [None, None, 0, 0, 3], [0, 0, 3, 6, 8])
    # root 0 and all below it: (1+0+1+0)/4; all of the group: 2/5
    # 2 began after 3 tokens, which 0, 2, 3 and 4 hold: 0 - 2/4
    # 3 and 4 below it: 1/2; its 6 tokens are held by 0, 3 and 4: 2/3
    # 4 began after 8 tokens, which 3 and 4 hold: 0 - 1/2
    assert subtree(g, eps=None).tolist() == pytest.approx([0.1, -0.4, -0.5, -1 / 6, -0.5])
    deviation = math.sqrt((2 * 0.6**2 + 3 * 0.4**2) / 4)
    by_deviation = [x / (deviation + 1e-6) for x in (0.1, -0.4, -0.5, -1 / 6, -0.5)]
    assert subtree(g).tolist() == pytest.approx(by_deviation)
    assert center(g).tolist() == pytest.approx([0.6, -0.4, -0.4, 0.6, -0.4]), "the flat one knows no kin"


def test_branches_from_one_place_are_compared_with_each_other_and_their_parent():
    g = family([0, 1, 0, 1], [None, None, 1, 1], [0, 0, 5, 5])
    assert subtree(g, eps=None).tolist() == pytest.approx([-1 / 2, 2 / 3 - 1 / 2, -2 / 3, 1 / 3])


def test_a_family_that_is_alike_learns_only_as_a_whole():
    g = family([0.1, 0.1, 0.1, 0.4], [None, 0, 0, None], [0, 4, 7, 0])
    found = subtree(g, eps=None).tolist()
    assert found[1:3] == [0.0, 0.0] and found[0] == pytest.approx(-0.075) and found[3] == pytest.approx(0.225)


def test_the_length_weighted_baseline_is_a_mean_over_tokens():
    assert length_weighted(group([1, 0, 0], lengths=[10, 10, 20])).tolist() == [0.75, -0.25, -0.25]


@pytest.mark.parametrize(
    ("rewards", "k", "expected"),
    [
        ([1, 0, 0, 0], 0.4, [2, 0, 0, 0]),
        ([1, 1, 1, 0], 0.4, [0, 0, 0, -2]),
        ([1] * 2 + [0] * 3, 0.6, [1.8257, 1.8257, 0, 0, 0]),
        ([1] * 2 + [0] * 3, 0.61, [0, 0, -1.8257, -1.8257, -1.8257]),
    ],
)
def test_the_quantile_baseline_trains_the_rarer_outcome(rewards, k, expected):
    assert quantile(group(rewards), k=k).tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("estimator", [center, zscore, leave_one_out, length_weighted, quantile, subtree])
@pytest.mark.parametrize("size", [1, 3, 7])
@pytest.mark.parametrize("reward", [0.1, 0.7, -1 / 3])
def test_equal_rewards_give_exactly_nothing(estimator, size, reward):
    assert estimator(group([reward] * size)).tolist() == [0.0] * size


@settings(max_examples=50, deadline=None)
@given(st.lists(numbers, min_size=2, max_size=9), numbers)
def test_group_estimators_ignore_a_shift_and_sum_to_nothing(rewards, shift):
    assume(max(rewards) - min(rewards) > 0.01)
    others = [(sum(rewards) - r) / (len(rewards) - 1) for r in rewards]
    expected = [r - o for r, o in zip(rewards, others, strict=True)]
    assert leave_one_out(group(rewards)).tolist() == pytest.approx(expected, abs=1e-9)
    assert torch.allclose(subtree(group(rewards)), zscore(group(rewards)), atol=1e-9)
    assert torch.allclose(subtree(group(rewards), eps=None), center(group(rewards)), atol=1e-12)
    for estimator in (center, zscore, leave_one_out):
        advantage = estimator(group(rewards))
        assert advantage.sum().item() == pytest.approx(0, abs=1e-9)
        moved = estimator(group([r + shift for r in rewards]))
        assert moved.tolist() == pytest.approx(advantage.tolist(), abs=1e-6)


def test_a_group_of_one_is_refused_where_rollouts_are_compared():
    grpo = build_objective(GRPO)
    check_group_size(grpo, 2)
    with pytest.raises(ConfigError, match=r"`zscore` .*rollout\.group_size=2 .* 1: .*`raw`.*`always`"):
        check_group_size(grpo, 1)
    alone = build_objective(GRPO | {"estimator": {"fn": "raw"}})
    check_group_size(alone, 1)
    with pytest.raises(ConfigError, match=r"`informative` .*rollout\.group_size="):
        check_group_size(
            build_objective(GRPO | {"estimator": {"fn": "raw"}, "keep": {"fn": "informative"}}), 1
        )


# Rewards and keep rules


def test_soft_overlong_is_nothing_then_linear_then_one():
    g = group([0] * 6, lengths=[0, 80, 85, 90, 100, 120])
    assert soft_overlong(g, factor=1.0).tolist() == pytest.approx([0, 0, -0.25, -0.5, -1, -1])
    assert soft_overlong(g, buffer=0.5, factor=2.0).tolist() == pytest.approx([0, -1.2, -1.4, -1.6, -2, -2])
    paper = group([0, 0, 0], lengths=[16384, 18432, 20480], limit=20480)
    assert soft_overlong(paper, factor=1.0).tolist() == pytest.approx([0, -0.5, -1])


def test_shaping_reaches_the_estimator_and_not_the_keep_rule():
    penalty = {"fn": "soft_overlong", "factor": 1.0}
    shaped = build_objective(GRPO | {"rewards": [penalty] * 2, "keep": {"fn": "informative"}})
    g = group([1, 1, 1], lengths=[10, 90, 100])
    assert shaped.shape_rewards(g).tolist() == pytest.approx([1, 0, -1])
    assert shaped.shape_rewards(g).dtype == torch.float64
    assert shaped.estimate(g).tolist() == pytest.approx([1, 0, -1], abs=1e-5)
    assert not shaped.keep(g), "equal correctness stays uninformative however rewards differ"
    assert g.rewards.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    "correct, kept", [((0, 0, 0), False), ((1, 0, 0), True), ((1, 1, 0), True), ((1, 1, 1), False)]
)
def test_informative_reads_correct_and_not_reward(correct, kept):
    for rewards in [(0.3, -1, 2), (1, 1, 1), correct]:
        assert informative(group(rewards, correct)) is kept
        assert always(group(rewards, correct)) is True


# Surrogates: the coefficient of grad log π


@pytest.mark.parametrize(
    "advantage, ratio, dual, expected",
    [
        (2.0, 1.0, None, 2.0),
        (2.0, 1.27, None, 2.54),
        (2.0, 1.29, None, 0.0),
        (2.0, 0.5, None, 1.0),
        (-2.0, 1.0, None, -2.0),
        (-2.0, 0.81, None, -1.62),
        (-2.0, 0.79, None, 0.0),
        (-2.0, 11.0, None, -22.0),
        (-2.0, 11.0, 10.0, 0.0),
        (-2.0, 9.0, 10.0, -18.0),
        (2.0, 0.01, 10.0, 0.02),
    ],
)
def test_clip_silences_only_moves_already_rewarded(advantage, ratio, dual, expected):
    got = slope(clip, advantage, ratio, low=0.2, high=0.28, dual=dual)
    assert got == pytest.approx(expected, abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(numbers, st.floats(0.02, 20), st.floats(0.05, 1), st.floats(0.05, 2), st.floats(1.5, 15))
def test_clip_gradient_is_gated_and_keeps_its_sign(advantage, ratio, low, high, dual):
    assume(all(abs(ratio - edge) > 1e-9 for edge in (1 - low, 1 + high, dual)))
    inside = ratio < 1 + high if advantage > 0 else 1 - low < ratio < dual
    expected = ratio * advantage * inside
    got = slope(clip, advantage, ratio, low=low, high=high, dual=dual)
    assert got == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert got * advantage >= 0


def test_clip_value_is_pessimistic():
    value = lambda a, r, **s: clip(tokens(a), torch.tensor([r]).double(), **s).item()
    assert value(1.0, 2.0) == pytest.approx(-1.2)
    assert value(-1.0, 2.0) == pytest.approx(2.0)
    assert value(-1.0, 0.5) == pytest.approx(0.8)
    assert value(-1.0, 5.0, dual=3.0) == pytest.approx(3.0)


@pytest.mark.parametrize(
    "ratio, chosen, weight",
    [
        (7.0, {}, 5.0),
        (0.01, {}, 0.01),
        (7.0, {"cap": 2.0}, 2.0),
        (7.0, {"cap": 2.0, "cap_mode": "one_plus_eps"}, 3.0),
        (0.1, {"floor": 0.2}, 0.2),
        (0.1, {"floor": 0.2, "cap_mode": "one_plus_eps"}, 0.8),
        (0.9, {"floor": 0.2, "cap_mode": "one_plus_eps"}, 0.9),
    ],
)
def test_cispo_bounds_the_weight_and_never_the_gradient(ratio, chosen, weight):
    for advantage in (1.5, -1.5):
        assert slope(cispo, advantage, ratio, **chosen) == pytest.approx(weight * advantage)


@given(numbers, st.floats(0.02, 20))
@settings(max_examples=20, deadline=None)
def test_unclipped_surrogates(advantage, ratio):
    assert slope(reinforce, advantage, ratio) == pytest.approx(ratio * advantage)
    assert slope(likelihood, advantage, ratio) == pytest.approx(advantage)


# Token weights and penalties


def test_truncated_importance_caps_the_ratio():
    weight = lambda d, **s: truncated_importance(tokens(behavior_logprobs=-1.0 - d), **s).item()
    assert weight(math.log(1.5)) == pytest.approx(1.5)
    assert weight(math.log(0.1)) == pytest.approx(0.1)
    assert weight(math.log(7)) == 2.0
    assert weight(math.log(7), cap=5.0) == 5.0


def two_rollouts() -> Tokens:
    """Weights 4, 1 and 0.25, 2 of two rollouts of two tokens."""
    t = cases.tokens(masked_out=()).take(torch.tensor([0, 4]))
    ratio = torch.tensor([4, 1, 1, 1, 1, 0.25, 2, 1, 1]).double()
    return masked_in(
        replace(
            t,
            behavior_logprobs=t.old_logprobs - ratio.log(),
            mask=torch.tensor([1, 1, 0, 0, 0, 1, 1, 0, 0]).bool(),
        )
    )


@pytest.mark.parametrize(
    ("correction", "settings", "expected"),
    [
        (truncated_importance, {}, [2, 1, 0.25, 2]),
        (sequence_product, {}, [2, 2, 0.5, 0.5]),
        (sequence_product, {"cap": 9.0}, [4, 4, 0.5, 0.5]),
        (sequence_geometric, {"cap": 9.0}, [2, 2, 0.5**0.5, 0.5**0.5]),
        (sequence_geometric, {"cap": 1.5}, [1.5, 1.5, 0.5**0.5, 0.5**0.5]),
        (icepop, {}, [4, 1, 0, 2]),
        (icepop, {"high": 3.0}, [0, 1, 0, 2]),
        (sequence_mask, {}, [0, 0, 0, 0]),
        (sequence_mask, {"low": 0.7, "high": 1.5}, [0, 0, 0.25, 2]),
    ],
)
def test_corrections_by_name(correction, settings, expected):
    assert correction(two_rollouts(), **settings).tolist() == pytest.approx(expected)


def test_by_sign():
    assert by_sign(tokens(2.0)).item() == pytest.approx(0.2)
    assert by_sign(tokens(-2.0)).item() == -2.0
    assert by_sign(tokens(-2.0), positive=1.0, negative=0.5).item() == -1.0


@given(st.floats(-4, 4), st.floats(0.01, 1))
@settings(max_examples=50, deadline=None)
def test_kl_has_the_value_of_k3_and_the_gradient_of_the_kl(x, coef):
    value = coef * (math.exp(-x) + x - 1)
    for penalty, gradient in ((kl, coef * x), (kl_k3, coef * (1 - math.exp(-x)))):
        t = tokens(logprob=-1.0 + x)
        term = penalty(t, coef=coef)
        term.sum().backward()
        assert term.item() == pytest.approx(value, abs=1e-9)
        assert t.logprobs.grad.item() == pytest.approx(gradient, abs=1e-9)


def test_kl_gradient_is_that_of_the_divergence_in_expectation():
    logits = torch.randn(
        5, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True
    )
    logp, ref = logits.log_softmax(0), torch.full((5,), 0.2, dtype=torch.float64).log()
    (exact,) = torch.autograd.grad((logp.exp() * (logp - ref)).sum(), logits, retain_graph=True)
    x = (logp - ref).detach()
    (sampled,) = torch.autograd.grad((logp.exp().detach() * x * logp).sum(), logits)
    assert torch.allclose(sampled, exact, atol=1e-12)


def test_entropy_bonus_pushes_the_live_entropy_up():
    t = tokens()
    entropy_bonus(t, coef=0.01).sum().backward()
    assert t.entropy.grad.item() == -0.01 and t.logprobs.grad is None
