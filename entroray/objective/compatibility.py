"""What a row of choices cannot do: settings without effect under a schedule, and wrong combinations."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

from entroray.binding import effective_settings, function_name, keyword_settings, traits
from entroray.errors import ConfigError
from entroray.objective import (
    aggregate,
    correction,
    denominator,
    estimator,
    keep,
    penalties,
    ratio,
    scales,
    select,
    shapes,
    surrogate,
)
from entroray.objective.objective import Objective

MISMATCH = 0.05
"""Nats per token up to which a mean log-ratio is the numerics of two programs, not another distribution."""


@dataclass(frozen=True)
class Schedule:
    """What the rest of the settings decide about when and how a row is used."""

    updates: int
    """Optimizer updates per rollout."""
    steps: int
    max_lag: int
    second: bool = False
    """Groups that are all wrong are drawn again, hotter."""
    replay: bool = False
    """One of such a group is replaced by a right answer of old."""
    lowest: float = 0.0
    """Pass rate below which prompts rarely come up."""
    highest: float = 1.0
    """Pass rate above which they do."""
    retire: float = 0.0
    """Pass rate from which they do not come up at all; 0 for no such rate."""
    shaped: bool = False
    """The sampler draws from another distribution than the policy's."""
    siblings: bool = False
    """Responses of a group share tokens."""
    by_entropy: tuple[tuple[str, str], ...] = ()
    """(name, path of the setting it moves) of each controller that reads the entropy."""


@dataclass(frozen=True)
class Remark:
    """One thing to know before a run; `refused` ones end it."""

    kind: Literal["refused", "inert", "beware"]
    text: str


def remarks(objective: Objective, schedule: Schedule) -> list[Remark]:
    """Everything to be said of a row under a schedule, the refusals first."""
    said = [remark for rule in RULES for remark in rule(objective, schedule)]
    return sorted(said, key=lambda r: ("refused", "inert", "beware").index(r.kind))


def check_combinations(objective: Objective, schedule: Schedule) -> None:
    """ConfigError naming every forbidden combination and the way out of it."""
    wrong = [r.text for r in remarks(objective, schedule) if r.kind == "refused"]
    if wrong:
        raise ConfigError("objective: " + "; ".join(wrong))


Rule = Callable[[Objective, Schedule], Iterator[Remark]]


BY_ROLLOUT = (ratio.sequence, ratio.clipped_geometric)
"""Ratios that share one gradient among the tokens of a rollout."""


@dataclass(frozen=True)
class _Alike:
    """What a row learns from groups whose answers are all wrong, or all right."""

    wrong: bool
    right: bool
    purpose: bool
    """It is what the row is for: PSR, NSR and W-REINFORCE (arXiv 2506.01347), Entrocraft (2604.26326)."""


def _of_groups_alike(o: Objective) -> _Alike:
    """Whether all-wrong and all-right groups get a non-zero advantage.

    From the last function that declares `alike`, times `by_sign`'s weights.
    """
    wrong, right, purpose = 0.0, 0.0, False
    for choice in (o.estimator, *o.shapes):
        settings = effective_settings(choice)
        if choice.func is shapes.by_sign:
            wrong, right = _weighed(wrong, **settings), _weighed(right, **settings)
        elif given := traits(choice).uniform_advantage:
            (wrong, right), purpose = given(**settings), traits(choice).needs_uniform_groups
    mostly_wrong = wrong < 0 and abs(wrong) > abs(right)
    return _Alike(wrong != 0, right != 0, purpose or mostly_wrong)


def _weighed(advantage: float, *, positive: float, negative: float) -> float:
    return advantage * (positive if advantage > 0 else negative)


def _equal_groups_are_kept(o: Objective, s: Schedule) -> Iterator[Remark]:
    uniform_advantage = _of_groups_alike(o)
    if o.keep.func is keep.informative and (uniform_advantage.wrong or uniform_advantage.right):
        yield Remark(
            "refused" if uniform_advantage.purpose else "beware",
            f"keep `informative` drops the groups whose answers are all "
            f"{'wrong' if uniform_advantage.wrong else 'right'}"
            f", which this objective learns "
            f"from{': choose keep `always`' if uniform_advantage.purpose else ' too'}",
        )


def _wrong_groups_are_not_rescued(o: Objective, s: Schedule) -> Iterator[Remark]:
    uniform_advantage = _of_groups_alike(o)
    if not uniform_advantage.wrong:
        return
    if s.second:
        yield Remark(
            "refused" if uniform_advantage.purpose else "beware",
            "rollout.second puts a hotter draw in the place of the groups that are all wrong, which this "
            f"objective learns "
            f"from{': choose rollout.second.factor=1' if uniform_advantage.purpose else ' too'}",
        )
    if s.replay and uniform_advantage.purpose and not uniform_advantage.right:
        yield Remark(
            "refused",
            "rollout.replay puts right answers in the place of wrong ones, and this objective learns "
            "from wrong ones alone: choose rollout.replay.tokens=0",
        )
    elif s.replay:
        yield Remark(
            "beware",
            "rollout.replay takes a wrong answer, which this objective learns from, for each it puts",
        )
    if s.lowest > 0:
        yield Remark(
            "beware",
            f"rollout.prompts.band rarely draws prompts of pass rate below {s.lowest:g}, whose wrong answers "
            "this objective learns from",
        )


def _mastered_prompts_come_up(o: Objective, s: Schedule) -> Iterator[Remark]:
    if not _of_groups_alike(o).right:
        return
    if s.retire:
        yield Remark(
            "beware",
            f"rollout.prompts.retire passes over prompts of pass rate {s.retire:g} and more, whose right "
            "answers this objective learns from",
        )
    if s.highest < 1:
        yield Remark(
            "beware",
            f"rollout.prompts.band rarely draws prompts of pass rate above {s.highest:g}, whose right "
            "answers this objective learns from",
        )


def _siblings_are_compared(o: Objective, s: Schedule) -> Iterator[Remark]:
    """Only where the estimator compares at all: what needs no second rollout has no mean of a group."""
    if not s.siblings or o.estimator.func is estimator.subtree or traits(o.estimator).min_group < 2:
        return
    takes = keyword_settings(estimator.subtree)
    left = [f" ~objective.estimator.{name}" for name in o.estimator.keywords if name not in takes]
    yield Remark(
        "beware",
        f"estimator `{function_name(o.estimator)}` compares responses that share tokens as if each were "
        "drawn "
        f"alone: say 'objective.estimator={{fn: subtree}}'{''.join(left)} to compare each with what began "
        "where it began",
    )


def _corrected_once(o: Objective, s: Schedule) -> Iterator[Remark]:
    if o.ratio.func is ratio.sampler and o.correction.func is not correction.none:
        yield Remark(
            "refused",
            f"ratio `sampler` already weighs by the sampler, correction `{function_name(o.correction)}` "
            "would do it "
            "twice: choose correction `none` or ratio `token`",
        )


def _one_restraint(o: Objective, s: Schedule) -> Iterator[Remark]:
    restrains = any(p.func is penalties.kl_cov for p in o.penalties)
    if restrains and o.surrogate.func is not surrogate.reinforce:
        yield Remark(
            "refused",
            f"penalty `kl_cov` replaces the clip and surrogate `{function_name(o.surrogate)}` has one: "
            "choose "
            "surrogate `reinforce`, or select with `covariance_band` and drop",
        )


def _a_rollout_has_one_advantage(o: Objective, s: Schedule) -> Iterator[Remark]:
    by_token = [
        x for x in o.shapes if traits(x).live or (x.func is shapes.lean and effective_settings(x)["above"])
    ]
    if o.ratio.func in BY_ROLLOUT and by_token:
        yield Remark(
            "refused",
            f"ratio `{function_name(o.ratio)}` shares one gradient among a rollout's tokens, and shape "
            f"`{function_name(by_token[0])}` tells them apart: choose ratio `sequence_token`",
        )
    of_rollouts = o.ratio.func in (*BY_ROLLOUT, ratio.sequence_token)
    if of_rollouts and o.aggregate.func is not aggregate.rollout_mean:
        yield Remark(
            "refused",
            f"ratio `{function_name(o.ratio)}` is a rollout's, aggregate `{function_name(o.aggregate)}` a "
            "token's: choose "
            "aggregate `rollout_mean` with denominator `rollouts`",
        )


def _selection_is_read(o: Objective, s: Schedule) -> Iterator[Remark]:
    readers = [c for c in o.choices() if traits(c).reads_selected]
    if o.select.func is not select.everything and not readers:
        yield Remark(
            "refused",
            f"select `{function_name(o.select)}` is read by nothing: add scale `selected`, or another that "
            "reads it",
        )
    if o.select.func is select.everything and readers:
        yield Remark(
            "beware", f"`{function_name(readers[0])}` reads the selection, and select `everything` makes none"
        )


def _one_law_of_entropy(o: Objective, s: Schedule) -> Iterator[Remark]:
    for place, shape in enumerate(o.shapes):
        by_itself = _steers(shape)
        others = [c for c in s.by_entropy if not c[1].startswith(f"objective.shapes.{place}.")]
        if by_itself and others:
            name, knob = others[0]
            yield Remark(
                "refused",
                f"shape `{function_name(shape)}` steers the entropy by itself and control.{name} steers it, "
                f"through {knob}: they would fight; leave out control.{name}, or choose an objective "
                "without the shape",
            )


def _steers(shape: partial) -> bool:
    leans = shape.func is shapes.lean and bool(effective_settings(shape)["gain"])
    return shape.func is shapes.entropy_band or leans


def _idle_at_one(o: Objective, s: Schedule) -> Iterator[Remark]:
    if o.ratio.func is ratio.sampler:
        return
    for choice in (o.ratio, o.surrogate, *o.penalties):
        if traits(choice).idle_at_one:
            if s.updates == 1:
                yield Remark(
                    "inert", f"`{function_name(choice)}` with one update per rollout: r is 1 throughout"
                )
            elif choice.func is penalties.kl_cov:
                yield Remark("inert", f"`{function_name(choice)}` in the first update of each step: r is 1")


def _neutral_settings(o: Objective, s: Schedule) -> Iterator[Remark]:
    for penalty in o.penalties:
        if effective_settings(penalty).get("coef") == 0:
            yield Remark(
                "inert",
                f"penalty `{function_name(penalty)}` while its coef is 0, unless a controller moves it",
            )
    for shape in o.shapes:
        if shape.func is shapes.by_sign and set(effective_settings(shape).values()) == {1.0}:
            yield Remark("inert", "shape `by_sign` with both weights 1")
    for scale in o.scales:
        if scale.func is scales.selected and set(effective_settings(scale).values()) == {1.0}:
            yield Remark("inert", "scale `selected` with both factors 1")


def _thresholds_fit(o: Objective, s: Schedule) -> Iterator[Remark]:
    if o.select.func is select.covariance_band and o.estimator.func is not estimator.zscore:
        yield Remark(
            "beware",
            f"the bounds of `covariance_band` are for advantages in standard deviations, estimator "
            f"`{function_name(o.estimator)}` gives others",
        )
    if o.divisor.func is denominator.kept_tokens and o.scales:
        yield Remark(
            "beware", "denominator `kept_tokens`: what the scales drop enlarges the step of the rest"
        )
    if any(p.func is penalties.kl_k1 for p in o.penalties):
        yield Remark("beware", "penalty `kl_k1` has the same gradient whatever the reference: choose `kl`")
    for shape in o.shapes:
        settings = effective_settings(shape)
        if shape.func is shapes.positive_by_stage and settings["steps"] != s.steps:
            yield Remark("beware", f"`positive_by_stage.steps` is {settings['steps']}, run.steps {s.steps}")


def _mismatch_is_corrected(o: Objective, s: Schedule) -> Iterator[Remark]:
    if s.max_lag and o.correction.func is correction.none and o.ratio.func is not ratio.sampler:
        yield Remark(
            "beware", f"driver.max_lag={s.max_lag} and correction `none`: older weights sampled some tokens"
        )


def _mask_lets_shaped_responses_pass(o: Objective, s: Schedule) -> Iterator[Remark]:
    """NeMo-RL's bounds are for two programs that compute one distribution; shaping moves a mean further."""
    if o.correction.func is not correction.sequence_mask or not (s.shaped or s.second or s.replay):
        return
    low, high = (effective_settings(o.correction)[side] for side in ("low", "high"))
    if max(abs(math.log(low)), abs(math.log(high))) < MISMATCH:
        yield Remark(
            "beware",
            f"correction `sequence_mask` within {low:g} and {high:g} drops nearly every response drawn from "
            "another distribution than the policy's: choose `truncated_importance`, or wider bounds",
        )


RULES: tuple[Rule, ...] = (
    _equal_groups_are_kept,
    _wrong_groups_are_not_rescued,
    _mastered_prompts_come_up,
    _siblings_are_compared,
    _corrected_once,
    _one_restraint,
    _a_rollout_has_one_advantage,
    _selection_is_read,
    _one_law_of_entropy,
    _idle_at_one,
    _neutral_settings,
    _thresholds_fit,
    _mismatch_is_corrected,
    _mask_lets_shaped_responses_pass,
)
