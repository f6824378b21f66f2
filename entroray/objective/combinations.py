"""Choices that undo each other, do nothing, or mean something else than they seem; known before a start."""

from collections.abc import Iterator
from functools import partial
from typing import Any

from entroray.errors import ConfigError
from entroray.objective import estimator, keep, penalties, rewards, scales, select, shapes, surrogate
from entroray.objective.bind import keywords
from entroray.objective.equation import Objective

NEUTRAL: dict[Any, dict[str, float]] = {
    shapes.by_sign: {"positive": 1, "negative": 1},
    scales.selected: {"inside": 1, "outside": 1},
    rewards.soft_overlong: {"factor": 0},
    penalties.kl: {"coef": 0},
    penalties.kl_k3: {"coef": 0},
    penalties.kl_cov: {"coef": 0},
    penalties.entropy_bonus: {"coef": 0},
}
"""Settings with which a function changes nothing."""
READERS = (scales.selected, penalties.kl_cov)
"""Functions that treat selected tokens apart."""


def refuse(objective: Objective) -> None:
    """ConfigError for a row whose choices undo each other."""
    wrong = list(refused(objective))
    if wrong:
        raise ConfigError("; ".join(wrong))


def refused(o: Objective) -> Iterator[str]:
    """Why this row cannot do what it says."""
    if o.estimator.func is estimator.sign and o.keep.func is keep.informative:
        yield (
            "keep `informative` sends all-wrong groups back, and estimator `sign`, which has no baseline, "
            "learns from just those: choose keep `always`"
        )
    everything = o.select.func is select.everything
    if everything and any(s.func is scales.selected and _setting(s, "inside") == 0 for s in o.scales):
        yield (
            "scale `selected` with inside 0 drops the selected tokens, and select `everything` selects all: "
            "nothing is left to learn from; choose another select"
        )


def inert(o: Objective, updates: int) -> Iterator[str]:
    """What does nothing when a step has `updates` optimizer updates; each sentence names its choice."""
    for choice in o.choices():
        neutral = NEUTRAL.get(choice.func)
        if neutral and all(_setting(choice, name) == value for name, value in neutral.items()):
            said = ", ".join(f"{name} {value:g}" for name, value in neutral.items())
            yield f"`{_name(choice)}` with {said} changes nothing"
    if updates == 1:
        yield from _on_policy(o)
    if o.select.func is not select.everything and not any(c.func in READERS or _own(c) for c in o.choices()):
        yield f"nothing reads what select `{_name(o.select)}` selects: add a scale or a penalty that does"
    if o.estimator.func is estimator.sign and o.rewards:
        yield f"estimator `sign` reads `correct`: {', '.join(map(_name, o.rewards))} does not reach it"


def _on_policy(o: Objective) -> Iterator[str]:
    """With one update a step the ratio is exactly 1 wherever it is looked at."""
    why = "one update a step (learner.updates_per_rollout), so the ratio is 1"
    if o.surrogate.func in (surrogate.clip, surrogate.cispo):
        yield f"the bounds of surrogate `{_name(o.surrogate)}` hold nothing back: {why}"
    if any(p.func is penalties.kl_cov for p in o.penalties):
        yield f"penalty `kl_cov` has neither value nor gradient: {why}"


def doubtful(o: Objective) -> Iterator[str]:
    """What works, but not at the size its numbers suggest."""
    if o.select.func is select.covariance_band and o.estimator.func is not estimator.zscore:
        yield (
            "the bounds of select `covariance_band` are made for advantages in standard deviations "
            f"(estimator `zscore`); those of `{_name(o.estimator)}` have another scale"
        )
    drops = any(
        s.func is scales.selected and 0 in (_setting(s, "inside"), _setting(s, "outside")) for s in o.scales
    )
    if drops and o.divisor.func.__name__ == "kept_tokens":
        yield "denominator `kept_tokens` divides by the kept alone: their step grows as others are dropped"


def _setting(choice: partial, name: str) -> Any:
    return choice.keywords.get(name, keywords(choice.func)[name].default)


def _name(choice: partial) -> str:
    return choice.func.__name__


def _own(choice: partial) -> bool:
    """Whether a user wrote it: what it reads cannot be known."""
    return not choice.func.__module__.startswith("entroray.objective.")
