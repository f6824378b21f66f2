"""Every shipped row on hand-made tokens: the published gradient, however the step is cut."""

import pickle
from collections.abc import Callable
from dataclasses import fields, replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from entroray.errors import ConfigError
from entroray.objective import Objective, build, count, silent
from entroray.objective.bind import keywords, menu
from entroray.objective.equation import MANY, SLOTS
from entroray.types import Counts, Tokens
from tests.cases import FULL, ROWS, SPECS, WHOLE, N, close, gate, group, live, tokens, update

torch.set_num_threads(1)  # these tensors are tiny

HERE = __name__.partition(".")[0]
every_spec = pytest.mark.parametrize("name", SPECS)


def test_off_policy_case_reaches_every_bound():
    t = tokens()
    r = (t.logprobs - t.old_logprobs).exp()
    for a in (t.advantages > 0, t.advantages < 0):
        assert (r[a] < 0.8).any() and (r[a] > 1.28).any()
    assert (r[t.advantages < 0] > 10).any()


@every_spec
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_change_nothing(name, ranks):
    objective = build(SPECS[name])
    t = objective.credit(tokens())
    cuts = [list(range(6))[rank::ranks] for rank in range(ranks)]
    for got, expected in zip(update(objective, t, cuts), update(objective, t, WHOLE), strict=True):
        assert close(got, expected)


@every_spec
@settings(max_examples=10, deadline=None)
@given(order=st.permutations(range(6)), ends=st.sets(st.integers(1, 5)))
def test_micro_batches_and_row_order_change_nothing(name, order, ends):
    objective = build(SPECS[name])
    t = objective.credit(tokens())
    cuts = [order[a:b] for a, b in pairwise([0, *sorted(ends), 6])]
    for got, expected in zip(update(objective, t, cuts), update(objective, t, WHOLE), strict=True):
        assert close(got, expected)
    assert_same(objective.credit(tokens().take(torch.tensor(order))), t.take(torch.tensor(order)))


def assert_same(a: Tokens, b: Tokens) -> None:
    for f in fields(Tokens):
        x, y = getattr(a, f.name), getattr(b, f.name)
        if isinstance(x, Tensor):
            assert close(x, y), f.name
        else:
            assert x == y, f.name


@every_spec
def test_nothing_outside_the_mask_leaves_a_trace(name):
    objective = build(SPECS[name])
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
    "no_advantage": replace(tokens(), advantages=torch.zeros(N, dtype=torch.float64)),
}


@every_spec
@pytest.mark.parametrize("edge", EDGES)
def test_edges_are_finite(name, edge):
    objective = build(SPECS[name])
    t = live(objective.credit(EDGES[edge]))
    assert objective.denominator(t.counts) > 0
    loss = objective.loss(t) / objective.denominator(t.counts)
    loss.backward()
    assert loss.isfinite() and t.logprobs.grad.isfinite().all()
    if not t.mask.any():
        assert loss == 0 and (t.logprobs.grad == 0).all()


@every_spec
def test_credit_detaches_and_counts(name):
    shapes = [{"fn": f"{__name__}.by_likelihood"}]
    t = build(SPECS[name] | {"shapes": shapes}, packages=[HERE]).credit(live(tokens()))
    assert not any(x.requires_grad for x in (t.advantages, t.scale, t.correction))
    kept = int((t.scale != 0).sum())
    assert t.counts == Counts(tokens=24, kept_tokens=kept, rollouts=6, prompts=3) and kept > 0


def by_likelihood(t: Tokens) -> Tensor:
    return t.advantages * t.logprobs.exp()


def test_kept_tokens_are_those_with_a_scale():
    t = replace(tokens(), scale=torch.where(torch.arange(N) < 6, 0.0, 1.0))
    assert count(t) == Counts(tokens=24, kept_tokens=19, rollouts=6, prompts=3)
    assert count(t.take(torch.tensor([0, 1, 2]))) == Counts(tokens=10, kept_tokens=5, rollouts=3, prompts=2)


def test_denominators():
    counts = Counts(tokens=24, kept_tokens=19, rollouts=6, prompts=3)

    def spec(**choice) -> Callable[[Counts], float]:
        return build(ROWS["grpo"] | {"denominator": choice}).denominator

    assert spec(fn="all_response_tokens")(counts) == 24.0
    assert spec(fn="kept_tokens")(counts) == 19.0
    assert spec(fn="rollouts")(counts) == 6.0
    assert spec(fn="prompts")(counts) == 3.0
    assert spec(fn="constant", length=100)(counts) == 600.0
    for name in menu(SLOTS["denominator"]):
        length = {"length": 100} if name == "constant" else {}
        assert spec(fn=name, **length)(Counts(0, 0, 0, 0)) == 1.0


BASE = ROWS["grpo"] | {"keep": {"fn": "informative"}}
ALTERNATIVES = {
    "rewards.soft_overlong": {"buffer": 0.5, "factor": 0.5},
    "estimator.zscore": {"eps": 0.1},
    "estimator.raw": {"baseline": 0.5},
    "estimator.constant": {"value": 2.0},
    "shapes.by_sign": {"positive": 0.5, "negative": 0.5},
    "scales.selected": {"inside": 0.5, "outside": 0.5},
    "correction.truncated_importance": {"cap": 1.1},
    "surrogate.clip": {"low": 0.5, "high": 0.5, "dual": 3.0},
    "surrogate.cispo": {"cap": 2.0, "cap_mode": "one_plus_eps", "floor": 0.5},
    "penalties.kl": {"coef": 0.1},
    "penalties.kl_k3": {"coef": 0.1},
    "penalties.entropy_bonus": {"coef": 0.1},
    "penalties.kl_cov": {"coef": 0.1},
    "ratio.clipped_geometric": {"bound": 0.1},
    "surrogate.clip_with_entropy": {"low": 0.5, "high": 0.5, "alpha": 0.1, "kappa": 5.0},
    "surrogate.gradient_preserving": {
        **{"low": 0.5, "high": 0.5, "tail_low": 0.1, "tail_high": 0.5, "dual": 3.0}
    },
    "surrogate.dynamic_clip": {"low": 0.02, "high": 0.5, "cap": 1.1},
    "estimator.quantile": {"level": 0.9, "eps": 0.1},
    "shapes.whiten": {"eps": 0.1},
    "scales.steer": {"floor": 0.5, "least": 100.0},
    "select.confident_mistakes": {"deviations": 0.1},
    "select.top_entropy": {"share": 0.5},
    "select.top_covariance": {"share": 0.5},
    "select.covariance_band": {"share": 0.5, "low": -1.0, "high": 1.1},
    "select.random_positive": {"share": 0.5},
    "denominator.constant": {"length": 50},
}
SETTINGS = [
    (slot, fn, setting)
    for slot, module in SLOTS.items()
    for fn, function in menu(module).items()
    for setting in keywords(function)
]


def outcome(objective: Objective) -> list[float]:
    """Everything a row decides, on one fixed case."""
    t, g = objective.credit(replace(tokens(), selected=tokens().uid % 3 == 0)), group()
    numbers = [objective.shape_rewards(g), objective.estimate(g), *update(objective, t, WHOLE)]
    numbers += [t.scale, t.correction, torch.tensor([objective.keep(group(correct=(1, 1, 1, 1)))])]
    flat = torch.cat([x.double().reshape(-1) for x in numbers])
    assert flat.isfinite().all()
    return flat.tolist()


@pytest.mark.parametrize("slot, fn, setting", SETTINGS, ids=lambda x: x)
def test_every_setting_changes_something(slot, fn, setting):
    def row(**change):
        one = {"fn": fn} | ({"length": 100} if (slot, fn) == ("denominator", "constant") else {}) | change
        selecting = {"select": {"fn": f"{__name__}.odd"}} if slot == "scales" else {}
        selecting |= {"scales": [{"fn": "selected"}]} if slot == "select" else {}
        chosen = {slot: [one] if SLOTS[slot] in MANY else one}
        return outcome(build(BASE | selecting | chosen, packages=[HERE]))

    assert row(**{setting: ALTERNATIVES[f"{slot}.{fn}"][setting]}) != row()


def odd(t: Tokens) -> Tensor:
    return t.uid % 2 == 1


def test_every_row_differs_from_every_other():
    outcomes = {name: outcome(build(spec)) for name, spec in ROWS.items()}
    assert len(set(map(tuple, outcomes.values()))) == len(ROWS)


@every_spec
def test_rows_cross_process_boundaries(name):
    objective = build(SPECS[name])
    copy = pickle.loads(pickle.dumps(objective))
    assert copy.describe() == objective.describe() and copy.needs == objective.needs
    assert outcome(copy) == outcome(objective)


def test_rows_spell_every_slot_so_that_overrides_need_no_plus():
    for name, spec in ROWS.items():
        assert set(spec) == set(SLOTS), name
        assert build(spec).needs <= {"entropy_grad", "whole_step"}, name


def test_needs_are_declared_and_refused_by_name():
    objective = build(FULL)
    assert objective.needs == {"ref_logprobs", "entropy_grad"}
    t = replace(tokens(), ref_logprobs=None)
    objective.credit(t)
    with pytest.raises(ConfigError, match=r"`kl` needs `ref_logprobs`"):
        objective.loss(t)


def test_silent_tokens_are_the_clipped_ones():
    objective, t = build(ROWS["grpo"]), tokens()
    t = live(objective.credit(t))
    r = (t.logprobs - t.old_logprobs).exp()
    expected = t.mask & (t.advantages != 0) & ~gate(t.advantages, r, 0.2, 0.2)
    assert torch.equal(silent(objective, t), expected) and 0 < expected.sum() < N
    with torch.no_grad():
        assert torch.equal(silent(objective, t), expected)
    assert t.logprobs.grad is None


def test_silent_tokens_of_other_rows():
    for name, count_of_silent in {"cispo": 0, "rloo": 0, "supervised": 0}.items():
        objective = build(ROWS[name])
        assert silent(objective, objective.credit(tokens())).sum() == count_of_silent
    dropped = build(ROWS["cispo"] | {"scales": [{"fn": "selected", "inside": 0.0}]})
    t = dropped.credit(tokens())
    assert torch.equal(silent(dropped, t), t.mask & (t.advantages != 0))
