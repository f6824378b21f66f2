"""What is refused of a controller before a run starts, and where the ones that pass begin."""

import pytest

from entroray.control import Control, build_controllers
from entroray.errors import ConfigError
from tests.composed import configured
from tests.unit.test_control import KNOB, PI, controller

DOUBLING = {"knob": KNOB, "fn": "doubling", "signal": "x", "low": 0.1, "high": 8.0}
BAND = {"knob": KNOB, "fn": "band", "signal": "x", "at_least": 0.1, "at_most": 0.2, "step": 0.1}
BAND |= {"low": 0.0, "high": 1.0}
GATED = {"knob": KNOB, "fn": "bang_bang", "signal": "x", "target": 0.2, "step": 0.1, "low": 0.0, "high": 1.0}
STAGE = {"knob": KNOB, "fn": "stage", "values": [1, 2], "until": [3]}
LINEAR = {"knob": KNOB, "fn": "linear", "start": 1.0, "end": 0.0, "steps": 9}


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (DOUBLING | {"low": 0.0}, r"`doubling\.low` .* 0\.0$"),
        (DOUBLING | {"factor": 0}, r"`doubling\.factor` .* 1, .* 0$"),
        (DOUBLING | {"factor": 1.0}, r"`doubling\.factor` .* 1, .* 1\.0$"),
        (DOUBLING | {"target": "low"}, r"`doubling\.target` .* null, .* 'low'$"),
        (PI | {"delay": 1.5}, r"`c\.delay` .* 1\.5$"),
        (PI | {"delay": "2"}, r"`c\.delay` .* '2'$"),
        (PI | {"delay": 0}, r"`c\.delay` .* 1: .* 0$"),
        (PI | {"mean": 2.5}, r"`c\.mean` .* 2\.5$"),
        (PI | {"mean": 0}, r"`c\.mean` .* 0$"),
        (PI | {"priority": 1}, "`pi` .*`priority`"),
        (PI | {"start": "low"}, r"`c\.start` .* null, .* 'low'$"),
        (PI | {"signal": 3}, r"`c\.signal` .* 3$"),
        (PI | {"knob": 3}, r"\{knob: path, fn: name, setting: value, "),
        (PI | {"target": [1.0, 2.0]}, r"`pi\.target` .* \[1\.0, 2\.0\]$"),
        (PI | {"gain": float("nan")}, r"`pi\.gain` .* nan$"),
        (PI | {"low": 2.0}, r"low=2\.0 .*high=1\.0"),
        (BAND | {"at_least": 1.0}, r"at_least=1\.0 .*at_most=0\.2"),
        (STAGE | {"values": 3}, r"`stage\.values` .* 3$"),
        (STAGE | {"until": [1.5]}, r"`stage\.until` .* \[1\.5\]$"),
        (LINEAR | {"steps": 1.5}, r"`linear\.steps` .* 1\.5$"),
        (LINEAR | {"steps": 0}, r"`linear\.steps` .* 0$"),
    ],
)
def test_a_number_that_cannot_be_is_refused_by_its_key(spec, said):
    with pytest.raises(ConfigError, match=rf"control\.c.*{said}"):
        build_controllers({"c": spec})


def test_a_controller_begins_within_its_bounds_or_not_at_all():
    outside = build_controllers({"c": PI | {"low": 0.0, "high": 0.3, "mean": 3, "start": 5.0}})
    with pytest.raises(ConfigError, match=r"control\.c: .* 5, .*`start`, .*low=0\.\.high=0\.3 .*`start`"):
        Control(outside, {KNOB: 0.0})
    with pytest.raises(ConfigError, match=r"control\.c: .*coef .* 0, .*low=0\.1\.\.high=8 .*`start`"):
        Control(build_controllers({"c": DOUBLING}), {KNOB: 0.0})  # 0 doubled is 0
    assert Control(build_controllers({"c": DOUBLING | {"start": 0.1}}), {KNOB: 0.0}).turn(1) == {KNOB: 0.1}
    with pytest.raises(ConfigError, match=r"sampler\.temperature .* 0\.5, .*low=.*high=.*`start`"):
        configured("control=temperature_band", "sampler.temperature=0.5")


def test_a_gated_rule_is_at_its_gate_until_a_signal_says_otherwise():
    control = Control(build_controllers({"c": GATED | {"start": 0.5, "delay": 2}}), {KNOB: 0.0})
    values = []
    for step, x in enumerate([0.1, 0.1, 0.1], start=1):
        values.append(control.turn(step)[KNOB])
        control.observe({"x": x})
    assert values == [0.0, 0.0, 0.6] and control.memory["c"] == {"level": 0.6}
    assert controller(start=0.5).turn(1) == {KNOB: 0.5}  # no other rule has one


MEANS = {
    1: [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0],
    2: [1.5, 3.0, 6.0, 12.0, 24.0, 48.0, 96.0, 192.0],
    3: [7 / 3, 14 / 3, 28 / 3, 56 / 3, 112 / 3, 224 / 3, 448 / 3],
}
"""Of the first, the second, ... `mean` neighbours among 1, 2, 4, ..., which steps 1, 2, 3, ... measure."""


@pytest.mark.parametrize("mean", [1, 2, 3])
@pytest.mark.parametrize("delay", [1, 2, 3, 4, 5, 6])
def test_a_signal_is_as_old_as_its_delay_from_the_first_step_on(delay, mean):
    follows = {"fn": "pi", "target": 0.0, "gain": -1.0, "integral": 0.0, "low": 0.0, "high": 999.0}
    spec = {"knob": KNOB, "signal": "x", "delay": delay, "mean": mean} | follows
    control, values = Control(build_controllers({"c": spec}), {KNOB: 0.0}), []
    for step in range(1, 11):
        values.append(control.turn(step)[KNOB])
        control.observe({"x": 2.0 ** (step - 1)})
    late = delay + mean - 1  # step 1 + late is the first with `mean` measurements old enough
    assert values == pytest.approx([0.0] * late + MEANS[mean][: 10 - late])
