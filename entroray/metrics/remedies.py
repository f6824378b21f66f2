"""Signs in a run's recent steps that explain its health, and one setting to try for each."""

from collections.abc import Callable, Mapping, Sequence
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
    """A statistic of recent means that counts from `minimum` on, with remedies in order of preference.

    Strength runs from 0 at `minimum` to 1 at `maximum`, so that shares and nats can be compared.
    """

    statistic: Callable[[Means], float]
    minimum: float
    text: str
    remedies: tuple[Remedy, ...]
    maximum: float = 1.0

    def strength(self, value: float) -> float:
        """0 at `minimum`, 1 from `maximum` on."""
        return min(1.0, (value - self.minimum) / (self.maximum - self.minimum))


def strongest_cause(means: Means, signs: Sequence[Sign], settings: Settings) -> Cause | None:
    """The cause of the strongest sign; None if no sign counts."""
    found: list[tuple[float, Cause]] = []
    for sign in signs:
        try:
            value = sign.statistic(means)
        except KeyError:  # not measured in these steps
            continue
        if value >= sign.minimum:
            cause = Cause(sign.text.format(value), find_remedy(sign.remedies, settings))
            found.append((sign.strength(value), cause))
    return max(found, key=lambda each: each[0])[1] if found else None


def find_remedy(remedies: Sequence[Remedy], settings: Settings) -> str:
    """The first remedy that is not empty and names no setting that a controller moves; empty without one."""
    moved = settings.get("control", ())
    given = (remedy(settings) for remedy in remedies)
    return next((r for r in given if r and not any(knob in r for knob in moved)), "")


# --- remedies: a setting, or empty if the run has it already or it would do nothing ---


def _scaled(name: str, factor: float, otherwise: str) -> Remedy:
    """The setting `name` times `factor`; `otherwise` says it in words if its value is not known."""
    return lambda settings: f"{name}={settings[name] * factor:g}" if settings.get(name) else otherwise


half_lr = _scaled("learner.lr", 0.5, "half of learner.lr")
tenth_lr = _scaled("learner.lr", 0.1, "a tenth of learner.lr")
hotter = _scaled("sampler.temperature", 1.2, "a higher sampler.temperature")
longer = _scaled("rollout.max_tokens", 2, "a larger rollout.max_tokens")
harder: Remedy = lambda settings: "harder prompts (data.settings)"
easier: Remedy = lambda settings: "easier prompts (data.settings)"
template: Remedy = lambda settings: "a data.template that asks for the answer as reward.judge reads it"
one_update: Remedy = lambda settings: (
    "learner.updates_per_rollout=1" if settings.get("learner.updates_per_rollout", 2) > 1 else ""
)
no_lag: Remedy = lambda settings: "driver.max_lag=0" if settings.get("driver.max_lag", 0) > 0 else ""
float32: Remedy = lambda settings: (
    "model.dtype=float32" if settings.get("model.dtype", "float32") != "float32" else ""
)


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
    on_policy = not one_update(settings) and not no_lag(settings)
    return surrogate.get("high", 0.2) if surrogate.get("fn") == "clip" and token and not on_policy else None


# --- signs ---

DESTRUCTIVE, LEFT = 0.1, 0.5
"""Nats of update/kl in one step that no recorded run survived; share of the first correct/mean then left."""
UPDATES = Sign(
    lambda m: m["update/kl"],
    0.005,
    "updates move the policy by {:.3f} nats on average (update/kl)",
    (one_update, half_lr),
    DESTRUCTIVE,
)
MISMATCH = Sign(
    lambda m: m["mismatch/kl"],
    0.005,
    "learner and sampler differ by {:.3f} nats (mismatch/kl)",
    (truncate, no_lag, float32, half_lr),
    DESTRUCTIVE,
)
LOWERING, RAISING = 0.65, 0.55
"""Recorded on the small model: 0.49 to 0.60 if entropy holds (w_reinforce), 0.65 to 0.84 if it halves in 50
steps (quickstart grpo and dapo, countdown dapo and kl_cov after step 10)."""
EASY = Sign(
    lambda m: m["groups/all_right"], 0.4, "{:.0%} of groups are all right (groups/all_right)", (harder,)
)
ALL_WRONG = Sign(
    lambda m: m["groups/all_wrong"], 0.5, "{:.0%} of groups are all wrong (groups/all_wrong)", (easier,)
)
COLLAPSING = (
    UPDATES,
    MISMATCH,
    Sign(
        lambda m: m["quadrants/lowering"],
        LOWERING,
        "{:.0%} of the update's effect on entropy, to first order, lowers it (quadrants/lowering)",
        (clip_higher, half_lr),
    ),
    EASY,
)
EXPLODING = (
    UPDATES,
    MISMATCH,
    ALL_WRONG._replace(remedies=(less_bonus, half_lr)),
    Sign(
        lambda m: 1 - m["quadrants/lowering"],
        RAISING,
        "{:.0%} of the update's effect on entropy, to first order, raises it (1 - quadrants/lowering)",
        (clip_lower, half_lr),
    ),
)
UNFINISHED = (
    Sign(
        lambda m: m["length/truncated"], 0.3, "{:.0%} of responses are cut off (length/truncated)", (longer,)
    ),
    Sign(
        lambda m: m["answers/missing"],
        0.5,
        "{:.0%} of responses hold no answer (answers/missing)",
        (template,),
    ),
)
DECLINING = (UPDATES, MISMATCH, *UNFINISHED)
WITHOUT_SIGNAL = (*UNFINISHED, EASY._replace(minimum=0.5))
TOO_HARD = (ALL_WRONG,)
"""Asked only if no sign of `WITHOUT_SIGNAL` counts: truncated responses are wrong ones too."""


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
    return Cause(text, find_remedy((tenth_lr,), settings))
