"""(signal, state) -> (value, state): rules that move a setting by what a metric was.

`state["level"]` begins as the setting's own value. Where raising the setting lowers the metric, `gain` (of
pi) and `step` (of the others) are negative. `low` and `high` bound the value, the first one too.
"""

from collections.abc import Mapping

from entroray.binding import AboveOne, Positive

SETTING = "control"
State = Mapping[str, float]


def bang_bang(
    signal: float, state: State, *, target: float, step: float, low: float, high: float, gate: float = 0.0
) -> tuple[float, State]:
    """Skywork-OR1's rule: one `step` up below the target, else down; in effect below the target only.

    Above it, and before the first signal, the value is `gate` while the level is kept. Theirs: target 0.2,
    step 1e-4, high 5e-3 (code of arXiv 2505.22312).
    """
    below = signal < target
    level = _clip(state["level"] + (step if below else -step), low, high)
    return (level if below else gate), {"level": level}


def pi(
    signal: float, state: State, *, target: float, gain: float, integral: float, low: float, high: float
) -> tuple[float, State]:
    """level + gain e + integral (sum of e), e = target - signal (EntroPIC, arXiv 2511.15248), clamped.

    Anti-windup: an error that would push a clamped value further out is not added to the sum.
    """
    error, total = target - signal, state.get("sum", 0.0)
    wanted = state["level"] + gain * error + integral * (total + error)
    outward = (wanted > high and integral * error > 0) or (wanted < low and integral * error < 0)
    kept = total if outward else total + error
    return _clip(wanted, low, high), {"level": state["level"], "sum": kept}


def doubling(
    signal: float,
    state: State,
    *,
    low: Positive,
    high: float,
    target: float | None = None,
    factor: AboveOne = 2.0,
) -> tuple[float, State]:
    """Times `factor` below the target, divided by it above (ADAPO, arXiv 2603.11682); never settles.

    Without a target it is what the signal was at first, and nothing moves until it has another value.
    """
    goal = state.get("first", signal) if target is None else target
    push = factor if signal < goal else 1 / factor if signal > goal else 1.0
    level = _clip(state["level"] * push, low, high)
    return level, {"level": level} if target is not None else {"level": level, "first": goal}


def band(
    signal: float, state: State, *, at_least: float, at_most: float, step: float, low: float, high: float
) -> tuple[float, State]:
    """One `step` up below the band, one down above it, still inside."""
    push = step if signal < at_least else -step if signal > at_most else 0.0
    level = _clip(state["level"] + push, low, high)
    return level, {"level": level}


def _clip(x: float, low: float, high: float) -> float:
    return min(max(x, low), high)
