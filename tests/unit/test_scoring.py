"""Functions read the scored columns that they declare, and a step is scored first only if one reads any."""

import asyncio
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from entroray.binding import (
    COLUMNS,
    bind,
    declare,
    effective_settings,
    keyword_settings,
    slot_functions,
    traits,
)
from entroray.metrics import update
from entroray.objective import (
    build_objective,
    corrected,
    correction,
    scales,
    select,
    shapes,
    why_scored,
)
from entroray.objective.objective import before
from entroray.objective.scoring import corrects_inside, scores_read
from entroray.train.batching import unknown_scores
from entroray.train.diagnostics import DiagnosticsSchedule
from entroray.types import Batch, Tokens
from entroray.wiring.objective import remark_lines
from entroray.wiring.parts import build_parts
from entroray.workers.roles import LearnerRole
from tests.cases import BUILT, ROWS, SPARE, close, live, tokens
from tests.composed import configured
from tests.toy import ToyWorld, driver

WHOLE_STEP = (shapes, select, scales, correction)
FUNCTIONS = {f"{m.__name__}.{name}": fn for m in WHOLE_STEP for name, fn in slot_functions(m).items()}
INSIDE = [choice for o in BUILT.values() for choice in (o.surrogate, *o.penalties)]
STATISTICS = {name: (fn, choice) for choice in INSIDE for name, fn in before(choice).items()}
ACTING = {"share": 0.3, "mu": 0.1, "above": 0.3}
"""Settings at which a function acts on some of these tokens and leaves others."""
SCORED = {
    "adaptive_entropy": "`mean_entropy` (entropy)",
    "aspo": "`top_entropy_of_rollout` (entropy)",
    "bapo": "`balanced_low` (logprobs), `balanced_high` (logprobs)",
    "clip_b": "`low_discriminator` (entropy, logprobs)",
    "clip_cov": "`covariance_band` (logprobs)",
    "clip_v": "`below_expected` (entropy, logprobs, mean_discriminator)",
    "entrocraft_band": "`entropy_band` (entropy)",
    "entropic_pi": "`lean` (entropy, logprobs)",
    "forking_tokens": "`top_entropy` (entropy)",
    "kl_cov": "`top_covariance` (logprobs)",
    "lp_reg": "`rare_but_plausible` (max_logprob, old_logprobs)",
    "raise_and_restrain": "`covariance_band` (logprobs)",
    "self_certainty": "`self_certainty` (mean_logprob)",
    "steer": "`steady` (entropy, logprobs)",
    "token_entropy": "`low_entropy` (entropy)",
    "trajectory_entropy": "`trajectory_likelihood` (old_logprobs)",
}
"""Rows that are scored before an only update, and for what; no other is."""


def at_start(**kind) -> Tokens:
    """The step as `credit` sees it: nothing has moved."""
    t = tokens(**kind)
    uneven = t.advantages * (1 + 0.1 * torch.sin(torch.arange(len(t.row)).double()))
    return replace(t, advantages=uneven, logprobs=t.old_logprobs, extra={**t.extra, **SPARE})


def poisoned(t: Tokens, kept: frozenset[str]) -> Tokens:
    """`t` with NaN in every scored column but those `kept`."""
    nan = torch.full_like(t.old_logprobs, torch.nan)
    extra = {name: x if name in kept else nan for name, x in t.extra.items()}
    return replace(t, **dict.fromkeys(COLUMNS - kept, nan), extra=extra)


def bound(fn) -> partial:
    """`fn` with settings at which it acts."""
    band = {"low": -0.5, "high": 0.5} if fn is select.covariance_band else {}
    return partial(fn, **{k: v for k, v in ACTING.items() if k in keyword_settings(fn)}, **band)


def same(a, b) -> bool:
    return torch.equal(a.nan_to_num(9e9), b.nan_to_num(9e9))


def reads(fn, **settings) -> frozenset[str]:
    named = {n.format(**settings) for n in traits(fn).needs}
    return traits(fn).reads | named


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_of_the_whole_step_reads_the_columns_that_it_declares_and_no_other(name):
    fn, t = bound(FUNCTIONS[name]), at_start(masked_out=())
    declared = reads(fn.func)
    assert same(fn(t), fn(poisoned(t, declared)))
    for column in declared - {"whole_step"}:
        assert not same(fn(t), fn(poisoned(t, (COLUMNS | t.extra.keys()) - {column}))), column


@pytest.mark.parametrize("name", STATISTICS)
def test_a_step_statistic_reads_no_column_that_it_does_not_declare(name):
    (fn, choice), t = STATISTICS[name], at_start(masked_out=())
    settings = effective_settings(choice)
    assert same(fn(t, **settings), fn(poisoned(t, reads(fn)), **settings))


@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_credited_alike_without_the_columns_that_nothing_reads(name):
    o, t = BUILT[name], at_start()
    kept = frozenset().union(*scores_read(o).values())
    clean, dirty = o.credit(t), o.credit(poisoned(t, kept))
    for field in ("advantages", "selected", "scale"):
        assert same(getattr(clean, field), getattr(dirty, field)), field
    assert clean.counts == dirty.counts
    assert same(corrected(o, clean).correction, clean.correction)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("inside", ["none", "truncated_importance", "sequence_product", "icepop"])
def test_a_row_that_needs_no_scores_has_the_loss_and_gradient_that_it_has_with_them(name, inside):
    """Its own log-probs, detached, are the old ones: r is 1 and the gradient goes through it."""
    spec = ROWS[name] if inside == "none" else ROWS[name] | {"correction": {"fn": inside}}
    o, t = build_objective(spec), at_start()
    if why_scored(o):
        return
    found = []
    for scored in (True, False):
        known = o.credit(t if scored else poisoned(t, frozenset()))
        own = live(replace(known, logprobs=t.logprobs, entropy=t.entropy, extra=t.extra))
        old = own.logprobs.detach().clone()
        own = corrected(o, replace(own, old_logprobs=old, ref_logprobs=t.ref_logprobs))
        o.loss(own).backward()
        found.append((own.logprobs.grad, own.entropy.grad))
    for with_scores_first, without in zip(*found, strict=True):
        assert (with_scores_first is None) == (without is None)
        assert with_scores_first is None or torch.equal(with_scores_first, without)
    assert name in ("supervised",) or found[0][0].abs().sum() > 0


@pytest.mark.parametrize("name", ROWS)
def test_these_rows_are_scored_before_their_update_and_no_other(name):
    assert why_scored(BUILT[name]) == SCORED.get(name, "")


def undeclared(t: Tokens):
    return t.advantages


@declare(reads=["entropy"], live=True)
def lifted(t: Tokens):
    return t.advantages + t.entropy


@declare(reads=())
def by_sign(t: Tokens):
    return torch.where(t.advantages > 0, 1.0, 0.5)


@declare(reads=["old_logprobs"], needs=["whole_step"])
def by_mean(t: Tokens):
    return torch.full_like(t.old_logprobs, float(t.old_logprobs.mean()))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"shapes": (partial(undeclared),)}, f"`undeclared` ({', '.join(sorted(COLUMNS))})"),
        ({"select": partial(select.covariance_band)}, "`covariance_band` (logprobs)"),
        ({"select": partial(select.rare_but_plausible)}, "`rare_but_plausible` (max_logprob, old_logprobs)"),
        ({"scales": (partial(scales.steady),)}, "`steady` (entropy, logprobs)"),
        ({"correction": partial(by_mean)}, "`by_mean` (old_logprobs)"),
        ({"correction": partial(correction.sequence_mask)}, ""),
        ({"shapes": (partial(lifted),)}, ""),
        ({"shapes": (partial(lifted),), "select": partial(select.random_positive)}, "`lifted` (entropy)"),
        ({"shapes": (partial(lifted),), "scales": (partial(scales.selected),)}, "`lifted` (entropy)"),
        ({"shapes": (partial(lifted),), "correction": partial(by_sign)}, "`lifted` (entropy)"),
        ({"correction": partial(by_sign)}, ""),
    ],
)
def test_the_reason_for_scoring_first_names_function_and_columns(change, why):
    assert why_scored(replace(BUILT["grpo"], **change)) == why


def test_a_second_update_and_a_prediction_need_the_scores_that_the_first_began_with():
    grpo = BUILT["grpo"]
    assert why_scored(grpo, 1, ()) == ""
    assert why_scored(grpo, 2) == "learner.updates_per_rollout=2"
    assert "observe.prediction" in why_scored(grpo, 1, ("mean_discriminator",))


def test_a_bonus_reads_the_entropy_before_the_update_only_where_it_has_a_gate():
    gated = lambda below: ROWS["entropy_bonus"] | {"penalties": [{"fn": "entropy_bonus", "below": below}]}
    assert why_scored(build_objective(gated(None))) == ""
    assert why_scored(build_objective(gated(0.3))) == "`mean_entropy` (entropy)"


def test_a_declaration_names_columns_that_there_are():
    with pytest.raises(ValueError, match=r"entropie.*entropy"):
        declare(reads=["entropie"])
    assert traits(bind(correction, {"fn": "none"})).reads == frozenset()
    assert not corrects_inside(partial(correction.none))
    assert corrects_inside(partial(correction.sequence_product))


def test_a_correction_inside_the_update_is_that_of_old_log_probs():
    o, t = replace(BUILT["grpo"], correction=partial(correction.icepop)), at_start()
    moved = replace(o.credit(t), logprobs=t.logprobs + 1, correction=t.correction * torch.nan)
    assert close(corrected(o, moved).correction, o.credit(t).correction)
    untouched = replace(BUILT["grpo"], correction=partial(by_mean))
    assert corrected(untouched, moved) is moved


class Counted(ToyWorld):
    """The toy world, which remembers what it was asked for and the tokens of every step."""

    def __init__(self, *given, **settings):
        super().__init__(*given, **settings)
        self.asked, self.tokens = [], []

    async def score(self, batch, group, updates=1, extra=()):
        self.asked.append("score")
        return await super().score(batch, group, updates, extra)

    async def score_and_update(self, batch, tokens, objective, lr=None):
        self.asked.append("score_and_update")
        assert tokens.logprobs.isnan().all() and tokens.old_logprobs.isnan().all()
        return await super().score_and_update(batch, tokens, objective, lr)

    def step(self, step, metrics, groups, tokens):
        super().step(step, metrics, groups, tokens)
        self.tokens.append(tokens)


def five_steps(row, *, every: int = 0, updates: int = 1, **pace) -> Counted:
    world = Counted(build_objective(row))
    d = driver(world, diagnostics=DiagnosticsSchedule(prediction=every), **pace)
    d.knobs = replace(d.knobs, updates=updates)
    asyncio.run(d.train(5))
    return world


def measured(metrics):
    """Without what a clock says."""
    return {k: v for k, v in metrics.items() if not k.startswith(("seconds/", "idle/", "tokens/per_second"))}


CORRECTED = ROWS["grpo"] | {"correction": {"fn": "truncated_importance", "cap": 1.5}}


@pytest.mark.parametrize("row", [ROWS["grpo"], ROWS["entropy_advantage"], CORRECTED, ROWS["clip_cov"]])
@pytest.mark.parametrize("max_lag", [0, 1])
def test_weights_metrics_and_columns_are_the_same_scored_first_or_not(row, max_lag):
    auto, always = (five_steps(row, score=how, max_lag=max_lag) for how in ("auto", "always"))
    assert torch.equal(auto.logits, always.logits)
    for ours, theirs in zip(auto.steps, always.steps, strict=True):
        assert measured(ours) == measured(theirs)
    for ours, theirs in zip(auto.tokens, always.tokens, strict=True):
        for name, column in vars(ours).items():
            other = getattr(theirs, name)
            assert torch.equal(column, other) if isinstance(column, torch.Tensor) else column == other, name


def test_a_step_is_scored_first_only_where_something_reads_it():
    assert five_steps(ROWS["grpo"]).asked == ["score_and_update", "score"] * 5  # the toy scores in its update
    assert five_steps(ROWS["grpo"], score="always").asked == ["score"] * 5
    assert five_steps(ROWS["clip_cov"]).asked == ["score"] * 5
    assert five_steps(ROWS["grpo"], updates=2).asked == ["score"] * 5


def test_how_often_the_run_is_looked_at_changes_no_weight():
    never, sometimes = five_steps(ROWS["grpo"]), five_steps(ROWS["grpo"], every=2)
    assert torch.equal(never.logits, sometimes.logits)
    scored = ["score", "score"]  # before the update and after it
    own = ["score_and_update", "score"]
    assert sometimes.asked == [*scored, *own, *scored, *own, *scored]
    assert [("entropy/realised_change" in s) for s in sometimes.steps] == [True, False, True, False, True]


def test_unknown_scores_are_nan_for_what_the_row_reads():
    batch = Batch(*[np.ones(3, np.int32)] * 4, np.ones(3, np.float32))
    plain, held = (unknown_scores(batch, BUILT[row]) for row in ("grpo", "clamped_entropy"))
    assert set(plain) == {"logprobs", "entropy", "varentropy"}
    assert set(held) == {*plain, "nucleus_entropy:0.99"}
    assert set(unknown_scores(batch, BUILT["prorl"])) == {*plain, "ref_logprobs"}
    assert all(np.isnan(column).all() and column.shape == (3,) for column in held.values())


def test_the_scores_of_an_update_come_back_in_the_order_of_the_batch():
    """Two ranks, one of them with an empty micro-batch; each gives its own part."""
    calls = []

    async def ranks(call, *, deadline):
        method = lambda micros, objective, lr: calls.append(micros) or (SUMS, [scores(b) for b, _ in micros])
        handle = SimpleNamespace(score_and_update=SimpleNamespace(remote=method))
        return [call(rank, handle) for rank in (0, 1)]

    scores = lambda b: {"logprobs": b.response_ids.astype(np.float32)}
    role = LearnerRole(SimpleNamespace(handles=[None, None], all=ranks), 8, 1.0)
    lengths = np.array([1, 5, 2], np.int32)
    one = np.ones(3, np.int32)
    batch = Batch(0 * one, one, np.arange(8, dtype=np.int32), lengths, np.ones(3))
    unknown = torch.full((8,), torch.nan)
    given = Tokens.from_columns(
        logprobs=unknown, old_logprobs=unknown, entropy=unknown, lengths=[1, 5, 2], advantages=[1.0, 2, 3]
    )
    metrics, found = asyncio.run(role.score_and_update(batch, given, BUILT["grpo"]))
    assert found["logprobs"].tolist() == list(range(8))
    assert [len(micros) for micros in calls] == [2, 2] and metrics["update/loss"] == 2.0
    assert {part.counts.tokens for micros in calls for _, part in micros} == {8}


SUMS = dict.fromkeys(
    ("loss", "tokens", "entropy", "ratio_max", "grad_norm", "lr", "skipped", *update.SUMS), 1.0
) | {"skipped": 0.0}


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["observe.prediction.every=0"], "skipped: nothing reads it before the update"),
        (["observe.prediction.every=7"], "skipped but once in 7 steps, for observe.prediction.every: "),
        (["learner.score=always"], "of every step: learner.score=always"),
        (["learner.updates_per_rollout=2"], "needed by learner.updates_per_rollout=2"),
        (["objective=clip_cov"], "needed by `covariance_band` (logprobs)"),
        (
            ["+control.u={knob: learner.updates_per_rollout, fn: linear, start: 1, end: 3, steps: 9}"],
            "needed by learner.updates_per_rollout=3",
        ),
    ],
)
def test_the_header_says_whether_steps_are_scored_first(overrides, said):
    config = configured(*overrides)
    *_, line = remark_lines(config, build_parts(config))
    assert line.startswith(f"  scoring pass {said}")
