"""What lies behind the means of a step, against numbers worked out by hand; every metric is documented."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from entroray.metrics import step_details, step_metrics
from entroray.metrics.by_domain import judged_metrics
from entroray.metrics.calibration import brier, calibration, consistency, expected_error
from entroray.metrics.catalogue import PAGE, expand_names, family_metrics, read_catalogue, render_page
from entroray.metrics.diversity import answers, distinct, pass_at
from entroray.metrics.update import SUMS, update_metrics, update_sums
from entroray.types import MaskReason, Span
from entroray.workers.roles import _summary
from tests.documented import matches
from tests.unit.test_statistics import group, tokens_of

LN2 = math.log(2)


def written(*ids, answers=None, correct=None):
    """A group whose responses are `ids`."""
    g = group([len(i) for i in ids], correct or [0] * len(ids))
    rollouts = [replace(r, token_ids=np.array(i, np.int32)) for r, i in zip(g.rollouts, ids, strict=True)]
    named = zip(g.verdicts, answers or [None] * len(ids), strict=True)
    return replace(g, rollouts=tuple(rollouts), verdicts=tuple(replace(v, answer=a) for v, a in named))


def test_distinct_n_is_counted_within_a_group_and_never_across_responses():
    groups = [written([1, 2, 1], [1, 2]), written([2, 1], [2, 1])]
    found = distinct(groups)
    assert found["distinct/1"] == pytest.approx((2 / 5 + 2 / 4) / 2)
    assert found["distinct/2"] == pytest.approx((2 / 3 + 1 / 2) / 2)  # (1,2) (2,1) | (1,2); 2 x (2,1)
    assert found["distinct/3"] == 1.0 and "repetition/share" not in found
    looping = distinct([written([7] * 7, [1, 2, 3, 4])])
    assert looping["repetition/share"] == pytest.approx((3 / 4 + 0) / 2)


def test_answers_and_pass_at_k():
    groups = [
        written([1], [1], [1], [1], answers=["3", "3", "4", None], correct=[1, 1, 0, 0]),
        written([1], [1], [1], [1], correct=[0, 0, 0, 0]),
    ]
    found = answers(groups)
    assert found["answers/missing"] == 5 / 8 and found["answers/distinct"] == 2
    assert found["answers/entropy"] == pytest.approx(math.log(3) - 2 / 3 * LN2)
    # two of four right: no right one among two drawn in 1 of 6 ways
    assert pass_at(groups) == pytest.approx({"pass/1": 0.25, "pass/2": 5 / 12, "pass/4": 0.5})


def changed(g, at, **changes):
    """The group with its rollout at `at` changed."""
    rollouts = [replace(r, **changes) if i == at else r for i, r in enumerate(g.rollouts)]
    return replace(g, rollouts=tuple(rollouts))


def test_n_grams_are_of_tokens_that_the_policy_drew_there():
    """A branch's first two tokens are its parent's; a tool says 9 9 amid what the second response wrote."""
    prefix, tool = (Span(0, 2, MaskReason.PREFIX),), (Span(2, 4, MaskReason.TOOL),)
    branched = changed(written([1, 2, 3], [1, 2, 4]), 1, spans=prefix, parent=0)
    assert distinct([branched]) == {"distinct/1": 1.0, "distinct/2": 1.0, "distinct/3": 1.0}
    told = distinct([changed(written([7, 8, 9, 9, 7, 8]), 0, spans=tool)])
    assert told == {"distinct/1": 2 / 4, "distinct/2": 1 / 2}, "nothing across what the tool said"
    again = distinct([changed(written([5] * 5, [1, 1, 9, 9, 1, 1, 1, 1]), 1, spans=tool)])
    assert again["repetition/share"] == (1 / 2 + 0) / 2
    assert distinct([changed(written([1, 2]), 0, spans=prefix)]) == {}


def test_pass_at_k_is_of_independent_draws_alone():
    four = written([1], [1], [1], [1], correct=[1, 0, 0, 1])
    roots = changed(changed(four, 2, parent=0), 3, parent=1)
    assert pass_at([roots]) == {"pass/1": 0.5, "pass/2": 1.0}, "two roots, one right"
    forced = Span(0, 1, MaskReason.FORCED)
    everywhere = replace(four, rollouts=tuple(replace(r, spans=(forced,)) for r in four.rollouts))
    assert pass_at([everywhere]) == {} and pass_at([four, everywhere]) == pass_at([four])
    first = written([1], [1], correct=[0, 0])
    again = replace(four, earlier=(first,))
    assert again.draws == (first, again)
    assert pass_at(again.draws) == {"pass/1": 0.0, "pass/2": 0.0}, "the second was made as it failed"
    rescued = [*again.draws, *[written([1], [1], correct=[1, 1])] * 3]
    assert pass_at(rescued)["pass/1"] == 0.75, "four prompts, one failed: it counts once"
    assert pass_at([replace(four, abandoned=four.rollouts[:1])]) == {}, "the short ones alone finished"


def test_what_is_replayed_has_no_say_in_answers_and_calibration():
    three = written([1], [1], [1], answers=["3", "4", "4"], correct=[1, 0, 0])
    old = changed(three, 0, replayed=True)
    assert answers([old]) == {"answers/missing": 0.0, "answers/distinct": 1.0, "answers/entropy": 0.0}
    told = calibration([old], np.log([1.0, 0.5, 0.5]))
    assert told["calibration/ece_consistency"] == 1.0 and told["calibration/brier_logprob"] == 0.25


def test_calibration_by_hand():
    sure, right = np.array([1.0, 1.0, 0.5, 0.51]), np.array([1.0, 0.0, 1.0, 0.0])
    # bins of 1/15: {1, 1} off by 1 in all, {0.5, 0.51} by 0.01
    assert expected_error(sure, right) == pytest.approx(1.01 / 4)
    assert brier(sure, right) == pytest.approx((0 + 1 + 0.25 + 0.2601) / 4)
    sure_of = consistency(written([1], [1], [1], [1], answers=["3", "3", "4", None]))
    assert sure_of[:3] == [0.5, 0.5, 0.25] and math.isnan(sure_of[3])


def test_a_policy_that_stops_answering_is_not_called_calibrated():
    silent = [written(*[[1]] * 8, answers=[None] * 8, correct=[0] * 8)]
    wrong = [written(*[[1]] * 4, answers=["3", "3", None, None], correct=[0, 0, 0, 0])]
    sure = np.log(np.full(12, 0.9))
    assert "calibration/ece_consistency" not in calibration(silent, sure[:8])
    assert calibration(silent + wrong, sure)["calibration/ece_consistency"] == 0.5, "of the two that answered"
    assert calibration(silent + wrong, sure)["calibration/ece_logprob"] == pytest.approx(0.9)
    alone = [written([1], answers=["3"], correct=[1])]
    assert calibration(alone, sure[:1]).keys() == {"calibration/ece_logprob", "calibration/brier_logprob"}


def step():
    """Two groups of four whose tokens differ in all that a metric may look at."""
    groups = [
        written(list(range(10)), [1, 2], [3] * 6, [4], answers=["1", "2", "1", None], correct=[1, 0, 1, 0]),
        written([1] * 5, [2] * 5, [3] * 5, [4] * 5, answers=["1"] * 4, correct=[1, 1, 1, 1]),
    ]
    n = sum(r.length for g in groups for r in g.rollouts)
    rng = np.random.default_rng(0)
    t = tokens_of(groups, rng.random(n).tolist(), rng.choice([-1.0, 0.0, 2.0], n).tolist())
    return groups, replace(t, old_logprobs=torch.from_numpy(np.log(rng.random(n))))


def test_the_metrics_of_a_step_are_exactly_those_documented():
    groups, tokens = step()
    fills = {"<n>": ["1", "2", "4"]}
    described = judged_metrics(groups) | step_metrics(groups, tokens)
    for found, family in ((described, "step"), (step_details(groups, tokens), "details")):
        assert {name for m in family_metrics(family) for name in expand_names(m, fills)} == found.keys()
        assert all(math.isfinite(value) for value in found.values())
    assert not described.keys() & step_details(groups, tokens).keys()
    assert not judged_metrics(groups).keys() & step_metrics(groups, tokens).keys(), "each is computed once"


def test_readme_is_the_table_of_the_catalogue():
    page = PAGE.read_text()
    assert page == render_page(page), "run `python -m entroray.metrics.catalogue`"
    assert all(f"| `{m.name}` | {m.definition} |" in page for m in read_catalogue())


def test_a_definition_needs_no_row_above_it():
    leans = re.compile(r"its |the (same|largest|longest)\b|where |quantile$|all of them|none |drawn |those ")
    assert [m.name for m in read_catalogue() if leans.match(m.definition)] == []


def test_quadrants_deciles_and_covariance_by_hand():
    groups = [written([1, 2, 3, 4], [5], correct=[1, 0])]
    t = tokens_of(groups, [1.0, 1.0, 1.0, 1.0, 1.0], [2.0, 2.0, -1.0, -1.0, 0.0])
    t = replace(t, old_logprobs=torch.tensor([-0.5, -2.0, -0.5, -2.0, -1.0]))
    found = step_details(groups, t)
    assert [found[f"quadrants/e{n}"] for n in (1, 2, 3, 4)] == [0.25] * 4
    # A (ln p + H): 1, -2, -0.5 and 1, so 2 of 4.5; without the second token 2 of 2.5
    assert found["quadrants/lowering"] == pytest.approx(2 / 4.5)
    dropped = step_details(groups, replace(t, scale=torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0])))
    assert dropped["quadrants/lowering"] == pytest.approx(2 / 2.5)
    assert "quadrants/lowering" not in step_details(groups, replace(t, advantages=t.advantages * 0))
    assert found["advantages/zero"] == 0.2
    assert found["entropy/tenth_1"] == 1.0 and "entropy/tenth_2" not in found  # 4 tokens: tenths 1, 3, 6, 8
    assert {"entropy/tenth_3", "entropy/tenth_6", "entropy/tenth_8"} <= found.keys()
    # log p: mean -1.2; A: mean 0.4
    c = [0.7 * 1.6, -0.8 * 1.6, 0.7 * -1.4, -0.8 * -1.4, 0.2 * -0.4]
    assert found["covariance/mean"] == pytest.approx(sum(c) / 5, abs=1e-6)
    assert found["covariance/p50"] == pytest.approx(sorted(c)[2], abs=1e-6)
    assert found["covariance/clippable"] == pytest.approx(2 / 5)


def test_importance_is_learner_over_sampler():
    groups = [group([2, 2], [1, 0])]
    t = tokens_of(groups, [1.0] * 4)
    t = replace(t, old_logprobs=t.behavior_logprobs + torch.tensor([LN2, 0, 0, -LN2]))
    found = step_details(groups, replace(t, correction=torch.tensor([0.0, 1, 1, 1])))
    w = np.array([2, 1, 1, 0.5])
    assert found["importance/mean"] == pytest.approx(w.mean())
    assert found["importance/effective"] == pytest.approx(w.sum() ** 2 / (4 * (w**2).sum()))
    assert found["importance/max"] == pytest.approx(2) and found["importance/zeroed"] == 0.25


def test_what_stands_outside_the_mask_leaves_no_trace():
    groups, clean = step()
    mask = torch.arange(len(clean.row)) % 3 > 0
    dirty = torch.where(mask, 0.0, torch.nan)
    names = ("entropy", "varentropy", "old_logprobs", "advantages")
    spoilt = {name: getattr(clean, name) + dirty for name in names}
    assert step_details(groups, replace(clean, mask=mask, **spoilt)) == step_details(
        groups, replace(clean, mask=mask)
    )


def test_clipped_tokens_are_told_apart_by_side_and_sign():
    groups = [group([4, 2], [1, 0])]
    t = tokens_of(groups, [1.0] * 6, [1.0, 1.0, -1.0, -1.0, 1.0, -1.0])
    live = replace(t, logprobs=t.old_logprobs + torch.tensor([LN2, -LN2, LN2, -LN2, 0.0, LN2]))
    flat = torch.tensor([True, True, True, True, False, False])
    sums = {name: float(x) for name, x in update_sums(live, flat).items()}
    found = update_metrics([sums, sums], 12.0)
    sides = [found[f"update/clip_{s}_{a}"] for s in ("high", "low") for a in ("positive", "negative")]
    assert sides == pytest.approx([1 / 6] * 4)
    assert found["objective/silent_tokens"] == pytest.approx(4 / 6)
    assert found["update/kl"] == pytest.approx((3 * (1 - LN2) + 2 * (-0.5 + LN2)) / 6)
    assert found["update/kl_k1"] == pytest.approx(-LN2 / 6)
    assert all(matches(name, family_metrics("update")) for name in found) and len(found) == 7
    dropped = replace(
        live, scale=torch.tensor([0.0, 1, 1, 1, 1, 1]), correction=torch.tensor([1.0, 0, 1, 1, 1, 1])
    )
    found = update_metrics([{name: float(x) for name, x in update_sums(dropped, flat).items()}], 6.0)
    assert [found[f"update/clip_{s}_positive"] for s in ("high", "low")] == [0, 0], "no weight, no clip"
    assert found["update/clip_high_negative"] == 1 / 6 and found["objective/silent_tokens"] == 4 / 6


def test_what_is_said_of_answers_is_of_every_group_judged():
    kept = written([1], [1], answers=["3", "4"], correct=[1, 0])
    wrong = written([2, 2, 2], [2, 2, 2], answers=["7", None], correct=[0, 0])
    t = tokens_of([kept], [1.0, 1.0])
    assert step_details([kept], t)["pass/2"] == 1.0
    found = step_details([kept], t, [kept, wrong])
    assert (found["pass/1"], found["pass/2"], found["answers/missing"]) == (0.25, 0.5, 0.25)
    assert found["length/wrong"] == pytest.approx(7 / 3)


def test_every_metric_of_an_update_is_documented_and_every_documented_one_there():
    sums = dict.fromkeys(("loss", "tokens", "ratio_max", "entropy", *SUMS), 1.0)
    found = _summary([[sums | {"grad_norm": 1.0, "lr": 1.0, "skipped": 0.0, "rule:clip": 3.0}]])
    assert found.keys() == {m.name for m in family_metrics("update")} | {"objective/clip_tokens"}
