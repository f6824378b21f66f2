"""Which tokens the selecting rows single out, and that chance is decided by seed, step and identity alone."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from entroray.objective import build_objective, select
from entroray.objective.estimator import sign
from entroray.types import Tokens
from tests.cases import ROWS, group, tokens


def test_forking_tokens_are_the_fifth_with_the_highest_entropy():
    t = tokens()
    chosen = build_objective(ROWS["forking_tokens"]).credit(t).selected
    assert chosen.sum() == 4 == int(0.2 * 24)
    assert t.entropy[chosen].min() > t.entropy[t.mask & ~chosen].max()


def proxy(t: Tokens) -> Tensor:
    lp, a = t.logprobs[t.mask], t.advantages[t.mask]
    c = torch.full_like(t.logprobs, torch.nan)
    c[t.mask] = (lp - lp.mean()) * (a - a.mean())
    return c


def test_kl_cov_holds_the_token_of_highest_covariance():
    t = tokens()
    chosen = build_objective(ROWS["kl_cov"]).credit(t).selected
    assert chosen.nonzero().tolist() == [[int(proxy(t).nan_to_num(-torch.inf).argmax())]]


def test_clip_cov_draws_within_its_band_and_anew_every_step():
    def drawn(step: int, **change: float) -> Tensor:
        row = ROWS["clip_cov"] | {"select": ROWS["clip_cov"]["select"] | change}
        return build_objective(row).credit(replace(tokens(), step=step)).selected

    c = proxy(tokens())
    few = [drawn(step, low=0.2) for step in range(20)]
    assert all(x.sum() == 1 and 0.2 < c[x] < 5.0 for x in few)
    assert len({int(x.nonzero()) for x in few}) > 2
    assert drawn(1, low=4.9).sum() == 0, "none qualifies, none is taken"
    assert drawn(1, low=0.2, share=1.0).sum() == ((c > 0.2) & (c < 5.0)).sum()


def test_random_positive_clip_draws_among_reinforced_tokens():
    few = [
        build_objective(ROWS["random_positive_clip"]).credit(replace(tokens(), step=s)).selected
        for s in range(20)
    ]
    assert all(x.sum() == 1 and tokens().advantages[x] > 0 for x in few)
    assert len({int(x.nonzero()) for x in few}) > 2


@pytest.mark.parametrize(
    "select", [{"fn": "random_positive", "share": 0.1}, {"fn": "covariance_band", "share": 0.1, "low": 0.1}]
)
def test_chance_is_another_in_every_seed_and_step_and_the_same_however_the_step_is_cut(select):
    objective = build_objective(ROWS["grpo"] | {"select": select, "scales": [{"fn": "selected"}]})

    def chosen(t: Tokens) -> tuple[int, ...]:
        return tuple(sorted(t.uid[objective.credit(t).selected].tolist()))

    draws = {
        (s, step): chosen(replace(tokens(step=step), seed=s)) for s in (0, 1, 2, -1) for step in range(9)
    }
    assert all(len(set(draws.values())) > 4 and len(draw) == 2 for draw in draws.values())
    by_seed = [tuple(draws[s, step] for step in range(9)) for s in (0, 1, 2, -1)]
    assert len(set(by_seed)) == 4, "another run of draws in each seed"
    for rows in ([5, 3, 1, 0, 2, 4], [2, 3, 0, 1, 5, 4]):
        assert chosen(replace(tokens(step=4), seed=2).take(torch.tensor(rows))) == draws[2, 4]


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row["rewards"]])
def test_rows_with_a_length_penalty_weigh_it_for_rewards_of_0_and_1(name):
    """DAPO's -1 and 1 are 2 apart and its penalty is at most 1: half of what a right answer is worth."""
    g = group(rewards=(1, 0, 1, 0), correct=(1, 0, 1, 0), lengths=(100, 100, 90, 80))
    assert build_objective(ROWS[name]).shape_rewards(g).tolist() == pytest.approx([0.5, -0.5, 0.75, 0.0])


def test_right_answers_are_plus_one_whatever_their_reward():
    assert sign(group(rewards=(0.3, 9, 0, 1), correct=(1, 0, 0, 1))).tolist() == [1, -1, -1, 1]


def at_the_start() -> Tokens:
    """Before the first update of the step: the policy is the one that was scored."""
    return replace(tokens(), logprobs=tokens().old_logprobs)


def column(t: Tokens, x: Tensor) -> Tensor:
    return torch.where(t.mask, x, torch.nan)


def test_clip_b_drops_the_tail_of_the_punished_alone():
    t = at_the_start()
    row = ROWS["clip_b"] | {"select": {"fn": "low_discriminator", "mu": 0.5}}
    credited = build_objective(row).credit(t)
    d = (t.logprobs.exp() * (t.logprobs + t.entropy))[t.mask]
    far = torch.zeros_like(t.mask)
    far[t.mask] = d - d.mean() < -0.5 * d.std()
    assert (
        torch.equal(credited.selected, far & (t.advantages < 0)) and 0 < credited.selected.sum() < far.sum()
    )
    assert credited.counts.kept_tokens == 24 - credited.selected.sum(), "they leave the denominator"


def test_clip_v_drops_the_furthest_below_the_vocabularys_mean_first():
    t = at_the_start()
    gap = torch.full_like(t.logprobs, 9.0) + torch.arange(len(t.row)) / 100
    d = t.logprobs.exp() * (t.logprobs + t.entropy)
    moved = replace(t, extra={**t.extra, "mean_discriminator": column(t, d + gap)})
    chosen = build_objective(ROWS["clip_v"]).credit(moved).selected
    worst = torch.where(t.mask & (t.advantages < 0), gap, -torch.inf).argmax()
    assert chosen.nonzero().tolist() == [[int(worst)]], "at most 1e-4 of the tokens, at least one"


def test_lp_reg_holds_rare_tokens_that_are_no_noise():
    t = at_the_start()
    row = ROWS["lp_reg"] | {"select": {"fn": "rare_but_plausible", "share": 0.5, "kappa": 0.25}}
    best = replace(t, extra={**t.extra, "max_logprob": column(t, torch.full_like(t.logprobs, -0.2))})
    chosen = build_objective(row).credit(best).selected
    rare = t.old_logprobs <= t.old_logprobs[t.mask].sort().values[11]
    plausible = t.old_logprobs.exp() >= 0.25 * torch.tensor(-0.2).double().exp()
    assert torch.equal(chosen, t.mask & rare & plausible & (t.advantages < 0)) and chosen.any()


def test_aspo_looks_for_hesitation_inside_each_rollout():
    t = tokens()
    chosen = build_objective(ROWS["aspo"]).credit(t).selected
    for row in range(6):
        mine = t.mask & (t.row == row)
        assert (chosen & mine).sum() == math.ceil(0.2 * mine.sum())
        assert (
            t.entropy[chosen & mine].min() >= t.entropy[mine & ~chosen].max()
            if (mine & ~chosen).any()
            else True
        )


def test_the_lowest_are_those_that_a_whole_sort_puts_first_ties_by_uid() -> None:
    """Keys of few values, NaN and infinity among them, and uids in no order."""
    made = np.random.default_rng(0)
    for n in (1, 2, 7, 40):
        whole = tokens(masked_out=()).take(torch.tensor([0] * n))
        for share in (1e-9, 0.1, 0.5, 1.0):
            uid = torch.from_numpy(made.permutation(len(whole.uid)))
            key = torch.from_numpy(made.choice([0.0, -0.0, 1.0, 2.0, np.inf, np.nan], len(uid)))
            among = torch.from_numpy(made.random(len(uid)) < 0.7)
            count = max(1, math.floor(share * len(key)))
            order = np.lexsort((uid.numpy(), key.masked_fill(~among, torch.inf).numpy()))[:count]
            wanted = torch.zeros(len(uid), dtype=torch.bool)
            wanted[torch.from_numpy(order)] = True
            found = select._lowest(key, among, share, replace(whole, uid=uid))
            assert torch.equal(found, wanted & among), (n, share)
