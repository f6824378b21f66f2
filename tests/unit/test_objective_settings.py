"""No setting and no row is there for nothing: each changes the loss, its gradient or what is trained on."""

import pytest
import torch
from torch import Tensor

from entroray.binding import keyword_settings, slot_functions, traits
from entroray.errors import ConfigError
from entroray.objective import build_objective
from entroray.objective.estimator import raw
from entroray.objective.objective import MANY, SLOTS
from entroray.objective.step_statistics import balance
from entroray.types import Tokens
from tests.cases import ROWS, group, outcome, row_in_step, tokens

HERE = __name__.partition(".")[0]
BASE = ROWS["grpo"] | {"keep": {"fn": "informative"}}
ALTERNATIVES = {
    "rewards.soft_overlong": {"buffer": 0.5, "factor": 1.0},
    "estimator.zscore": {"eps": 0.1},
    "estimator.subtree": {"eps": 0.1},
    "estimator.quantile": {"k": 0.9, "eps": 0.1},
    "estimator.raw": {"baseline": 0.5},
    "estimator.constant": {"value": 2.0},
    "shapes.by_sign": {"positive": 0.5, "negative": 0.5},
    "shapes.whiten": {"eps": 0.1},
    "shapes.add_entropy": {"alpha": 0.1, "kappa": 9.0},
    "shapes.surprise_weighted": {"zeta": 0.1},
    "shapes.entropy_band": {"low": 1.5, "high": 2.0},
    "shapes.lean": {"target": 0.2, "gain": 0.5, "integral": 0.1, "clamp": 0.001, "above": 0.3},
    "shapes.self_certainty": {"eps": 0.1},
    "shapes.low_entropy": {"eps": 0.1},
    "shapes.trajectory_likelihood": {"eps": 0.1},
    "scales.selected": {"inside": 0.5, "outside": 0.5},
    "scales.steady": {"minimum": 0.5, "floor": 99.0},
    "correction.truncated_importance": {"cap": 1.1},
    "correction.sequence_product": {"cap": 1.1},
    "correction.sequence_geometric": {"cap": 1.01},
    "correction.icepop": {"low": 1.5, "high": 1.5},
    "correction.sequence_mask": {"low": 1.4, "high": 1.3},
    "ratio.clipped_geometric": {"low": 0.1, "high": 0.1},
    "surrogate.clip": {"low": 0.5, "high": 0.5, "dual": 3.0},
    "surrogate.cispo": {"cap": 2.0, "cap_mode": "one_plus_eps", "floor": 0.5},
    "surrogate.soft_gate": {"rise": 2.0, "fall": 2.0},
    "surrogate.trust_probability": {"low": 0.01, "high": 0.9, "cap": 2.0},
    "surrogate.leaky_clip": {"low": 0.5, "high": 0.5, "leak_low": 0.1, "leak_high": 0.1, "dual": 3.0},
    "surrogate.balanced_clip": {
        "least_low": 0.3, "most_low": 0.9, "least_high": 1.9, "most_high": 9.0, "share": 1.0, "dual": 5.0,
    },
    "surrogate.clip_by_probability": {"low": 0.02, "high": 0.02, "cap": 1.1},
    "surrogate.mirrored_clip": {"confident": 0.7, "hesitant": 1.0, "cap": 1.1},
    "penalties.kl": {"coef": 0.1},
    "penalties.kl_k1": {"coef": 0.1},
    "penalties.kl_k2": {"coef": 0.1},
    "penalties.kl_k3": {"coef": 0.1},
    "penalties.entropy_bonus": {"coef": 0.1, "below": 0.01},
    "penalties.nucleus_entropy_bonus": {"coef": 0.1, "mass": 0.5},
    "penalties.top_entropy_bonus": {"coef": 0.1, "k": 5},
    "penalties.plausible_kl": {"coef": 0.1, "kappa": 0.1},
    "penalties.kl_cov": {"coef": 0.1},
    "select.top_entropy": {"share": 0.5},
    "select.top_entropy_of_rollout": {"share": 0.5},
    "select.top_covariance": {"share": 0.5},
    "select.covariance_band": {"share": 0.1, "low": -1.0, "high": 0.3},
    "select.random_positive": {"share": 0.5},
    "select.low_discriminator": {"mu": 0.1},
    "select.below_expected": {"mu": 1000.0, "share": 0.5},
    "select.rare_but_plausible": {"share": 0.9, "kappa": 0.9},
    "denominator.constant": {"length": 50},
}  # fmt: skip
BETTER_SEEN = {
    "select.covariance_band": {"low": 0.1, "share": 0.9},
    "shapes.entropy_band.low": {"high": 2.0},
    "select.rare_but_plausible": {"share": 0.6, "kappa": 0.01},
    "correction.sequence_mask": {"low": 0.5, "high": 9.0},
    "surrogate.balanced_clip.least_low": {"share": 0.01},
    "surrogate.balanced_clip.least_high": {"share": 0.01},
    "surrogate.balanced_clip.most_low": {"share": 1.0},
    "surrogate.balanced_clip.most_high": {"share": 1.0},
    "surrogate.balanced_clip.share": {"share": 0.01},
}
"""What the others are set to, where the defaults hide a setting's effect on so few tokens."""
ELSEWHERE = {("estimator", "raw", "span"), ("surrogate", "balanced_clip", "stride")}
"""Settings with a test of their own: they refuse, or need a case made for them."""
SETTINGS = [
    (slot, fn, setting)
    for slot, module in SLOTS.items()
    for fn, function in slot_functions(module).items()
    for setting in keyword_settings(function)
    if (slot, fn, setting) not in ELSEWHERE
]


@pytest.mark.parametrize("slot, fn, setting", SETTINGS, ids=lambda x: x)
def test_every_setting_changes_something(slot, fn, setting):
    def row(**change):
        one = {"fn": fn} | ({"length": 100} if (slot, fn) == ("denominator", "constant") else {}) | change
        selecting = {"select": {"fn": f"{__name__}.odd"}} if slot == "scales" else {}
        selecting |= {"scales": [{"fn": "selected"}]} if slot == "select" else {}
        if traits(slot_functions(SLOTS[slot])[fn]).reads_selected:
            selecting = {"select": {"fn": f"{__name__}.odd"}}
        seen = BETTER_SEEN.get(f"{slot}.{fn}.{setting}", BETTER_SEEN.get(f"{slot}.{fn}", {}))
        one = {"fn": fn} | seen | one | change
        chosen = {slot: [one] if SLOTS[slot] in MANY else one}
        return outcome(build_objective(BASE | selecting | chosen, packages=[HERE]))

    assert row(**{setting: ALTERNATIVES[f"{slot}.{fn}"][setting]}) != row()


def odd(t: Tokens) -> Tensor:
    return t.uid % 2 == 1


def test_every_row_differs_from_every_other():
    outcomes = {name: outcome(row_in_step(name, 60)) for name in ROWS}  # the step that `outcome` is in
    assert len(set(map(tuple, outcomes.values()))) == len(ROWS)


def test_a_reward_outside_its_declared_span_is_refused():
    assert raw(group(rewards=(1, 0, 0, 1)), span="0..1").tolist() == [1, 0, 0, 1]
    with pytest.raises(ConfigError, match=r"`raw` .* 0\.\.1 .*-1\.0.*objective\.estimator\.span"):
        raw(group(rewards=(1, -1, -1, 1)), span="0..1")
    assert raw(group(rewards=(1, -1, -1, 1)), span="-1..1").tolist() == [1, -1, -1, 1]


@pytest.mark.parametrize(
    ("share", "stride", "ends"),
    [(0.5, 0.05, (0.7, 1.2)), (0.5, 0.17, (0.77, 1.2)), (0.01, 0.05, (0.6, 1.2)), (1.0, 0.05, (0.8, 1.2)),
     (0.57, 0.05, (0.7, 1.2)), (0.65, 0.05, (0.75, 1.2))],
)  # fmt: skip
def test_bapo_climbs_until_reinforced_tokens_carry_their_share(share, stride, ends):
    """Two reinforced tokens at r = 1 pull 2.0; punished ones at 0.61, 0.66, 0.71 and 0.76 push."""
    ratio = torch.tensor([1.0, 1.0, 0.61, 0.66, 0.71, 0.76]).double()
    advantage = torch.tensor([1.0, 1, -1, -1, -1, -1]).double()
    t = tokens(masked_out=()).take(torch.tensor([0, 1]))
    columns = {"behavior_logprobs": t.logprobs - ratio.log(), "advantages": advantage}
    bounds = {"least_low": 0.6, "most_low": 0.8, "least_high": 1.2, "most_high": 2.0}
    found = balance(Tokens(**vars(t) | columns), share=share, stride=stride, **bounds)
    assert found == pytest.approx(ends)
