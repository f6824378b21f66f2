"""Entropy of logits and the metrics of a step, against numbers worked out by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from entroray.metrics import step_metrics, token_entropy
from entroray.metrics.by_domain import judged_metrics
from entroray.types import Counts, Group, Prompt, Rollout, Status, Tokens, Verdict

LN2 = math.log(2)
INF = math.inf


def rollout(length, versions=None, status=Status.OK):
    ids = np.arange(length, dtype=np.int32)
    version = np.full(length, 3) if versions is None else versions
    logprobs = np.full(length, -1.0, np.float32)
    return Rollout("p", ids, logprobs, np.array(version, np.int32), "", 1.0, 8, status)


def group(lengths, rewards, **first):
    prompt = Prompt("p", "2+2", (1,), "4")
    rollouts = [rollout(n, **(first if i == 0 else {})) for i, n in enumerate(lengths)]
    return Group(prompt, tuple(rollouts), tuple(Verdict(2.0 * r, bool(r)) for r in rewards))


def tokens_of(groups, entropy, advantages=None, mask=None, gap=0.0, dtype=torch.float64):
    rollouts = [r for g in groups for r in g.rollouts]
    length = torch.tensor([r.length for r in rollouts])
    n, b = int(length.sum()), len(rollouts)
    flat = lambda value: torch.full((n,), value, dtype=dtype)
    given = lambda x, default: default if x is None else torch.tensor(x)
    return Tokens(
        row=torch.repeat_interleave(torch.arange(b), length),
        position=torch.cat([torch.arange(int(k)) for k in length]),
        uid=torch.arange(n),
        mask=given(mask, torch.ones(n, dtype=torch.bool)),
        logprobs=flat(-1.0),
        entropy=torch.tensor(entropy, dtype=dtype),
        varentropy=flat(0.5),
        old_logprobs=flat(-1.0) + gap,
        behavior_logprobs=flat(-1.0),
        ref_logprobs=None,
        temperature=flat(1.0),
        advantages=given(advantages, flat(0.0)),
        scale=flat(1.0),
        correction=flat(1.0),
        selected=torch.zeros(n, dtype=torch.bool),
        group=torch.repeat_interleave(
            torch.arange(len(groups)), torch.tensor([len(g.rollouts) for g in groups])
        ),
        length=length,
        reward=torch.cat([g.rewards for g in groups]),
        correct=torch.cat([g.correct for g in groups]),
        version=torch.tensor([r.version for r in rollouts]),
        step=4,
        counts=Counts(n, n, b, len(groups)),
    )


def test_entropy_of_a_fair_coin_is_ln_2_nats_and_1_bit():
    coin = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]])
    entropy, varentropy = token_entropy(coin, 1.0)
    # p = 3/4, 1/4: H = 2 ln 2 - 0.75 ln 3, and the variance of -ln p is p q (ln 3)^2
    assert entropy.tolist() == pytest.approx([LN2, 2 * LN2 - 0.75 * math.log(3)], abs=1e-6)
    assert varentropy.tolist() == pytest.approx([0.0, 3 / 16 * math.log(3) ** 2], abs=1e-6)
    bits, square_bits = token_entropy(coin, 1.0, base="bits")
    assert bits.tolist() == pytest.approx([1.0, 0.8112781], abs=1e-6)
    assert square_bits[1] == pytest.approx(3 / 16 * math.log2(3) ** 2, abs=1e-6)


def test_temperature_divides_the_logits_of_its_own_row():
    logits = torch.tensor([[2 * math.log(3), 0.0], [math.log(3), 0.0]])
    entropy, _ = token_entropy(logits, torch.tensor([2.0, 1.0]))
    assert entropy[0] == pytest.approx(float(entropy[1]), abs=1e-6)
    assert token_entropy(logits, 2.0)[0][0] == pytest.approx(float(entropy[0]), abs=1e-6)


def test_impossible_tokens_and_certain_rows_are_finite_with_finite_gradients():
    logits = torch.tensor([[0.0, -INF, 0.0], [0.0, -INF, -INF], [0.0, -1e30, -1e4]], requires_grad=True)
    entropy, varentropy = token_entropy(logits, 1.0)
    assert entropy.tolist() == pytest.approx([LN2, 0.0, 0.0], abs=1e-6)
    assert varentropy.tolist() == pytest.approx([0.0, 0.0, 0.0], abs=1e-6)
    (gradient,) = torch.autograd.grad((entropy + varentropy).sum(), logits)
    assert gradient.isfinite().all()


def test_half_precision_logits_are_widened_and_double_stays_double():
    entropy, _ = token_entropy(torch.zeros(1, 1000, dtype=torch.bfloat16), 1.0)
    assert entropy.dtype == torch.float32 and entropy[0] == pytest.approx(math.log(1000), abs=1e-5)
    assert token_entropy(torch.zeros(1, 2, dtype=torch.float64), 1.0)[0].dtype == torch.float64


def test_a_models_own_logits_are_measured_position_by_position():
    """[B, T, V], also where there are as many positions as words."""
    logits = torch.randn(2, 5, 5, generator=torch.Generator().manual_seed(0))
    per_row = token_entropy(logits.reshape(10, 5), 0.7)
    for whole, row in zip(token_entropy(logits, 0.7), per_row, strict=True):
        assert whole.shape == (2, 5) and torch.equal(whole.reshape(10), row)
    own = torch.linspace(0.5, 1.5, 10).reshape(2, 5)
    per_row = token_entropy(logits.reshape(10, 5), own.reshape(10))
    for whole, row in zip(token_entropy(logits, own), per_row, strict=True):
        assert torch.equal(whole.reshape(10), row)
    one = token_entropy(torch.tensor([math.log(3), 0.0]), 1.0)
    assert one[0].shape == () and float(one[1]) == pytest.approx(3 / 16 * math.log(3) ** 2, abs=1e-6)


@pytest.mark.parametrize("shape", [(2,), (5,), (2, 1), (5, 2)])
def test_a_temperature_for_other_positions_is_refused(shape):
    with pytest.raises(ValueError, match=r"token_entropy: temperature .*\[2, 5\]"):
        token_entropy(torch.zeros(2, 5, 3), torch.ones(shape))


@pytest.mark.parametrize("wrong", [{"temperature": 0.0}, {"temperature": 1.0, "base": "dits"}])
def test_a_wrong_temperature_or_base_is_refused(wrong):
    with pytest.raises(ValueError, match="token_entropy"):
        token_entropy(torch.zeros(1, 2), **wrong)


def test_rewards_groups_and_lengths():
    groups = [group([2, 1], [1, 0], status=Status.TRUNCATED), group([1, 1], [1, 1]), group([3, 0], [0, 0])]
    metrics = judged_metrics(groups)
    assert metrics["correct/mean"] == 0.5
    assert metrics["reward/mean"] == 1.0
    assert metrics["reward/std"] == 1.0  # rewards 2, 0, 2, 2, 0, 0
    assert metrics["groups/all_right"] == pytest.approx(1 / 3)
    assert metrics["groups/all_wrong"] == pytest.approx(1 / 3)
    assert metrics["length/mean"] == pytest.approx(8 / 6)
    assert metrics["length/max"] == 3
    assert metrics["length/truncated"] == pytest.approx(1 / 6)


def test_entropy_statistics_by_hand():
    groups = [group([3, 2], [1, 0])]
    tokens = tokens_of(groups, [0.0, 1.0, 2.0, 3.0, 4.0], [1.0, 2.0, -1.0, 0.0, -4.0], gap=-LN2)
    metrics = step_metrics(groups, tokens)
    assert metrics["entropy/mean"] == 2.0
    assert [metrics[f"entropy/p{q}"] for q in (20, 50, 80, 95)] == pytest.approx([0.8, 2.0, 3.2, 3.8])
    assert metrics["entropy/positive"] == 0.5
    assert metrics["entropy/negative"] == 3.0
    assert metrics["varentropy/mean"] == 0.5
    assert metrics["advantages/mean_abs"] == 1.6
    assert metrics["logprobs/mean"] == pytest.approx(-1 - LN2, abs=1e-6)
    assert metrics["mismatch/mean_abs"] == pytest.approx(LN2, abs=1e-6)
    assert metrics["mismatch/max"] == pytest.approx(LN2, abs=1e-6)
    assert metrics["mismatch/kl"] == pytest.approx(0.5 - 1 + LN2, abs=1e-6)  # r = 1/2


def test_lag_is_counted_per_token_from_the_weights_that_sampled_it():
    groups = [group([3, 1], [1, 0], versions=[1, 3, 4])]
    metrics = step_metrics(groups, tokens_of(groups, [1.0] * 4))
    assert metrics["lag/mean"] == pytest.approx((3 + 1 + 0 + 1) / 4)
    assert metrics["lag/max"] == 3


def test_nan_outside_the_mask_leaves_no_trace():
    groups = [group([2, 2], [1, 0])]
    mask = [True, False, True, True]
    clean = tokens_of(groups, [1.0, 9.0, 2.0, 3.0], mask=mask)
    nan = torch.where(clean.mask, clean.entropy, torch.nan)
    gone = torch.where(clean.mask, clean.old_logprobs, torch.nan)
    dirty = replace(clean, entropy=nan, varentropy=nan, advantages=nan * 0, old_logprobs=gone)
    assert step_metrics(groups, dirty)["entropy/mean"] == 2.0
    assert all(math.isfinite(v) for v in step_metrics(groups, dirty).values())


def test_aggregates_are_taken_after_rounding_to_the_stored_type():
    groups = [group([2], [1])]
    metrics = step_metrics(groups, tokens_of(groups, [1 + 1e-9, 0.1]))
    assert metrics["entropy/mean"] == (1.0 + float(np.float32(0.1))) / 2


def test_a_metric_over_nothing_is_left_out():
    groups = [group([1, 1], [1, 0])]
    assert "entropy/positive" not in step_metrics(groups, tokens_of(groups, [1.0, 1.0]))
    unmasked = step_metrics(groups, tokens_of(groups, [1.0, 1.0], mask=[False, False]))
    assert not unmasked


def test_tokens_of_other_groups_are_refused():
    groups = [group([2, 1], [1, 0])]
    with pytest.raises(ValueError, match=r"^step \d+: .* 2 .* 3 .* 2 .* 3: "):
        step_metrics([group([1, 2], [1, 0])], tokens_of(groups, [1.0] * 3))
