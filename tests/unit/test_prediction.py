"""First-order predictions against real softmaxes, the law against planted values, both in the true driver."""

import asyncio
import json
import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from entroray.metrics import token_entropy
from entroray.metrics.catalogue import expand_names, family_metrics
from entroray.metrics.prediction import (
    COLLISION,
    compare_forms,
    exact,
    natural,
    prediction_record,
    proxy,
    rank_correlation,
    slope,
)
from entroray.metrics.reward_entropy_law import fit_law, student_quantile
from entroray.objective import build_objective, gradient_weight
from entroray.train.diagnostics import DiagnosticsSchedule
from entroray.train.prompt_entropy import OUTSIDE, PromptEntropy, build_prompt_entropy
from entroray.types import Prompt
from tests.documented import IN_A_RUN, matches
from tests.toy import ToyWorld, driver
from tests.unit.test_statistics import group, tokens_of

STATES, OUTCOMES = 40, 6
ROW = Path(__file__).parents[2] / "conf" / "objective" / "grpo.yaml"


def table():
    """Logits of as many states as tokens, one sampled outcome of each, and what a learner would report."""
    g = torch.Generator().manual_seed(1)
    z = torch.randn(STATES, OUTCOMES, generator=g, dtype=torch.float64) * 1.5
    p = z.softmax(-1)
    a = torch.multinomial(p, 1, generator=g).squeeze(-1)
    entropy, _ = token_entropy(z, 1.0)
    advantages = torch.randn(STATES, generator=g, dtype=torch.float64)
    t = tokens_of([group([STATES], [1])], entropy.tolist(), advantages.tolist())
    collision = (p**2 * (p.log() + entropy[:, None])).sum(-1)
    logp = p.log().gather(-1, a[:, None]).squeeze(-1)
    return z, a, replace(t, old_logprobs=logp, logprobs=logp, extra={COLLISION: collision})


def steps(z, a, t):
    """What each form supposes a step of size 1 to do to the logits."""
    chosen = torch.nn.functional.one_hot(a, OUTCOMES).double()
    p, advantage = z.softmax(-1), t.advantages[:, None]
    return {exact: advantage * (chosen - p), natural: advantage * chosen / p}


@pytest.mark.parametrize("form", [exact, natural], ids=lambda f: f.__name__)
def test_a_form_is_the_first_order_change_of_a_tabular_policy(form):
    z, a, t = table()
    direction, eta = steps(z, a, t)[form], 1e-6
    change = (token_entropy(z + eta * direction, 1.0)[0] - token_entropy(z - eta * direction, 1.0)[0]) / 2
    torch.testing.assert_close(form(t, t.advantages), change / eta, rtol=1e-6, atol=1e-8)


def test_averaged_over_the_policy_the_forms_are_the_theorems_of_the_covariance_paper():
    z, _, t = table()
    p, quality = z.softmax(-1), torch.randn(STATES, OUTCOMES, generator=torch.Generator().manual_seed(2))
    quality = quality.double() - (p * quality).sum(-1, keepdim=True)
    each = []
    for v in range(OUTCOMES):
        seen = replace(t, old_logprobs=p[:, v].log())
        each.append(torch.stack([form(seen, quality[:, v]) for form in (exact, natural)]) * p[:, v])
    mean = lambda x: (p * x).sum(-1)
    cov = lambda x, y: mean(x * y) - mean(x) * mean(y)
    vanilla, natural_gradient = sum(each)
    torch.testing.assert_close(vanilla, -cov(p.log(), p * quality))
    torch.testing.assert_close(natural_gradient, -cov(p.log(), quality))


def test_dropping_the_mean_term_would_not_pass():
    """methods: keeping only S_a is 36 % off for a modal token and 6 times for a rare one."""
    _, _, t = table()
    crude = exact(replace(t, extra={COLLISION: torch.zeros(STATES)}), t.advantages)
    assert (crude / exact(t, t.advantages) - 1).abs().median() > 0.05


@pytest.mark.parametrize("row", ["grpo", "dapo", "dr_grpo", "gspo_token", "cispo", "prorl", "forking_tokens"])
def test_the_exact_form_is_what_a_small_step_on_the_row_itself_does(row):
    """Rollouts of unequal length: under grpo a token's share of the loss is one over its own."""
    lengths, eta = [2, 4, 14, 20], 1e-6
    z, a, t = table()
    groups = [group(lengths, [1, 0, 1, 0])]
    t = replace(tokens_of(groups, t.entropy.tolist(), t.advantages.tolist()), extra=t.extra, uid=t.uid)
    tree = yaml.safe_load((ROW.parent / f"{row}.yaml").read_text())
    objective = build_objective(tree.get("objective", tree) | {"penalties": []})
    z.requires_grad_()
    logp = z.log_softmax(-1).gather(-1, a[:, None]).squeeze(-1)
    scored = replace(t, logprobs=logp, old_logprobs=logp.detach(), ref_logprobs=logp.detach() - 1e-9)
    scored = replace(scored, behavior_logprobs=logp.detach(), scale=torch.linspace(0, 1, STATES).double())
    loss = objective.loss(scored)
    direction = -torch.autograd.grad(loss, z)[0]
    change = [token_entropy(z.detach() + s * eta * direction, 1.0)[0] for s in (1, -1)]
    share = objective.aggregate(scored).mean()
    found = exact(scored, gradient_weight(objective, scored)).detach() * share
    torch.testing.assert_close(found, (change[0] - change[1]) / (2 * eta), rtol=1e-5, atol=1e-8)


def test_scale_and_correction_weigh_in_and_the_mask_keeps_out():
    _, _, t = table()
    row = build_objective(yaml.safe_load(ROW.read_text()))
    half = replace(t, scale=t.scale * 0.25, correction=t.correction * 2)
    torch.testing.assert_close(gradient_weight(row, half), gradient_weight(row, t) / 2)
    mask, a = torch.arange(STATES) < STATES // 2, t.advantages
    nan = torch.where(mask, t.entropy, torch.nan)
    seen = replace(t, mask=mask, entropy=nan)
    assert compare_forms(seen, a, nan + 1)["entropy/realised_change"] == pytest.approx(1)
    assert compare_forms(replace(t, mask=torch.zeros_like(mask)), a, nan) == {}
    assert compare_forms(t, a, nan) == {}, "a change that is no number is no point of the window"
    assert (
        not gradient_weight(row, seen)[~mask].any()
        and not gradient_weight(row, replace(t, mask=torch.zeros_like(mask))).any()
    )
    assert float(proxy(t, a * 0 + 3).abs().max()) < 1e-12


def test_slope_and_rank_over_a_window():
    assert slope([1, 2, 4], [2, 4, 8]) == 2 and slope([0, 0], [1, 1]) == 0
    assert rank_correlation([1, 2, 3, 4], [1, 4, 9, 16]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert (
        rank_correlation([1, 1, 2], [0, 0, 5]) == pytest.approx(1) and rank_correlation([1, 1], [1, 2]) == 0
    )
    z, a, t = table()
    window = []
    for eta in (1e-4, 2e-4, 3e-4, 4e-4):
        after = token_entropy(z + eta * steps(z, a, t)[exact], 1.0)[0]
        window.append(compare_forms(t, t.advantages * eta, after))
    found = prediction_record(window)
    assert found["entropy/prediction_slope_exact"] == pytest.approx(1, abs=0.02)
    assert found["entropy/prediction_rank_exact"] == pytest.approx(1)
    assert window[0]["entropy/prediction_tokens_exact"] > 0.99
    assert prediction_record(window[:3]) == {}


def test_the_law_finds_planted_values_and_its_interval_covers_them():
    draw = random.Random(0)
    inside = 0
    for _ in range(200):
        entropy = [1.0 - 0.02 * i for i in range(30)]
        law = fit_law(entropy, [-0.3 * math.exp(h) + 1.1 + draw.gauss(0, 0.02) for h in entropy])
        inside += law.low < 0.8 < law.high
    assert 180 <= inside <= 199
    clean = fit_law(entropy, [-0.3 * math.exp(h) + 1.1 for h in entropy])
    assert (clean.a, clean.b, clean.ceiling, clean.r2) == pytest.approx((0.3, 1.1, 0.8, 1.0))
    assert clean.high - clean.low < 1e-9
    assert fit_law(entropy[:9], entropy[:9]) is None and fit_law([0.5] * 20, [0.1] * 20) is None


def test_student_s_t_by_the_printed_table():
    assert [student_quantile(n) for n in (8, 10, 30, 1000)] == pytest.approx(
        [2.306, 2.228, 2.0423, 1.9623], abs=2e-3
    )


def test_the_driver_predicts_diagnoses_and_fits_and_all_of_it_is_documented():
    world = ToyWorld(build_objective(yaml.safe_load(ROW.read_text())), lr=0.5)
    d = driver(world, diagnostics=DiagnosticsSchedule(diagnosis=3, prediction=1, window=8, law=10))
    asyncio.run(d.train(12))
    first, last = world.steps[0], world.steps[-1]
    assert "distinct/1" in first and "distinct/1" not in last  # steps 1, 4, 7, 10
    assert "law/ceiling" in last and "law/ceiling" not in first
    assert last["entropy/prediction_rank_exact"] > 0 and last["entropy/prediction_slope_exact"] > 0
    keys = {name for step in world.steps for name in step}
    assert [name for name in keys if not matches(name, IN_A_RUN)] == []
    nobody = {"<rule>": [], "<name>": []}
    rows = family_metrics("step", "run", "prediction", "law")
    listed = {name for m in rows for name in expand_names(m, nobody)}

    of_actors = {name for m in rows if m.name.startswith("idle/") for name in expand_names(m, nobody)}
    missing = {f"sync/probe_{kind}error" for kind in ("", "mean_", "probability_")} | of_actors - {
        "idle/driver"
    }
    assert listed - keys == missing, "tables have no engine to probe, and no actors that rest"


class Table:
    """Scores whose entropy is the token's own number."""

    async def score(self, batch, group, extra=()):
        assert len(group) == batch.num_rows and (batch.prompt_lengths == 1).all()
        return {"entropy": batch.response_ids.astype(np.float32)}


def test_prompts_in_and_out_of_domain_are_read_without_their_first_tokens():
    asked = PromptEntropy([(9, 1, 2), (9, 6)], [(9, 4), (9,)])
    assert asyncio.run(asked.read(Table())) == {"entropy/prompt_in": 3.0, "entropy/prompt_out": 4.0}


def test_the_driver_reads_its_probe_with_every_diagnosis():
    world = ToyWorld(build_objective(yaml.safe_load(ROW.read_text())), lr=0.5)
    heldout = [Prompt(f"h{i}", "", (0, 1), "") for i in range(20)]
    asked = build_prompt_entropy(heldout, lambda text: (0, 2, 3))
    assert len(asked.inside) == len(asked.outside) == len(set(OUTSIDE)) == 16
    asyncio.run(driver(world, diagnostics=DiagnosticsSchedule(diagnosis=2, probe=asked)).train(3))
    read = [{k for k in step if k.startswith("entropy/prompt_")} for step in world.steps]
    assert read[0] == read[2] == {"entropy/prompt_in", "entropy/prompt_out"} and not read[1]
    assert all(matches(name, family_metrics("prompt_entropy")) for name in read[0])


def test_what_the_driver_learnt_of_its_steps_outlives_it():
    world = ToyWorld(build_objective(yaml.safe_load(ROW.read_text())))
    d = driver(world, diagnostics=DiagnosticsSchedule(prediction=1, window=3, law=10))
    asyncio.run(d.train(5))
    state = json.loads(json.dumps(d.state()))
    again = driver(ToyWorld(world.objective), diagnostics=DiagnosticsSchedule(prediction=1, window=3, law=10))

    async def resume() -> None:
        again.restore(state)
        await again.stream.close()

    asyncio.run(resume())
    assert (
        again.state()["diagnostics"] == state["diagnostics"] and len(state["diagnostics"]["predictions"]) == 3
    )
