"""What a row of choices cannot do: settings without effect under a schedule, and wrong combinations."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

from entroray.binding import effective_settings, function_name, holds, keyword_settings, traits
from entroray.errors import ConfigError
from entroray.objective.estimator import subtree
from entroray.objective.objective import Objective

MISMATCH = 0.05
"""Nats per token up to which a mean log-ratio is the numerics of two programs, not another distribution."""


@dataclass(frozen=True)
class Schedule:
    """What the rest of the settings decide about when and how a row is used."""

    updates: int
    """Optimizer updates per rollout."""
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


_refuse, _inert, _beware = (partial(Remark, kind) for kind in ("refused", "inert", "beware"))


def remarks(objective: Objective, schedule: Schedule) -> list[Remark]:
    """Everything to be said of a row under a schedule, the refusals first."""
    found = [remark for rule in RULES for remark in rule(objective, schedule)]
    return sorted(found, key=lambda r: ("refused", "inert", "beware").index(r.kind))


def check_combinations(objective: Objective, schedule: Schedule) -> None:
    """ConfigError naming every forbidden combination and the way out of it."""
    wrong = [r.text for r in remarks(objective, schedule) if r.kind == "refused"]
    if wrong:
        raise ConfigError("objective: " + "; ".join(wrong))


Rule = Callable[[Objective, Schedule], Iterator[Remark]]


@dataclass(frozen=True)
class _Uniform:
    """What a row learns from groups whose answers are all wrong, or all right."""

    wrong: bool
    right: bool
    purpose: bool
    """It is what the row is for: PSR, NSR and W-REINFORCE (arXiv 2506.01347), Entrocraft (2604.26326)."""


def _uniform_groups(o: Objective) -> _Uniform:
    """Whether all-wrong and all-right groups get a non-zero advantage.

    From the last function that declares `uniform_advantage`, as later ones weigh it.
    """
    wrong, right, purpose = 0.0, 0.0, False
    for choice in (o.estimator, *o.shapes):
        settings, declared = effective_settings(choice), traits(choice)
        if declared.weighs:
            wrong, right = declared.weighs(wrong, **settings), declared.weighs(right, **settings)
        elif declared.uniform_advantage:
            (wrong, right), purpose = declared.uniform_advantage(**settings), declared.needs_uniform_groups
    mostly_wrong = wrong < 0 and abs(wrong) > abs(right)
    return _Uniform(wrong != 0, right != 0, purpose or mostly_wrong)


def _uniform_groups_are_kept(o: Objective, s: Schedule) -> Iterator[Remark]:
    uniform = _uniform_groups(o)
    if traits(o.keep).drops_uniform_groups and (uniform.wrong or uniform.right):
        yield Remark(
            "refused" if uniform.purpose else "beware",
            f"keep `{function_name(o.keep)}` drops the groups whose answers are all "
            f"{'wrong' if uniform.wrong else 'right'}, which this objective learns "
            f"from{': choose keep `always`' if uniform.purpose else ' too'}",
        )


def _wrong_groups_are_not_rescued(o: Objective, s: Schedule) -> Iterator[Remark]:
    uniform = _uniform_groups(o)
    if not uniform.wrong:
        return
    if s.second:
        yield Remark(
            "refused" if uniform.purpose else "beware",
            "rollout.second puts a hotter draw in the place of the groups that are all wrong, which this "
            f"objective learns "
            f"from{': choose rollout.second.factor=1' if uniform.purpose else ' too'}",
        )
    if s.replay and uniform.purpose and not uniform.right:
        yield _refuse(
            "rollout.replay puts right answers in the place of wrong ones, and this objective learns "
            "from wrong ones alone: choose rollout.replay.tokens=0",
        )
    elif s.replay:
        yield _beware(
            "rollout.replay takes a wrong answer, which this objective learns from, for each it puts",
        )


def _prompts_come_up(o: Objective, s: Schedule) -> Iterator[Remark]:
    uniform = _uniform_groups(o)
    rules = (
        (uniform.wrong and s.lowest > 0, f"band rarely draws {{}} below {s.lowest:g}", "wrong"),
        (uniform.right and s.retire > 0, f"retire passes over {{}} {s.retire:g} and more", "right"),
        (uniform.right and s.highest < 1, f"band rarely draws {{}} above {s.highest:g}", "right"),
    )
    for applies, rule, answers in rules:
        if applies:
            effect = rule.format("prompts of pass rate")
            yield _beware(f"rollout.prompts.{effect}, whose {answers} answers this objective learns from")


def _siblings_are_compared(o: Objective, s: Schedule) -> Iterator[Remark]:
    """Only if the estimator compares at all: what needs no second rollout has no mean of a group."""
    if not s.siblings or traits(o.estimator).compares_siblings or traits(o.estimator).min_group < 2:
        return
    takes = keyword_settings(subtree)
    left = [f" ~objective.estimator.{name}" for name in o.estimator.keywords if name not in takes]
    yield _beware(
        f"estimator `{function_name(o.estimator)}` compares responses that share tokens as if each were "
        f"drawn alone: say 'objective.estimator={{fn: subtree}}'{''.join(left)} to compare each with what "
        "began where it began",
    )


def _corrected_once(o: Objective, s: Schedule) -> Iterator[Remark]:
    if traits(o.ratio).anchor == "sampler" and not holds(o.correction, "neutral"):
        yield _refuse(
            f"ratio `{function_name(o.ratio)}` already weighs by the sampler, correction "
            f"`{function_name(o.correction)}` would do it twice: choose correction `none` or ratio `token`",
        )


def _one_restraint(o: Objective, s: Schedule) -> Iterator[Remark]:
    restraints = [p for p in o.penalties if traits(p).restrains]
    if restraints and not holds(o.surrogate, "neutral"):
        yield _refuse(
            f"penalty `{function_name(restraints[0])}` replaces the clip and surrogate "
            f"`{function_name(o.surrogate)}` has one: choose surrogate `reinforce`, or select with "
            "`covariance_band` and drop",
        )


def _a_rollout_has_one_advantage(o: Objective, s: Schedule) -> Iterator[Remark]:
    by_token = [x for x in o.shapes if traits(x).live or holds(x, "by_token")]
    if traits(o.ratio).shares_gradient and by_token:
        yield _refuse(
            f"ratio `{function_name(o.ratio)}` shares one gradient among a rollout's tokens, and shape "
            f"`{function_name(by_token[0])}` tells them apart: choose ratio `sequence_token`",
        )
    if traits(o.ratio).per_rollout and not traits(o.aggregate).per_rollout:
        yield _refuse(
            f"ratio `{function_name(o.ratio)}` is a rollout's, aggregate `{function_name(o.aggregate)}` a "
            "token's: choose aggregate `rollout_mean` with denominator `rollouts`",
        )


def _selection_is_read(o: Objective, s: Schedule) -> Iterator[Remark]:
    readers = [c for c in o.choices() if traits(c).reads_selected]
    selects = not holds(o.select, "neutral")
    if selects and not readers:
        yield _refuse(
            f"select `{function_name(o.select)}` is read by nothing: add scale `selected`, or another that "
            "reads it",
        )
    if readers and not selects:
        yield _beware(
            f"`{function_name(readers[0])}` reads the selection, and select `{function_name(o.select)}` "
            "makes none",
        )


def _one_law_of_entropy(o: Objective, s: Schedule) -> Iterator[Remark]:
    for place, shape in enumerate(o.shapes):
        by_itself = holds(shape, "steers_entropy")
        others = [c for c in s.by_entropy if not c[1].startswith(f"objective.shapes.{place}.")]
        if by_itself and others:
            name, knob = others[0]
            yield _refuse(
                f"shape `{function_name(shape)}` steers the entropy by itself and control.{name} steers it, "
                f"through {knob}: they would fight; leave out control.{name}, or choose an objective "
                "without the shape",
            )


def _idle_at_one(o: Objective, s: Schedule) -> Iterator[Remark]:
    if traits(o.ratio).anchor == "sampler":
        return
    for choice in (o.ratio, o.surrogate, *o.penalties):
        if not traits(choice).idle_at_one:
            continue
        if s.updates == 1:
            yield _inert(f"`{function_name(choice)}` with one update per rollout: r is 1 throughout")
        elif choice in o.penalties:
            yield _inert(f"`{function_name(choice)}` in the first update of each step: r is 1")


def _neutral_settings(o: Objective, s: Schedule) -> Iterator[Remark]:
    for penalty in o.penalties:
        if effective_settings(penalty).get("coef") == 0:
            yield _inert(
                f"penalty `{function_name(penalty)}` while its coef is 0, unless a controller moves it",
            )
    for slot, choices in (("shape", o.shapes), ("scale", o.scales)):
        for choice in choices:
            if holds(choice, "neutral"):
                given = ", ".join(f"{name}={value}" for name, value in effective_settings(choice).items())
                yield _inert(f"{slot} `{function_name(choice)}` with {given} changes nothing")


def _thresholds_fit(o: Objective, s: Schedule) -> Iterator[Remark]:
    if traits(o.select).wants_deviations and not holds(o.estimator, "in_deviations"):
        yield _beware(
            f"the bounds of `{function_name(o.select)}` are for advantages in standard deviations, estimator "
            f"`{function_name(o.estimator)}` gives others",
        )
    if traits(o.divisor).counts_kept and o.scales:
        yield _beware(
            f"denominator `{function_name(o.divisor)}`: what the scales drop enlarges the step of the rest",
        )
    for choice in o.choices():
        if traits(choice).caveat:
            yield _beware(f"`{function_name(choice)}` {traits(choice).caveat}")


def corrects_sampler(o: Objective) -> bool:
    """Whether a row weighs what another distribution than the policy's drew."""
    return traits(o.ratio).anchor == "sampler" or not holds(o.correction, "neutral")


def _mismatch_is_corrected(o: Objective, s: Schedule) -> Iterator[Remark]:
    if s.max_lag and not corrects_sampler(o):
        yield _beware(f"driver.max_lag={s.max_lag} and correction `none`: older weights sampled some tokens")


def _mask_lets_shaped_responses_pass(o: Objective, s: Schedule) -> Iterator[Remark]:
    """NeMo-RL's bounds are for two programs that compute one distribution; shaping moves a mean further."""
    tolerance = traits(o.correction).rollout_tolerance
    if not tolerance or not (s.shaped or s.second or s.replay):
        return
    if tolerance(**effective_settings(o.correction)) < MISMATCH:
        bounds = " and ".join(f"{x:g}" for x in effective_settings(o.correction).values())
        yield _beware(
            f"correction `{function_name(o.correction)}` within {bounds} drops nearly every response drawn "
            "from another distribution than the policy's: choose `truncated_importance`, or wider bounds",
        )


RULES: tuple[Rule, ...] = (
    _uniform_groups_are_kept,
    _wrong_groups_are_not_rescued,
    _prompts_come_up,
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
