"""Every shipped row on hand-made tokens: the published gradient, however the step is cut."""

import pickle
from collections.abc import Callable
from dataclasses import fields, replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from entroray.binding import function_name, slot_functions
from entroray.errors import ConfigError
from entroray.objective import activity_inside, build_objective, count_tokens, shapes
from entroray.objective.masking import masked_in
from entroray.objective.objective import SLOTS
from entroray.types import Counts, Tokens
from tests.cases import BUILT, ROWS, STATISTICS, WHOLE, N, close, live, outcome, row_in_step, tokens, update
from tests.published import PUBLISHED, Case, gate

torch.set_num_threads(1)  # these tensors are tiny

HERE = __name__.partition(".")[0]
FULL = ROWS["dapo"] | {
    "shapes": [{"fn": "by_sign"}],
    "scales": [{"fn": "selected", "inside": 0.7}],
    "correction": {"fn": "truncated_importance"},
    "penalties": [{"fn": "kl"}, {"fn": "kl_k3"}, {"fn": "entropy_bonus"}],
    "aggregate": {"fn": "rollout_mean"},
}
"""No published row: every slot filled at once."""
SPECS = ROWS | {"full": FULL}
REPLACES = (shapes.whiten, shapes.self_certainty, shapes.low_entropy, shapes.trajectory_likelihood)
"""Shapes that may turn the sign of A."""
OBJECTIVES = BUILT | {"full": build_objective(FULL)}
every_row = pytest.mark.parametrize("name", ROWS)
every_spec = pytest.mark.parametrize("name", SPECS)


@every_row
@pytest.mark.parametrize("drift", [0.0, 3.0], ids=["on_policy", "off_policy"])
def test_the_gradient_is_the_published_one(name, drift):
    if name not in PUBLISHED:
        pytest.fail(f"{name}: write its coefficient into PUBLISHED")
    objective, t = BUILT[name], tokens(drift=drift)
    _, gradient, _ = update(objective, objective.credit(t), WHOLE)
    expected = torch.where(t.mask, -PUBLISHED[name](Case(name, t)), 0.0)
    assert close(gradient, expected)


@pytest.mark.parametrize("step", [1, 24, 25, 50, 51, 74, 75, 99, 100, 130])
@pytest.mark.parametrize("name", ["positive_reweighting_epoch", "positive_reweighting_stage"])
def test_the_gradient_of_a_scheduled_row_is_the_published_one_in_every_step(name, step):
    objective, t = row_in_step(name, step), tokens(step=step)
    _, gradient, _ = update(objective, objective.credit(t), WHOLE)
    assert close(gradient, torch.where(t.mask, -PUBLISHED[name](Case(name, t)), 0.0))


@every_row
def test_the_sign_of_the_advantage_is_kept_by_all_but_those_that_replace_it(name):
    seen = masked_in(tokens())
    for shape in BUILT[name].shapes:
        kept = (shape(seen) * seen.advantages >= 0).all()
        assert kept or shape.func in REPLACES, f"{function_name(shape)} turns a sign"


def test_the_gradient_of_all_slots_at_once():
    objective, t = build_objective(FULL), tokens()
    _, gradient, entropy_gradient = update(objective, objective.credit(t), WHOLE)
    n = torch.tensor([float(sum(t.mask[t.row == row])) for row in t.row]).double()
    a = torch.where(t.advantages > 0, 0.1 * t.advantages, t.advantages)
    r, rho = ((x - y).exp() for x, y in ((t.logprobs, t.old_logprobs), (t.old_logprobs, t.behavior_logprobs)))
    x = t.logprobs - t.ref_logprobs
    policy = rho.clamp(max=2.0) * 0.7 * r * a * gate(a, r, 0.2, 0.28, 10.0)
    expected = (-policy + 0.04 * x + 0.04 * (1 - torch.exp(-x))) / n / 24
    assert close(gradient, torch.where(t.mask, expected, 0.0))
    assert close(entropy_gradient, torch.where(t.mask, -0.001 / n / 24, 0.0))
    assert (rho[t.mask] > 2).any() and (rho[t.mask] < 2).any()


def test_off_policy_case_reaches_every_bound():
    t = tokens()
    r = (t.logprobs - t.old_logprobs).exp()
    for a in (t.advantages > 0, t.advantages < 0):
        assert (r[a] < 0.8).any() and (r[a] > 1.28).any()
    assert (r[t.advantages < 0] > 10).any()


ORDERS = ([5, 0, 3, 1, 4, 2], [2, 1, 0, 5, 4, 3], [0, 1, 2, 3, 4, 5])
CUTS = ([0, 1, 3, 6], [0, 2, 3, 4, 5, 6], [0, 6])


@every_spec
def test_neither_ranks_nor_micro_batches_nor_row_order_change_anything(name):
    objective, whole = OBJECTIVES[name], tokens()
    t = objective.credit(whole)
    expected = update(objective, t, WHOLE)
    by_rank = [[list(range(6))[rank::ranks] for rank in range(ranks)] for ranks in (2, 4)]
    by_size = [[order[a:b] for a, b in pairwise(cut)] for order, cut in zip(ORDERS, CUTS, strict=True)]
    for cuts in by_rank + by_size:
        for got, wanted in zip(update(objective, t, cuts), expected, strict=True):
            assert close(got, wanted)
    for order in ORDERS[:2]:
        rows = torch.tensor(order)
        assert_same(objective.credit(whole.take(rows)), t.take(rows))


def assert_same(a: Tokens, b: Tokens) -> None:
    assert a.extra.keys() == b.extra.keys()
    assert all(close(a.extra[name], b.extra[name]) for name in a.extra)
    for f in (f for f in fields(Tokens) if f.name != "extra"):
        x, y = getattr(a, f.name), getattr(b, f.name)
        if isinstance(x, Tensor):
            assert close(x, y), f.name
        else:
            assert x == y, f.name


@every_spec
def test_nothing_outside_the_mask_leaves_a_trace(name):
    objective = OBJECTIVES[name]
    holes = (0.0, torch.nan, -torch.inf)
    results = [update(objective, objective.credit(tokens(hole=h)), WHOLE) for h in holes]
    mask = tokens().mask
    for loss, *gradients in results:
        assert torch.equal(loss, results[0][0])
        for gradient, clean in zip(gradients, results[0][1:], strict=True):
            assert torch.equal(gradient, clean) and (gradient[~mask] == 0).all()
    credited = objective.credit(tokens())
    for column in (credited.advantages, credited.scale, credited.correction):
        assert (column[~mask] == 0).all()
    assert torch.equal(credited.logprobs.isnan(), ~mask)


def impossible(t: Tokens, *names: str) -> Tokens:
    return replace(t, **{n: torch.where(t.uid == 12, -torch.inf, getattr(t, n)) for n in names})


EDGES = {
    "new_impossible": impossible(tokens(), "logprobs"),
    "old_impossible": impossible(tokens(), "old_logprobs", "ref_logprobs"),
    "all_impossible": impossible(tokens(), "logprobs", "old_logprobs", "behavior_logprobs", "ref_logprobs"),
    "sampler_impossible": impossible(tokens(), "behavior_logprobs"),
    "empty_mask": tokens(masked_out=tuple(range(N))),
    "one_token": tokens(masked_out=tuple(i for i in range(N) if i != 12)),
    "one_row_of_one_token": tokens().take(torch.tensor([1])),
    "no_rows": tokens().take(torch.tensor([], dtype=torch.long)),
    "one_hot": replace(
        tokens(), **dict.fromkeys(("logprobs", "old_logprobs", "entropy"), torch.zeros(N).double())
    ),
    "no_advantage": replace(tokens(), advantages=torch.zeros(N, dtype=torch.float64)),
}


@every_spec
def test_edges_are_finite(name):
    objective = OBJECTIVES[name]
    for edge, case in EDGES.items():
        t = live(objective.credit(case))
        assert objective.denominator(t.counts) > 0
        loss = objective.loss(t) / objective.denominator(t.counts)
        loss.backward()
        assert loss.isfinite() and t.logprobs.grad.isfinite().all(), edge
        if not t.mask.any():
            assert loss == 0 and (t.logprobs.grad == 0).all(), edge


@every_spec
def test_credit_detaches_and_counts(name):
    shapes = [{"fn": f"{__name__}.by_likelihood"}]
    t = build_objective(SPECS[name] | {"shapes": shapes}, packages=[HERE]).credit(live(tokens()))
    assert not any(x.requires_grad for x in (t.advantages, t.scale, t.correction))
    kept = int((t.scale != 0).sum())
    assert t.counts == Counts(tokens=24, kept_tokens=kept, rollouts=6, prompts=3) and kept > 0


def by_likelihood(t: Tokens) -> Tensor:
    return t.advantages * t.logprobs.exp()


def test_kept_tokens_are_those_with_a_scale():
    t = replace(tokens(), scale=torch.where(torch.arange(N) < 6, 0.0, 1.0))
    assert count_tokens(t) == Counts(tokens=24, kept_tokens=19, rollouts=6, prompts=3)
    assert count_tokens(t.take(torch.tensor([0, 1, 2]))) == Counts(
        tokens=10, kept_tokens=5, rollouts=3, prompts=2
    )


def test_denominators():
    counts = Counts(tokens=24, kept_tokens=19, rollouts=6, prompts=3)

    def spec(**choice) -> Callable[[Counts], float]:
        return build_objective(ROWS["grpo"] | {"denominator": choice}).denominator

    assert spec(fn="all_response_tokens")(counts) == 24.0
    assert spec(fn="kept_tokens")(counts) == 19.0
    assert spec(fn="rollouts")(counts) == 6.0
    assert spec(fn="prompts")(counts) == 3.0
    assert spec(fn="constant", length=100)(counts) == 600.0
    for name in slot_functions(SLOTS["denominator"]):
        length = {"length": 100} if name == "constant" else {}
        assert spec(fn=name, **length)(Counts(0, 0, 0, 0)) == 1.0


@every_spec
def test_rows_cross_process_boundaries(name):
    objective = OBJECTIVES[name]
    copy = pickle.loads(pickle.dumps(objective))
    assert copy.describe() == objective.describe() and copy.needs == objective.needs
    assert outcome(copy) == outcome(objective)


def test_rows_spell_every_slot_so_that_overrides_need_no_plus():
    for name, spec in ROWS.items():
        assert set(spec) == set(SLOTS), name
        assert build_objective(spec).needs <= {"entropy_grad", "whole_step", "ref_logprobs", *STATISTICS}, (
            name
        )


def test_needs_are_declared_and_refused_by_name():
    objective = build_objective(FULL)
    assert objective.needs == {"ref_logprobs", "entropy_grad", "whole_step"}
    t = replace(tokens(), ref_logprobs=None)
    objective.credit(t)
    with pytest.raises(ConfigError, match=r"`kl` .*`ref_logprobs`.*`Objective\.needs`"):
        objective.loss(t)


def test_silent_tokens_are_the_clipped_ones():
    objective, t = build_objective(ROWS["grpo"]), tokens()
    t = live(objective.credit(t))
    r = (t.logprobs - t.old_logprobs).exp()
    expected = t.mask & (t.advantages != 0) & ~gate(t.advantages, r, 0.2, 0.2)
    assert torch.equal(activity_inside(objective, t)[0], expected) and 0 < expected.sum() < N
    with torch.no_grad():
        assert torch.equal(activity_inside(objective, t)[0], expected)
    assert t.logprobs.grad is None


def test_a_penalty_hides_no_clipped_token():
    plain = ROWS["grpo"]
    t = live(build_objective(plain).credit(tokens()))
    clipped = activity_inside(build_objective(plain), t)[0]
    pulls = [{"fn": "kl_k3", "coef": 0.04}, {"fn": "entropy_bonus", "coef": 0.01}]
    held = build_objective(plain | {"penalties": pulls})
    t = replace(t, ref_logprobs=t.old_logprobs - 0.1)
    assert torch.equal(activity_inside(held, t)[0], clipped) and clipped.any()


def test_silent_tokens_of_other_rows():
    for name, count_of_silent in {"cispo": 0, "rloo": 0, "supervised": 0}.items():
        objective = BUILT[name]
        assert activity_inside(objective, objective.credit(tokens()))[0].sum() == count_of_silent
    dropped = build_objective(ROWS["cispo"] | {"scales": [{"fn": "selected", "inside": 0.0}]})
    t = dropped.credit(tokens())
    assert torch.equal(activity_inside(dropped, t)[0], t.mask & (t.advantages != 0))
