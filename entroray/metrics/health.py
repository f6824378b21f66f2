"""The health of a run: healthy, collapsing, exploding, saturated, no signal, no gain or declining; and why.

Entropy and `correct/mean` are compared with the run's own first steps, noise and best: 0.1 nats is much for
one model and little for another. Shares of groups and the signs of remedies.py have absolute thresholds.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from entroray.metrics import remedies

History = Sequence[Mapping[str, float | None]]
ENTROPY, CORRECT = "entropy/mean", "correct/mean"
FIRST, RECENT, TREND = 5, 10, 20
"""Steps of a first mean, of a recent mean, and of a slope."""
MINIMUM_STEPS = 15
"""Steps with an entropy before a run has a health."""
FALLEN, LOW, EXHAUSTED, RISEN = 0.5, 0.35, 0.1, 2.0
"""Shares of the first entropy."""
ZERO = 1e-9
"""Nats below which an entropy is none: no share is taken of it."""
HORIZON = 150
"""Steps within which a fall must exhaust entropy to be called collapsing."""
NO_SIGNAL = 0.95
"""Share of groups all right or all wrong from which nothing is left to learn from."""
DECLINE = 3.0
"""Standard errors below its best mean from which `correct/mean` is declining."""
SOLVED = 0.75
"""Share of groups all right from which the task is solved."""


@dataclass(frozen=True)
class Health:
    """A run's state: `rule` is what was compared, `cause` the strongest sign, `remedy` a setting to try."""

    kind: str
    words: str
    rule: str
    cause: str = ""
    remedy: str = ""

    def line(self) -> str:
        """All of it as one line."""
        why = f" Cause: {self.cause}; try {self.remedy}." if self.remedy else ""
        return f"{self.kind}: {self.words}.{why} (Rule: {self.rule}.)"


def read_health(history: History, settings: remedies.Settings | None = None) -> Health | None:
    """The health of a run from its metrics, oldest first; None before 15 steps with an entropy.

    `settings` are the run's, by dotted name: no remedy repeats one of them.
    """
    steps = [m for m in history if m.get(ENTROPY) is not None]
    if len(steps) < MINIMUM_STEPS:
        return None
    for rule in (
        _zero_from_the_start, _exploding, _solved, _no_signal, _collapsing, _no_gain, _declining, _saturated,
        _exhausted,
    ):  # fmt: skip
        if found := rule(steps, settings or {}):
            return found
    return Health("healthy", f"{_entropy_text(steps)}; {_correct_text(steps)}", "no other rule holds")


def first_and_recent(steps: History, name: str) -> tuple[float, float]:
    """Mean of a metric over the first 5 and the last 10 steps; NaN if it was not measured."""
    return _mean(steps[:FIRST], name), _mean(steps[-RECENT:], name)


def fit_slope(values: Sequence[float]) -> tuple[float, float]:
    """Least-squares slope per step and its standard error; 0 and infinity below 3 values."""
    n = len(values)
    if n < 3:
        return 0.0, math.inf
    at = [i - (n - 1) / 2 for i in range(n)]
    mean, sxx = sum(values) / n, sum(x * x for x in at)
    slope = sum(x * y for x, y in zip(at, values, strict=True)) / sxx
    residual = sum((y - mean - slope * x) ** 2 for x, y in zip(at, values, strict=True))
    return slope, math.sqrt(residual / (n - 2) / sxx)


def _zero_from_the_start(steps: History, settings: remedies.Settings) -> Health | None:
    start, now = first_and_recent(steps, ENTROPY)
    if start > ZERO:
        return None
    words = f"entropy was 0 in the first {FIRST} steps and is {now:.3f} nats; {_correct_text(steps)}"
    return Health("collapsing", words, f"entropy 0 in the first {FIRST} steps", *_low_entropy(settings))


def _exploding(steps: History, settings: remedies.Settings) -> Health | None:
    start, now = first_and_recent(steps, ENTROPY)
    slope, error = fit_slope(_recent(steps, ENTROPY))
    if now <= RISEN * start or not (slope > 2 * error or now > 2 * RISEN * start):
        return None
    words = f"entropy is {now:.3f} nats, {now / start:.1f} times its start; {_correct_text(steps)}"
    rule = f"entropy above {RISEN:g} times the first {FIRST} steps and rising, or above {2 * RISEN:g} times"
    return Health("exploding", words, rule, *_change_cause(steps, "exploding", settings))


def _solved(steps: History, settings: remedies.Settings) -> Health | None:
    _, right = first_and_recent(steps, "groups/all_right")
    if not right >= SOLVED:
        return None
    words = f"{right:.0%} of groups are all right; {_correct_text(steps)}"
    cause = "most prompts are solved", remedies.REMEDIES["harder"](settings)
    return Health("saturated", words, f"all-right groups at {SOLVED:.0%} or more", *cause)


def _no_signal(steps: History, settings: remedies.Settings) -> Health | None:
    right, wrong = (first_and_recent(steps, f"groups/all_{kind}")[1] for kind in ("right", "wrong"))
    if not right + wrong >= NO_SIGNAL:
        return None
    words = f"{wrong:.0%} of groups are all wrong and {right:.0%} all right, so their advantages are 0"
    rule = f"groups all right or all wrong at {NO_SIGNAL:.0%} or more"
    return Health("no signal", words, rule, *_flat_cause(steps, settings))


def _no_gain(steps: History, settings: remedies.Settings) -> Health | None:
    first, now = first_and_recent(steps, CORRECT)
    noise = _noise([v for m in steps if (v := m.get(CORRECT)) is not None])
    if len(steps) < 2 * TREND or now - first > 2 * noise:
        return None
    words = f"in {len(steps)} steps correct has not risen by twice its noise, {2 * noise:.3f}"
    rule = f"after {2 * TREND} steps correct above the first {FIRST} by less than twice its noise"
    return Health("no gain", f"{words}; {_correct_text(steps)}", rule, *_flat_cause(steps, settings))


def _declining(steps: History, settings: remedies.Settings) -> Health | None:
    correct = [v for m in steps if (v := m.get(CORRECT)) is not None]
    means = [sum(correct[i : i + RECENT]) / RECENT for i in range(len(correct) - RECENT + 1)]
    slope, error = fit_slope(correct[-TREND:])
    if len(correct) < 2 * TREND or not slope < -2 * error:
        return None
    loss, limit = max(means) - means[-1], DECLINE * _noise(correct)
    if not loss > limit:
        return None
    words = f"correct has fallen by {loss:.3f} from its best {max(means):.3f}; {_correct_text(steps)}"
    rule = f"correct falls over {TREND} steps and by more than {limit:.3f}, {DECLINE:g} times its noise"
    return Health("declining", words, rule, *_change_cause(steps, "declining", settings))


def _noise(values: Sequence[float]) -> float:
    """Standard error of a mean of 10 less one of 5, from differences of neighbours, which no trend widens."""
    pairs = [(b - a) ** 2 for a, b in itertools.pairwise(values)]
    return math.sqrt(sum(pairs) / (2 * len(pairs)) * (1 / FIRST + 1 / RECENT)) if pairs else 0.0


def _collapsing(steps: History, settings: remedies.Settings) -> Health | None:
    start, now = first_and_recent(steps, ENTROPY)
    slope, error = fit_slope([math.log(max(h, ZERO)) for h in _recent(steps, ENTROPY)])
    end = EXHAUSTED * start
    left = math.log(max(now, ZERO) / end) / -slope if slope < 0 else math.inf
    if now > FALLEN * start or not slope < -2 * error or left > HORIZON:
        return None
    fate = f"at this rate it reaches {end:.3f} in {left:.0f} steps" if left > 0 else "it is nearly exhausted"
    words = f"{_entropy_text(steps)}; {fate}; {_correct_text(steps)}"
    rule = (
        f"entropy below {FALLEN:.0%} of the first {FIRST} steps, and {EXHAUSTED:.0%} within {HORIZON} steps"
    )
    return Health("collapsing", words, rule, *_change_cause(steps, "collapsing", settings))


def _saturated(steps: History, settings: remedies.Settings) -> Health | None:
    start, now = first_and_recent(steps, ENTROPY)
    slope, error = fit_slope(_recent(steps, CORRECT))
    if now > LOW * start or slope > 2 * error:
        return None
    words = f"correct no longer rises; {_entropy_text(steps)}; {_correct_text(steps)}"
    rule = f"entropy below {LOW:.0%} of the first {FIRST} steps, no trend in correct"
    return Health("saturated", words, rule, *_low_entropy(settings))


def _exhausted(steps: History, settings: remedies.Settings) -> Health | None:
    start, now = first_and_recent(steps, ENTROPY)
    if now > EXHAUSTED * start:
        return None
    words = f"{_entropy_text(steps)}; it is nearly exhausted; {_correct_text(steps)}"
    rule = f"entropy below {EXHAUSTED:.0%} of the first {FIRST} steps"
    return Health("collapsing", words, rule, *_low_entropy(settings))


def _low_entropy(settings: remedies.Settings) -> remedies.Cause:
    hotter = remedies.find_remedy(("hotter",), settings)
    return remedies.Cause("little entropy is left to explore with", hotter)


def _change_cause(steps: History, group: str, settings: remedies.Settings) -> remedies.Cause:
    """The cause of a change; smaller steps are the remedy if no sign has one."""
    cause = _cause(steps, (group,), settings)
    return cause._replace(remedy=cause.remedy or remedies.find_remedy(("half_lr",), settings))


def _flat_cause(steps: History, settings: remedies.Settings) -> remedies.Cause:
    """`too_hard` counts only if no sign without a signal does: truncated responses are wrong ones too."""
    return _cause(steps, ("without_signal", "too_hard"), settings)


def _cause(steps: History, groups: Sequence[str], settings: remedies.Settings) -> remedies.Cause:
    """A step that destroyed the policy, else the strongest sign of the first group that has any."""
    means = {name: _mean(steps[-RECENT:], name) for name in {name for m in steps[-RECENT:] for name in m}}
    causes = [remedies.destructive_step(steps, first_and_recent(steps, CORRECT), settings)]
    causes += [remedies.strongest_cause(means, remedies.read_signs(group), settings) for group in groups]
    return next((cause for cause in causes if cause), remedies.Cause("no single sign"))


def _entropy_text(steps: History) -> str:
    start, now = first_and_recent(steps, ENTROPY)
    return f"entropy is {now:.3f} nats, {now / start:.0%} of its start"


def _correct_text(steps: History) -> str:
    first, now = first_and_recent(steps, CORRECT)
    return f"correct was {first:.3f} at the start and is {now:.3f}"


def _recent(steps: History, name: str) -> list[float]:
    return [v for m in steps[-TREND:] if (v := m.get(name)) is not None]


def _mean(steps: History, name: str) -> float:
    known = [v for m in steps if (v := m.get(name)) is not None]
    return sum(known) / len(known) if known else math.nan
