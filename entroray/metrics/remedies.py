"""Signs in a run's recent steps that say why it goes as it does, and one setting to try for each."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

Settings = Mapping[str, Any]
"""What the run has, by dotted name; the objective's row as one mapping, under `control` the names it moves.

What is not there is not known."""
Means = Mapping[str, float]


class Cause(NamedTuple):
    """What is seen, and the one setting to try; empty where nothing is known that would help."""

    seen: str
    remedy: str = ""


class Sign(NamedTuple):
    """A statistic of recent means, the value from which it counts, what it says, and its remedies.

    The first remedy that is not empty for the run's settings is the one to try. At `most` a sign is as strong
    as any can be: shares of different things and nats are compared by how far they are on their way to it.
    """

    statistic: Callable[[Means], float]
    least: float
    said: str
    remedies: tuple[Callable[[Settings], str], ...]
    most: float = 1.0

    def strength(self, value: float) -> float:
        """0 at `least`, 1 at `most` and beyond."""
        return min(1.0, (value - self.least) / (self.most - self.least))


def strongest(means: Means, signs: Sequence[Sign], has: Settings) -> Cause | None:
    """The sign furthest on its way from where it counts to its most; None where none counts."""
    seen: list[tuple[float, Cause]] = []
    for sign in signs:
        try:
            value = sign.statistic(means)
        except KeyError:  # not measured in these steps
            continue
        if value >= sign.least:
            seen.append(
                (sign.strength(value), Cause(sign.said.format(value), find_remedy(sign.remedies, has)))
            )
    return max(seen, key=lambda s: s[0])[1] if seen else None


def find_remedy(remedies: Sequence[Callable[[Settings], str]], has: Settings) -> str:
    """The first that is not empty and is about no setting that a controller moves; empty where none is."""
    moved = has.get("control", ())
    given = (remedy(has) for remedy in remedies)
    return next((r for r in given if r and not any(knob in r for knob in moved)), "")


# --- remedies: a setting, or empty where this run has it already or it would do nothing ---


def half_lr(has: Settings) -> str:
    """Half of the learning rate."""
    return _scaled(has, "learner.lr", 0.5, "half of learner.lr")


def tenth_lr(has: Settings) -> str:
    """A tenth of the learning rate."""
    return _scaled(has, "learner.lr", 0.1, "a tenth of learner.lr")


def hotter(has: Settings) -> str:
    """A temperature a fifth higher."""
    return _scaled(has, "sampler.temperature", 1.2, "a higher sampler.temperature")


def longer(has: Settings) -> str:
    """Twice the tokens a response."""
    return _scaled(has, "rollout.max_tokens", 2, "a larger rollout.max_tokens")


def harder(has: Settings) -> str:
    """Harder prompts."""
    return "harder prompts (data.settings)"


def easier(has: Settings) -> str:
    """Easier prompts."""
    return "easier prompts (data.settings)"


def template(has: Settings) -> str:
    """A template that asks for the answer as the judge reads it."""
    return "a data.template that asks for the answer as reward.judge reads it"


def one_update(has: Settings) -> str:
    """One update a step, where there are more."""
    return "learner.updates_per_rollout=1" if has.get("learner.updates_per_rollout", 2) > 1 else ""


def truncate(has: Settings) -> str:
    """Importance weights for what the sampler drew, where there are none."""
    correction = _slot(has, "correction").get("fn", "none")
    return "objective.correction={fn: truncated_importance}" if correction == "none" else ""


def no_lag(has: Settings) -> str:
    """Samples of the newest weights, where older ones may be trained on."""
    return "driver.max_lag=0" if has.get("driver.max_lag", 0) > 0 else ""


def float32(has: Settings) -> str:
    """Full precision, where there is less."""
    return "model.dtype=float32" if has.get("model.dtype", "float32") != "float32" else ""


def clip_higher(has: Settings) -> str:
    """DAPO's upper bound (arXiv 2503.14476), where a tighter one acts on token ratios."""
    high = _upper_bound(has)
    return "objective.surrogate.high=0.28" if high is not None and high < 0.28 else ""


def clip_lower(has: Settings) -> str:
    """PPO's upper bound, where a wider one acts on token ratios."""
    high = _upper_bound(has)
    return "objective.surrogate.high=0.2" if high is not None and high > 0.2 else ""


def less_bonus(has: Settings) -> str:
    """Half of what the objective pays for entropy, where it does."""
    paid = [p for p in _slot(has, "penalties") or () if "entropy" in p["fn"]]
    return f"half of the coef of {paid[0]['fn']} in objective.penalties" if paid else ""


def _scaled(has: Settings, name: str, factor: float, otherwise: str) -> str:
    return f"{name}={has[name] * factor:g}" if has.get(name) else otherwise


def _slot(has: Settings, name: str) -> Any:
    return has.get("objective", {}).get(name) or {}


def _upper_bound(has: Settings) -> float | None:
    """Of a clip on token ratios that can act; None where there is none, or nothing ever reaches it.

    With one update a step on samples without lag every ratio is 1.
    """
    surrogate = _slot(has, "surrogate")
    token = _slot(has, "ratio").get("fn", "token") == "token"
    still = not one_update(has) and not no_lag(has)
    return surrogate.get("high", 0.2) if surrogate.get("fn") == "clip" and token and not still else None


# --- signs ---

MOVED, LEFT = 0.1, 0.5
"""Nats of update/kl in one step that no recorded run survived; part of the first reward that is then left."""
UPDATES = Sign(
    lambda m: m["update/kl"],
    0.005,
    "the policy is {:.3f} nats from where a step began, mean over its updates, 0 at the first (update/kl)",
    (one_update, half_lr),
    MOVED,
)
MISMATCH = Sign(
    lambda m: m["mismatch/kl"],
    0.005,
    "learner and sampler differ by {:.3f} nats (mismatch/kl)",
    (truncate, no_lag, float32, half_lr),
    MOVED,
)
LOWERING, RAISING = 0.65, 0.55
"""Recorded on the small model: 0.49 to 0.60 where entropy stands (w_reinforce), 0.65 to 0.84 where it halves
in 50 steps (quickstart grpo and dapo, countdown dapo and kl_cov after step 10)."""
EASY = Sign(
    lambda m: m["groups/all_right"], 0.4, "{:.0%} of groups are all right (groups/all_right)", (harder,)
)
COLLAPSING = (
    UPDATES,
    MISMATCH,
    Sign(
        lambda m: m["quadrants/lowering"],
        LOWERING,
        "{:.0%} of what the update does to entropy, to first order, lowers it (quadrants/lowering)",
        (clip_higher, half_lr),
    ),
    EASY,
)
EXPLODING = (
    UPDATES,
    MISMATCH,
    Sign(
        lambda m: m["groups/all_wrong"],
        0.5,
        "{:.0%} of groups are all wrong (groups/all_wrong)",
        (less_bonus, half_lr),
    ),
    Sign(
        lambda m: 1 - m["quadrants/lowering"],
        RAISING,
        "{:.0%} of what the update does to entropy, to first order, raises it (1 - quadrants/lowering)",
        (clip_lower, half_lr),
    ),
)
UNFINISHED = (
    Sign(
        lambda m: m["length/truncated"],
        0.3,
        "{:.0%} of responses are cut off (length/truncated)",
        (longer,),
    ),
    Sign(
        lambda m: m["answers/missing"],
        0.5,
        "{:.0%} of responses hold no answer (answers/missing)",
        (template,),
    ),
)
DECLINING = (UPDATES, MISMATCH, *UNFINISHED)
LOST = (*UNFINISHED, EASY._replace(least=0.5))
"""Of runs without signal. `HARD` is no rival of these, as truncated responses are wrong ones too."""
HARD = (
    Sign(
        lambda m: m["groups/all_wrong"], 0.5, "{:.0%} of groups are all wrong (groups/all_wrong)", (easier,)
    ),
)


def destroyed(
    steps: Sequence[Mapping[str, float | None]], reward: tuple[float, float], has: Settings
) -> Cause | None:
    """A step that moved the policy far, in a run whose reward (first, now) is mostly gone; None without."""
    moves = {m.get("step", i): v for i, m in enumerate(steps, 1) if (v := m.get("update/kl")) is not None}
    step = max(moves, key=lambda at: moves[at], default=None)
    if step is None or moves[step] < MOVED or not reward[1] < LEFT * reward[0]:
        return None
    far = f"step {step:g} moved the policy by {moves[step]:.3f} nats (update/kl), and reward is mostly gone"
    return Cause(far, find_remedy((tenth_lr,), has))
