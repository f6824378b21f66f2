"""A run put into words: healthy, collapsing, exploding, saturated or no signal, and the rule that says so.

Every threshold is relative to the run's own first steps: levels of entropy mean nothing across models,
temperatures and tasks.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

History = Sequence[Mapping[str, float | None]]
FIRST, RECENT, TREND = 5, 10, 20
"""Steps that the start, the present and the trend are taken over."""
LEAST = 15
"""Steps before anything is said."""
FALLEN, SPENT, GONE, RISEN = 0.5, 0.35, 0.1, 2.0
"""Parts of the first entropy: a fall counts below, is spent below, ends at; a rise counts above."""
HORIZON = 150
"""Steps within which a fall must reach its end to be called collapsing."""
UNDECIDED = 0.95
"""Share of groups without signal from which there is none to learn from."""
RIGHT = 0.75
"""Share of groups all right from which the task is used up."""


@dataclass(frozen=True)
class Reading:
    """What a run looks like; `rule` is what was compared, `cause` the strongest sign, `remedy` a setting."""

    kind: str
    words: str
    rule: str
    cause: str = ""
    remedy: str = ""

    def line(self) -> str:
        """All of it as one line."""
        why = f" Seen: {self.cause}; try {self.remedy}." if self.remedy else ""
        return f"{self.kind}: {self.words}.{why} (Rule: {self.rule}.)"


def read(history: History) -> Reading | None:
    """The state of a run from its metrics, oldest first; None before 15 steps with an entropy."""
    steps = [m for m in history if m.get("entropy/mean") is not None]
    if len(steps) < LEAST:
        return None
    for rule in (_exploding, _used_up, _no_signal, _collapsing, _no_gain, _saturated):
        if found := rule(steps):
            return found
    start, now = ends(steps, "entropy/mean")
    words = f"entropy {now:.3f} nats, {now / start:.0%} of its start, {_reward(steps)}"
    return Reading("healthy", words, "no other rule holds")


def ends(steps: History, name: str) -> tuple[float, float]:
    """Mean of a metric over the first 5 and the last 10 steps; NaN where it was not measured."""
    return _mean(steps[:FIRST], name), _mean(steps[-RECENT:], name)


def trend(values: Sequence[float]) -> tuple[float, float]:
    """Least-squares slope per step and its standard error; 0 and infinity below 3 values."""
    n = len(values)
    if n < 3:
        return 0.0, math.inf
    at = [i - (n - 1) / 2 for i in range(n)]
    mean, sxx = sum(values) / n, sum(x * x for x in at)
    slope = sum(x * y for x, y in zip(at, values, strict=True)) / sxx
    left = sum((y - mean - slope * x) ** 2 for x, y in zip(at, values, strict=True))
    return slope, math.sqrt(left / (n - 2) / sxx)


def _exploding(steps: History) -> Reading | None:
    start, now = ends(steps, "entropy/mean")
    slope, error = trend(_recent(steps, "entropy/mean"))
    rising, far = slope > 2 * error, now > 2 * RISEN * start
    if now <= RISEN * start or not (rising or far):
        return None
    words = f"entropy {now:.3f} nats, {now / start:.1f} times its start, {_reward(steps)}"
    rule = f"entropy above {RISEN:g} times the first {FIRST} steps and rising, or above {2 * RISEN:g} times"
    return Reading(
        "exploding", words, rule, *_cause(steps, EXPLODING, "no single sign", "half of learner.lr")
    )


def _used_up(steps: History) -> Reading | None:
    _, right = ends(steps, "groups/all_right")
    if not right >= RIGHT:
        return None
    words = f"{right:.0%} of groups are all right, {_reward(steps)}"
    return Reading("saturated", words, f"all-right groups at least {RIGHT:.0%}", *HARDER)


def _no_signal(steps: History) -> Reading | None:
    right, wrong = ends(steps, "groups/all_right")[1], ends(steps, "groups/all_wrong")[1]
    if not right + wrong >= UNDECIDED:
        return None
    words = f"{wrong:.0%} of groups are all wrong and {right:.0%} all right: their advantages are 0"
    rule = f"groups all right or all wrong at least {UNDECIDED:.0%}"
    return Reading("no signal", words, rule, *_cause(steps, NO_SIGNAL, *HARD))


def _no_gain(steps: History) -> Reading | None:
    first, now = ends(steps, "reward/mean")
    if len(steps) < 2 * TREND or now > first:
        return None
    words = f"no gain in {len(steps)} steps, {_reward(steps)}"
    rule = f"reward after {2 * TREND} steps not above the first {FIRST}"
    return Reading("no signal", words, rule, *_cause(steps, NO_SIGNAL, *HARD))


def _collapsing(steps: History) -> Reading | None:
    start, now = ends(steps, "entropy/mean")
    slope, error = trend([math.log(max(h, 1e-9)) for h in _recent(steps, "entropy/mean")])
    end = GONE * start
    left = math.log(max(now, 1e-9) / end) / -slope if slope < 0 else math.inf
    if now > FALLEN * start or not slope < -2 * error or left > HORIZON:
        return None
    fate = f"at this rate it reaches {end:.3f} in {left:.0f} steps" if left > 0 else "it is all but gone"
    words = f"entropy {now:.3f} nats, {now / start:.0%} of its start; {fate}; {_reward(steps)}"
    rule = f"entropy below {FALLEN:.0%} of the first {FIRST} steps, falling, {GONE:.0%} in {HORIZON} steps"
    return Reading(
        "collapsing", words, rule, *_cause(steps, COLLAPSING, "no single sign", "half of learner.lr")
    )


def _saturated(steps: History) -> Reading | None:
    start, now = ends(steps, "entropy/mean")
    slope, error = trend(_recent(steps, "reward/mean"))
    if now > SPENT * start or slope > 2 * error:
        return None
    words = f"reward rises no more with entropy at {now / start:.0%} of its start, {_reward(steps)}"
    rule = f"entropy below {SPENT:.0%} of the first {FIRST} steps, no trend in reward"
    return Reading("saturated", words, rule, *SPENT_UP)


# --- causes ---

Sign = tuple[Callable[[Mapping[str, float]], float], float, str, str]
"""(statistic of recent means, value from which it counts, what it says, the setting to try)."""
HARDER = ("most prompts are solved", "harder prompts (data.settings)")
SPENT_UP = ("little entropy is left to explore with", "a higher sampler.temperature or harder prompts")
HARD = (
    "the task is too hard for this model",
    "easier prompts (data.settings) or a larger rollout.group_size",
)

UPDATES: Sign = (
    lambda m: m["update/kl"],
    0.005,
    "one step moves the policy by {:.3f} nats (update/kl)",
    "learner.updates_per_rollout=1",
)
MISMATCH: Sign = (
    lambda m: m["mismatch/kl"],
    0.005,
    "learner and sampler differ by {:.3f} nats (mismatch/kl)",
    "objective.correction={{fn: truncated_importance}} or a smaller driver.max_lag",
)
COLLAPSING: Sequence[Sign] = (
    UPDATES,
    MISMATCH,
    (
        lambda m: m["quadrants/e1"] + m["quadrants/e4"],
        0.55,
        "{:.0%} of trained tokens lie where the update lowers entropy (quadrants e1, e4)",
        "objective.surrogate.high=0.28",
    ),
    (
        lambda m: m["groups/all_right"],
        0.4,
        "{:.0%} of groups are all right (groups/all_right)",
        "harder prompts (data.settings)",
    ),
)
EXPLODING: Sequence[Sign] = (
    UPDATES,
    MISMATCH,
    (
        lambda m: m["groups/all_wrong"],
        0.5,
        "{:.0%} of groups are all wrong, so little but the entropy term is left (groups/all_wrong)",
        "a smaller entropy penalty (objective.penalties) or half of learner.lr",
    ),
    (
        lambda m: m["quadrants/e2"] + m["quadrants/e3"],
        0.55,
        "{:.0%} of trained tokens lie where the update raises entropy (quadrants e2, e3)",
        "objective.surrogate.high=0.2",
    ),
)
NO_SIGNAL: Sequence[Sign] = (
    (
        lambda m: m["length/truncated"],
        0.3,
        "{:.0%} of responses are cut off (length/truncated)",
        "a larger rollout.max_tokens",
    ),
    (
        lambda m: m["answers/missing"],
        0.5,
        "{:.0%} of responses hold no answer (answers/missing)",
        "data.template and reward.judge",
    ),
    (
        lambda m: m["groups/all_right"],
        0.5,
        "{:.0%} of groups are all right (groups/all_right)",
        "harder prompts (data.settings)",
    ),
)


def _cause(steps: History, signs: Sequence[Sign], otherwise: str, remedy: str) -> tuple[str, str]:
    """The sign furthest above the value from which it counts, and its setting."""
    names = {name for m in steps[-RECENT:] for name in m}
    means = {name: _mean(steps[-RECENT:], name) for name in names}
    seen = []
    for statistic, least, said, setting in signs:
        try:
            value = statistic(means)
        except KeyError:  # not measured in these steps
            continue
        if value >= least:
            seen.append((value / least, said.format(value), setting.format()))
    return max(seen)[1:] if seen else (otherwise, remedy)


def _reward(steps: History) -> str:
    first, now = ends(steps, "reward/mean")
    return f"reward {first:.3f} at the start, {now:.3f} now"


def _recent(steps: History, name: str) -> list[float]:
    return [v for m in steps[-TREND:] if (v := m.get(name)) is not None]


def _mean(steps: History, name: str) -> float:
    known = [v for m in steps if (v := m.get(name)) is not None]
    return sum(known) / len(known) if known else math.nan
