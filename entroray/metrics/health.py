"""A run put into words: healthy, collapsing, exploding, saturated, no signal, no gain, declining; and why.

Entropy and reward are held against the run's own first steps, noise and best: levels of entropy mean nothing
across models, temperatures and tasks. Shares of groups and the signs of `causes` have absolute thresholds.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from entroray.metrics import remedies

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
LOSS = 3.0
"""Standard errors that reward lies below its best, of many, before a fall counts."""
RIGHT = 0.75
"""Share of groups all right from which the task is used up."""


@dataclass(frozen=True)
class Health:
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


def read_health(history: History, has: remedies.Settings | None = None) -> Health | None:
    """The state of a run from its metrics, oldest first; None before 15 steps with an entropy.

    `has` are the run's settings by dotted name, so that none is advised which it has or which is not there.
    """
    steps = [m for m in history if m.get("entropy/mean") is not None]
    if len(steps) < LEAST:
        return None
    for rule in (_exploding, _used_up, _no_signal, _collapsing, _no_gain, _declining, _saturated, _gone):
        if found := rule(steps, has or {}):
            return found
    start, now = ends(steps, "entropy/mean")
    words = f"entropy {now:.3f} nats, {now / start:.0%} of its start, {_reward(steps)}"
    return Health("healthy", words, "no other rule holds")


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


def _exploding(steps: History, has: remedies.Settings) -> Health | None:
    start, now = ends(steps, "entropy/mean")
    slope, error = trend(_recent(steps, "entropy/mean"))
    rising, far = slope > 2 * error, now > 2 * RISEN * start
    if now <= RISEN * start or not (rising or far):
        return None
    words = f"entropy {now:.3f} nats, {now / start:.1f} times its start, {_reward(steps)}"
    rule = f"entropy above {RISEN:g} times the first {FIRST} steps and rising, or above {2 * RISEN:g} times"
    return Health("exploding", words, rule, *_advised(_cause(steps, remedies.EXPLODING, has), has))


def _used_up(steps: History, has: remedies.Settings) -> Health | None:
    _, right = ends(steps, "groups/all_right")
    if not right >= RIGHT:
        return None
    words = f"{right:.0%} of groups are all right, {_reward(steps)}"
    return Health(
        "saturated",
        words,
        f"all-right groups at least {RIGHT:.0%}",
        "most prompts are solved",
        remedies.harder(has),
    )


def _no_signal(steps: History, has: remedies.Settings) -> Health | None:
    right, wrong = ends(steps, "groups/all_right")[1], ends(steps, "groups/all_wrong")[1]
    if not right + wrong >= UNDECIDED:
        return None
    words = f"{wrong:.0%} of groups are all wrong and {right:.0%} all right: their advantages are 0"
    rule = f"groups all right or all wrong at least {UNDECIDED:.0%}"
    return Health("no signal", words, rule, *_cause(steps, remedies.LOST, has, remedies.HARD))


def _no_gain(steps: History, has: remedies.Settings) -> Health | None:
    first, now = ends(steps, "correct/mean")
    noise = _noise([v for m in steps if (v := m.get("correct/mean")) is not None])
    if len(steps) < 2 * TREND or now - first > 2 * noise:
        return None
    words = f"no gain in {len(steps)} steps beyond {2 * noise:.3f}, twice its noise, {_reward(steps)}"
    rule = f"reward after {2 * TREND} steps not above the first {FIRST} by twice the error of that difference"
    return Health("no gain", words, rule, *_cause(steps, remedies.LOST, has, remedies.HARD))


def _declining(steps: History, has: remedies.Settings) -> Health | None:
    rewards = [v for m in steps if (v := m.get("correct/mean")) is not None]
    windows = [sum(rewards[i : i + RECENT]) / RECENT for i in range(len(rewards) - RECENT + 1)]
    slope, error = trend(rewards[-TREND:])
    if len(rewards) < 2 * TREND or not slope < -2 * error:
        return None
    best, lost = max(windows), max(windows) - windows[-1]
    noise = _noise(rewards)
    if not lost > LOSS * noise:
        return None
    words = f"reward falls, {lost:.3f} below the {best:.3f} it had, {_reward(steps)}"
    far = f"{LOSS * noise:.3f}, {LOSS:g} times its noise"
    rule = f"reward falls over {TREND} steps and is more than {far}, below its best {RECENT}"
    return Health("declining", words, rule, *_advised(_cause(steps, remedies.DECLINING, has), has))


def _noise(values: Sequence[float]) -> float:
    """Standard error of a mean of 10 less one of 5, from differences of neighbours, which no trend widens."""
    pairs = [(b - a) ** 2 for a, b in itertools.pairwise(values)]
    return math.sqrt(sum(pairs) / (2 * len(pairs)) * (1 / FIRST + 1 / RECENT)) if pairs else 0.0


def _collapsing(steps: History, has: remedies.Settings) -> Health | None:
    start, now = ends(steps, "entropy/mean")
    slope, error = trend([math.log(max(h, 1e-9)) for h in _recent(steps, "entropy/mean")])
    end = GONE * start
    left = math.log(max(now, 1e-9) / end) / -slope if slope < 0 else math.inf
    if now > FALLEN * start or not slope < -2 * error or left > HORIZON:
        return None
    fate = f"at this rate it reaches {end:.3f} in {left:.0f} steps" if left > 0 else "it is all but gone"
    words = f"entropy {now:.3f} nats, {now / start:.0%} of its start; {fate}; {_reward(steps)}"
    rule = f"entropy below {FALLEN:.0%} of the first {FIRST} steps, falling, {GONE:.0%} in {HORIZON} steps"
    return Health("collapsing", words, rule, *_advised(_cause(steps, remedies.COLLAPSING, has), has))


def _saturated(steps: History, has: remedies.Settings) -> Health | None:
    start, now = ends(steps, "entropy/mean")
    slope, error = trend(_recent(steps, "correct/mean"))
    if now > SPENT * start or slope > 2 * error:
        return None
    words = f"reward rises no more with entropy at {now / start:.0%} of its start, {_reward(steps)}"
    rule = f"entropy below {SPENT:.0%} of the first {FIRST} steps, no trend in reward"
    return Health("saturated", words, rule, *_spent(has))


def _gone(steps: History, has: remedies.Settings) -> Health | None:
    start, now = ends(steps, "entropy/mean")
    if now > GONE * start:
        return None
    words = f"entropy {now:.3f} nats, {now / start:.0%} of its start: it is all but gone; {_reward(steps)}"
    rule = f"entropy below {GONE:.0%} of the first {FIRST} steps"
    return Health("collapsing", words, rule, *_spent(has))


def _spent(has: remedies.Settings) -> remedies.Cause:
    return remedies.Cause(
        "little entropy is left to explore with", remedies.find_remedy((remedies.hotter,), has)
    )


def _advised(found: remedies.Cause, has: remedies.Settings) -> remedies.Cause:
    """Smaller steps where entropy moves too fast and nothing says why."""
    return found if found.remedy else found._replace(remedy=remedies.find_remedy((remedies.half_lr,), has))


def _cause(
    steps: History,
    signs: Sequence[remedies.Sign],
    has: remedies.Settings,
    otherwise: Sequence[remedies.Sign] = (),
) -> remedies.Cause:
    """The strongest of `signs`, else of `otherwise`; a policy destroyed by one step goes before both."""
    names = {name for m in steps[-RECENT:] for name in m}
    means = {name: _mean(steps[-RECENT:], name) for name in names}
    return (
        remedies.destroyed(steps, ends(steps, "correct/mean"), has)
        or remedies.strongest(means, signs, has)
        or remedies.strongest(means, otherwise, has)
        or remedies.Cause("no single sign")
    )


def _reward(steps: History) -> str:
    first, now = ends(steps, "correct/mean")
    return f"reward {first:.3f} at the start, {now:.3f} now"


def _recent(steps: History, name: str) -> list[float]:
    return [v for m in steps[-TREND:] if (v := m.get(name)) is not None]


def _mean(steps: History, name: str) -> float:
    known = [v for m in steps if (v := m.get(name)) is not None]
    return sum(known) / len(known) if known else math.nan
