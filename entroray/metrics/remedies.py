"""Signs in a run's recent steps that explain its health, and one setting to try for each."""

import csv
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

Settings = Mapping[str, Any]
"""The run's settings by dotted name; `objective` is its row, `control` lists the settings that are moved."""
Means = Mapping[str, float]
Remedy = Callable[[Settings], str]


class Cause(NamedTuple):
    """A sign in words, and the one setting to try; empty if no known setting would help."""

    sign: str
    remedy: str = ""


class Sign(NamedTuple):
    """A mean of recent steps that counts from `minimum` on, with remedies in order of preference.

    Strength runs from 0 at `minimum` to 1 at `maximum`, so that shares and nats can be compared.
    """

    metric: str
    """Its name, or `1 - ` and its name."""
    minimum: float
    maximum: float
    text: str
    remedies: tuple[str, ...]
    """Keys of `REMEDIES`."""

    def value(self, means: Means) -> float | None:
        """The statistic; None if it was not measured."""
        name = self.metric.removeprefix("1 - ")
        value = means.get(name)
        return value if value is None or name == self.metric else 1 - value

    def strength(self, value: float) -> float:
        """0 at `minimum`, 1 from `maximum` on."""
        return min(1.0, (value - self.minimum) / (self.maximum - self.minimum))


def strongest_cause(means: Means, signs: Sequence[Sign], settings: Settings) -> Cause | None:
    """The cause of the strongest sign; None if no sign counts."""
    found: list[tuple[float, Cause]] = []
    for sign in signs:
        value = sign.value(means)
        if value is not None and value >= sign.minimum:
            cause = Cause(sign.text.format(value), find_remedy(sign.remedies, settings))
            found.append((sign.strength(value), cause))
    return max(found, key=lambda each: each[0])[1] if found else None


def find_remedy(remedies: Sequence[str], settings: Settings) -> str:
    """The first remedy that is not empty and names no setting that a controller moves; empty without one."""
    moved = settings.get("control", ())
    given = (REMEDIES[name](settings) for name in remedies)
    return next((r for r in given if r and not any(knob in r for knob in moved)), "")


# --- remedies: a setting, or empty if the run has it already or it would do nothing ---


def _scaled(name: str, factor: float, otherwise: str) -> Remedy:
    """The setting `name` times `factor`; `otherwise` says it in words if its value is not known."""
    return lambda settings: f"{name}={settings[name] * factor:g}" if settings.get(name) else otherwise


def truncate(settings: Settings) -> str:
    """Importance weights for what the sampler drew, if there are none."""
    correction = _slot(settings, "correction").get("fn", "none")
    return "objective.correction={fn: truncated_importance}" if correction == "none" else ""


def clip_higher(settings: Settings) -> str:
    """DAPO's upper bound (arXiv 2503.14476), if a tighter one acts on token ratios."""
    high = _upper_bound(settings)
    return "objective.surrogate.high=0.28" if high is not None and high < 0.28 else ""


def clip_lower(settings: Settings) -> str:
    """PPO's upper bound, if a wider one acts on token ratios."""
    high = _upper_bound(settings)
    return "objective.surrogate.high=0.2" if high is not None and high > 0.2 else ""


def less_bonus(settings: Settings) -> str:
    """Half of what the objective pays for entropy, if it pays."""
    paid = [p for p in _slot(settings, "penalties") or () if "entropy" in p["fn"]]
    return f"half of the coef of {paid[0]['fn']} in objective.penalties" if paid else ""


def _slot(settings: Settings, name: str) -> Any:
    return settings.get("objective", {}).get(name) or {}


def _upper_bound(settings: Settings) -> float | None:
    """The upper bound of a clip on token ratios; None without one, or if every ratio is 1.

    Every ratio is 1 with one update a step on samples without lag.
    """
    surrogate = _slot(settings, "surrogate")
    token = _slot(settings, "ratio").get("fn", "token") == "token"
    on_policy = not any(REMEDIES[name](settings) for name in ("one_update", "no_lag"))
    return surrogate.get("high", 0.2) if surrogate.get("fn") == "clip" and token and not on_policy else None


REMEDIES: Mapping[str, Remedy] = {
    "half_lr": _scaled("learner.lr", 0.5, "half of learner.lr"),
    "tenth_lr": _scaled("learner.lr", 0.1, "a tenth of learner.lr"),
    "hotter": _scaled("sampler.temperature", 1.2, "a higher sampler.temperature"),
    "longer": _scaled("rollout.max_tokens", 2, "a larger rollout.max_tokens"),
    "harder": lambda settings: "harder prompts (data.settings)",
    "easier": lambda settings: "easier prompts (data.settings)",
    "template": lambda settings: "a data.template that asks for the answer as reward.judge reads it",
    "one_update": lambda settings: (
        "learner.updates_per_rollout=1" if settings.get("learner.updates_per_rollout", 2) > 1 else ""
    ),
    "no_lag": lambda settings: "driver.max_lag=0" if settings.get("driver.max_lag", 0) > 0 else "",
    "float32": lambda settings: (
        "model.dtype=float32" if settings.get("model.dtype", "float32") != "float32" else ""
    ),
    "truncate": truncate,
    "clip_higher": clip_higher,
    "clip_lower": clip_lower,
    "less_bonus": less_bonus,
    "uncut": lambda settings: "sampler.top_p=1",
}

# --- signs ---

DESTRUCTIVE, LEFT = 0.1, 0.5
"""Nats of update/kl in one step that no recorded run survived; share of the first correct/mean then left."""


@cache
def read_signs(group: str) -> tuple[Sign, ...]:
    """The signs of a group of remedies.tsv: collapsing, exploding, declining, without_signal or too_hard.

    Recorded on the small model: quadrants/lowering is 0.49 to 0.60 if entropy holds (w_reinforce), 0.65 to
    0.84 if it halves in 50 steps (quickstart grpo and dapo, countdown dapo and kl_cov after step 10).
    """
    with Path(__file__).with_name("remedies.tsv").open(encoding="utf-8", newline="") as file:
        _, *rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
    return tuple(
        Sign(metric, float(minimum), float(maximum), text, tuple(names.split()))
        for groups, metric, minimum, maximum, names, text in rows
        if group in groups.split()
    )


def destructive_step(
    steps: Sequence[Mapping[str, float | None]], correct: tuple[float, float], settings: Settings
) -> Cause | None:
    """The step that moved the policy furthest, if it moved far and `correct` (first, recent) fell by half."""
    moves = {m.get("step", i): v for i, m in enumerate(steps, 1) if (v := m.get("update/kl")) is not None}
    step = max(moves, key=lambda at: moves[at], default=None)
    if step is None or moves[step] < DESTRUCTIVE or not correct[1] < LEFT * correct[0]:
        return None
    moved = f"step {step:g} moved the policy by {moves[step]:.3f} nats (update/kl)"
    text = f"{moved}, and correct/mean fell by more than half"
    return Cause(text, find_remedy(("tenth_lr",), settings))
