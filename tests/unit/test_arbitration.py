"""Two controllers of one signal: the second acts only while the first can do no more."""

import json

from entroray.control import Control, build_controllers
from tests.unit.test_control import KNOB, PI


def test_with_priorities_the_second_acts_where_the_first_is_at_its_limit():
    specs = {
        "first": PI | {"high": 0.2, "priority": 0},
        "second": PI | {"knob": "sampler.temperature", "low": 1.0, "high": 2.0, "priority": 1},
    }
    control = Control(build_controllers(specs), {KNOB: 0.0, "sampler.temperature": 1.0})
    seen = []
    for step in range(1, 16):
        seen.append(tuple(control.turn(step).values()))
        control.note({"entropy/mean": 0.9})
    moved = [i for i in range(1, 15) if seen[i][1] != seen[i - 1][1]]
    limit = next(i for i, (first, _) in enumerate(seen) if first == 0.2)
    assert moved and min(moved) > limit and all(t == 1.0 for _, t in seen[: limit + 1])


def pair(first, second):
    """Two controllers of `x`, the first of KNOB, the second of a temperature."""
    specs = {"first": {"knob": KNOB} | first, "second": {"knob": "sampler.temperature"} | second}
    specs = {n: {"signal": "x", "fn": "band", "priority": i} | s for i, (n, s) in enumerate(specs.items())}
    return Control(build_controllers(specs), {KNOB: 0.0, "sampler.temperature": 1.0})


SECOND = {"at_least": 0.5, "at_most": 0.5, "step": 0.25, "low": 0.5, "high": 2.0}


def temperatures(control, signals):
    """The second's value in every step, `signals` being what the steps measure."""
    found = []
    for step, x in enumerate(signals, start=1):
        found.append(control.turn(step)["sampler.temperature"])
        control.note({} if x is None else {"x": x})
    return found


def test_the_second_rests_while_the_first_rests_inside_its_band():
    first = {"at_least": 0.2, "at_most": 0.4, "step": 0.5, "low": 0.0, "high": 1.0}
    assert temperatures(pair(first, SECOND), [0.3] * 4) == [1.0] * 4
    # up to its limit at 1.0 in two steps, then past it; inside again at the limit: back to rest
    assert temperatures(pair(first, SECOND), [0.1] * 4 + [0.3] * 2) == [1.0, 1.0, 1.0, 1.25, 1.5, 1.5]


def test_the_second_waits_while_the_first_waits_for_its_window():
    first = {"at_least": 0.2, "at_most": 0.2, "step": 0.5, "low": 0.0, "high": 0.5, "mean": 3}
    assert temperatures(pair(first, SECOND), [0.1] * 6) == [1.0, 1.0, 1.0, 1.0, 1.25, 1.5]


def test_of_a_gated_first_it_is_the_level_that_reaches_its_limit():
    first = {"fn": "bang_bang", "target": 0.2, "step": 0.5, "low": 0.0, "high": 1.0, "start": 0.5}
    assert temperatures(pair(first, SECOND), [0.9] * 4) == [1.0, 1.0, 0.75, 0.5]


def test_a_rare_signal_reaches_a_second_that_reads_it_later():
    first = {"at_least": 0.2, "at_most": 0.2, "step": 1.0, "low": 0.0, "high": 1.0}
    control = pair(first, SECOND | {"delay": 2})
    found = temperatures(control, [0.1, None, 0.1, None, 0.1, None])
    assert found == [1.0, 1.0, 1.0, 1.0, 1.25, 1.25]
    again = pair(first, SECOND | {"delay": 2})
    again.restore(json.loads(json.dumps(control.state())))
    assert temperatures(again, [0.1, None]) == temperatures(control, [0.1, None]) == [1.5, 1.5]
