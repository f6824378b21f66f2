"""Schedules and controllers, by hand and on a simulated plant: step response, saturation, no wind-up."""

import asyncio
import json
import math

import pytest

from entroray import rows
from entroray.control import Control, build_controllers, feedback, schedules
from entroray.errors import ConfigError
from entroray.objective import build_objective
from entroray.wiring import controllers
from entroray.wiring.parts import build_parts
from tests.composed import configured
from tests.toy import ToyWorld, driver

KNOB = "objective.penalties.0.coef"
PI = {
    "knob": KNOB,
    "fn": "pi",
    "signal": "entropy/mean",
    "target": 1.0,
    "gain": 0.5,
    "integral": 0.2,
    "low": -1.0,
    "high": 1.0,
}


def test_schedules_by_hand():
    assert schedules.constant(7, value=3.0) == 3.0
    assert [schedules.linear(s, start=1.0, end=0.0, steps=5) for s in (1, 2, 5, 9)] == [1.0, 0.75, 0.0, 0.0]
    cosine = [schedules.cosine(s, start=1.0, end=0.0, steps=5) for s in (1, 2, 3, 5, 9)]
    assert cosine == pytest.approx([1.0, (1 + math.sqrt(0.5)) / 2, 0.5, 0.0, 0.0])
    assert [schedules.stage(s, values=[0, 1, 2], until=[10, 20]) for s in (1, 10, 11, 20, 21)] == [
        0,
        0,
        1,
        1,
        2,
    ]


def test_rules_by_hand():
    settings = {"target": 0.2, "step": 0.1, "low": 0.0, "high": 0.25}
    value, state = feedback.bang_bang(0.1, {"level": 0.0}, **settings)
    assert (value, state["level"]) == (0.1, 0.1)
    value, state = feedback.bang_bang(0.3, {"level": 0.25}, **settings)
    assert value == 0.0 and state["level"] == pytest.approx(0.15)  # gated, the level kept
    assert feedback.bang_bang(0.1, {"level": 0.2}, **settings)[0] == 0.25
    bounds = {"target": 1.0, "low": 0.1, "high": 3.0}
    assert feedback.doubling(0.5, {"level": 1.0}, **bounds)[0] == 2.0
    assert feedback.doubling(1.5, {"level": 1.0}, **bounds)[0] == 0.5
    assert feedback.doubling(0.5, {"level": 2.0}, **bounds)[0] == 3.0
    state, levels = {"level": 1.0}, []
    for signal in (0.7, 0.6, 0.8, 0.7):  # without a target, the first signal is it
        level, state = feedback.doubling(signal, state, low=0.1, high=8.0)
        levels.append(level)
    assert levels == [1.0, 2.0, 1.0, 1.0] and state["first"] == 0.7
    inside = {"at_least": 0.2, "at_most": 0.4, "step": 0.5, "low": 0.0, "high": 1.0}
    levels = [feedback.band(h, {"level": 0.5}, **inside)[0] for h in (0.1, 0.2, 0.3, 0.4, 0.5)]
    assert levels == [1.0, 0.5, 0.5, 0.5, 0.0]


def plant(control, steps, *, drift=0.0, pull=0.3, entropy=0.4, ceiling=math.inf):
    """Entropy that relaxes to what the knob asks for, less a drift; returns (entropy, knob) of every step."""
    path = []
    for step in range(1, steps + 1):
        knob = control.turn(step)[KNOB]
        entropy = min(ceiling, entropy + pull * (0.4 + knob - drift - entropy))
        control.observe({"entropy/mean": entropy})
        path.append((entropy, knob))
    return path


def controller(**changes):
    return Control(build_controllers({"c": PI | changes}), {KNOB: 0.0})


def test_pi_reaches_the_set_point_and_holds_it_against_a_drift():
    control = controller()
    path = plant(control, 60)
    assert all(abs(h - 1.0) < 0.02 for h, _ in path[40:])
    assert max(h for h, _ in path) < 1.15  # overshoot
    after = plant(control, 60, drift=0.2, entropy=path[-1][0])
    assert min(h for h, _ in after) < 0.97 and abs(after[-1][0] - 1.0) < 0.01
    assert after[-1][1] == pytest.approx(0.8, abs=0.02)


def test_proportional_action_alone_leaves_the_error_it_must():
    path = plant(controller(integral=0.0), 100)
    assert path[-1][0] == pytest.approx((0.4 + 0.5) / 1.5, abs=1e-6)  # h = 0.4 + 0.5 (1 - h)


def test_saturation_clamps_and_does_not_wind_up():
    control = controller(high=0.3)
    stuck = plant(control, 200)
    assert all(knob <= 0.3 for _, knob in stuck) and stuck[-1][1] == 0.3
    wound = control.state()["memory"]["c"]["sum"]
    assert abs(wound) < 3  # 200 errors of 0.3 would be 60
    released = plant(control, 60, drift=-0.9, entropy=stuck[-1][0])
    first_below = next(i for i, (_, knob) in enumerate(released) if knob < 0.3)
    assert first_below <= 5 and abs(released[-1][0] - 1.0) < 0.02


@pytest.mark.parametrize(
    "rule",
    [
        {"fn": "bang_bang", "target": 1.0, "step": 0.1, "low": 0.0, "high": 1.0},
        {"fn": "band", "at_least": 0.9, "at_most": 1.1, "step": 0.05, "low": 0.0, "high": 1.0},
        {"fn": "doubling", "target": 1.0, "low": 0.1, "high": 1.5, "start": 0.2},
    ],
    ids=lambda rule: rule["fn"],
)
def test_the_other_rules_bring_entropy_near_the_target(rule):
    path = plant(
        Control(build_controllers({"c": {"knob": KNOB, "signal": "entropy/mean"} | rule}), {KNOB: 0.0}), 120
    )
    late = [h for h, _ in path[60:]]
    assert sum(late) / len(late) == pytest.approx(1.0, abs=0.2) and path[0][0] < 0.6


def test_a_signal_is_read_with_its_delay_and_averaged():
    rule = {"fn": "band", "at_least": 5.0, "at_most": 5.0, "step": 1.0, "low": -9.0, "high": 9.0}
    control = Control(
        build_controllers({"c": {"knob": KNOB, "signal": "x", "delay": 2, "mean": 2} | rule}), {KNOB: 0.0}
    )
    values = []
    for step, x in enumerate([4.0, 5.0, 9.0, 9.0, 9.0, 9.0], start=1):
        values.append(control.turn(step)[KNOB])
        control.observe({"x": x})
    # step 4 is the first with two measurements of step 2 or before: their mean is 4.5
    assert values == [0, 0, 0, 1, 0, -1]


def test_a_metric_of_every_few_steps_is_acted_upon_once_each_time():
    rule = {"fn": "band", "at_least": 5.0, "at_most": 5.0, "step": 1.0, "low": -9.0, "high": 9.0}
    control = Control(build_controllers({"c": {"knob": KNOB, "signal": "x", "mean": 3} | rule}), {KNOB: 0.0})
    values = []
    for step in range(1, 9):
        values.append(control.turn(step)[KNOB])
        control.observe({"x": 1.0} if step % 3 == 0 else {})
    assert values == [0, 0, 0, 1, 1, 1, 2, 2]


def test_a_metric_that_is_missing_or_not_finite_holds_the_setting():
    control = controller()
    for step, metrics in enumerate([{}, {"entropy/mean": math.nan}, {"entropy/mean": 0.5}], start=1):
        assert control.turn(step)[KNOB] == 0.0
        assert control.observe(metrics) == {"control/c": 0.0}
    assert control.turn(4)[KNOB] > 0


def test_state_goes_through_json_and_the_run_is_the_same_after_it():
    whole, first = controller(mean=3, delay=2), controller(mean=3, delay=2)
    path = plant(whole, 40)
    begun = plant(first, 17)
    second = controller(mean=3, delay=2)
    second.restore(json.loads(json.dumps(first.state())))
    rest = []
    entropy = begun[-1][0]
    for step in range(18, 41):
        knob = second.turn(step)[KNOB]
        entropy += 0.3 * (0.4 + knob - entropy)
        second.observe({"entropy/mean": entropy})
        rest.append((entropy, knob))
    assert begun + rest == path and second.state() == whole.state()


def test_state_is_a_copy():
    control = controller()
    taken = control.state()
    plant(control, 5)
    assert taken == controller().state() != control.state()


REFUSED = {
    "one knob": {"a": PI, "b": PI | {"signal": "correct/mean"}},
    "one signal": {"a": PI, "b": PI | {"knob": "learner.lr"}},
    "no such rule": {"a": PI | {"fn": "pid"}},
    "no such setting": {"a": PI | {"gian": 1.0}},
    "not a number": {"a": PI | {"gain": "much"}},
    "lacks a setting": {"a": {k: v for k, v in PI.items() if k != "target"}},
    "no signal": {"a": {k: v for k, v in PI.items() if k != "signal"}},
    "a schedule with a signal": {"a": {"knob": KNOB, "fn": "constant", "value": 1.0, "signal": "x"}},
    "no delay": {"a": PI | {"delay": 0}},
    "bounds": {"a": PI | {"low": 2.0}},
    "stages": {"a": {"knob": KNOB, "fn": "stage", "values": [1, 2], "until": [3, 4]}},
    "no knob": {"a": {"fn": "constant", "value": 1.0}},
}


@pytest.mark.parametrize("specs", REFUSED.values(), ids=REFUSED)
def test_a_controller_that_cannot_be_is_refused(specs):
    with pytest.raises(ConfigError, match="control"):
        build_controllers(specs)


BONUS = "objective.penalties=[{fn: entropy_bonus, coef: 0.0}]"


def test_a_knob_is_found_by_its_path_and_put_into_a_copy_of_the_row():
    config = configured(BONUS)
    assert (
        controllers.current_value(config, KNOB) == 0.0
        and controllers.current_value(config, "learner.lr") == config.learner.lr
    )
    row = controllers.in_effect(config.objective, {KNOB: 0.3, "learner.lr": 1.0})
    assert row["penalties"][0]["coef"] == 0.3 and config.objective["penalties"][0]["coef"] == 0.0


def steered_by(signal: str) -> list[str]:
    return ["control=temperature_band", f"control.temperature.signal={signal}"]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["+control.c={knob: run.steps, fn: constant, value: 3}"],
            r"control: `run\.steps` .*objective\.\* .*sampler\.rule\.\*.*learner\.lr",
        ),
        (
            ["+control.c={knob: objective.penalties.0.coef, fn: constant, value: 3}"],
            r"`objective\.penalties\.0\.coef` .*'objective\.penalties=\[",
        ),
        (
            [BONUS, f"+control.c={{knob: {KNOB.replace('0', '-1')}, fn: constant, value: 3}}"],
            r"`objective\.penalties\.-1\.coef` .*`-1`.*'objective\.penalties=\[",
        ),
        (steered_by("entropy/meen"), r"control\.temperature: .*`entropy/meen`: .*`entropy/mean`"),
        (steered_by("correct/meen"), r"control\.temperature: .*`correct/meen`: .*`correct/mean`"),
        (steered_by("entropy/p33"), r"`entropy/p33`: .*entroray/metrics/README\.md"),
        (steered_by("law/a"), r"`law/a`: .*`control` .*entropy/mean .*correct/mean"),
        (steered_by("eval/greedy"), r"`eval/greedy`: .*evaluate\.every .*1\.\.run\.steps"),
        (
            [
                "control=temperature_band",
                "control.temperature.signal=eval/greedy",
                "run.steps=9",
                "evaluate.every=10",
            ],
            r"`eval/greedy`: .*evaluate\.every .*1\.\.run\.steps",
        ),
        (steered_by("control/temperature"), r"`control/temperature`: .*entroray/metrics/README\.md"),
        (steered_by("step"), r"`step`: .*entroray/metrics/README\.md"),
        (steered_by("reward/part_form"), r"`reward/part_form`: .*reward\.path"),
        (steered_by("replay/share"), r"`replay/share`: .*rollout\.replay\.tokens"),
        (
            [
                "control=temperature_band",
                "control.temperature.signal=covariance/mean",
                "observe.diagnosis.every=0",
            ],
            r"`covariance/mean`: .*observe\.diagnosis\.every",
        ),
        (
            [
                "control=temperature_band",
                "control.temperature.signal=entropy/realised_change",
                "observe.prediction.every=0",
            ],
            r"`entropy/realised_change`: .*observe\.prediction\.every",
        ),
        (steered_by("objective/clap_tokens"), "clip_tokens"),
        (
            ["+control.c={knob: learner.max_grad_norm, fn: constant, value: 3}"],
            r"`learner\.max_grad_norm` .*learner\.zero_stage; .*objective\.\* .*learner\.lr",
        ),
        (
            ["+control.c={knob: sampler.rule.maximum, fn: constant, value: 3}"],
            r"`sampler\.rule\.maximum` .*`maximum`",
        ),
        (
            ["sampler=by_entropy", "+control.c={knob: sampler.rule.full, fn: constant, value: 0.1}"],
            r"control\.c .*sampler\.rule\.full .*full=0\.1 .*start=",
        ),
        (
            ["sampler=by_entropy", "+control.c={knob: sampler.rule.fn, fn: constant, value: 0.1}"],
            r"control: `sampler\.rule\.fn` .*'by_entropy'",
        ),
        (
            ["+control.c={knob: rollout.max_tokens, fn: constant, value: 0}"],
            r"control\.c .*rollout\.max_tokens .* 0 .* 1$",
        ),
        (
            ["+control.c={knob: rollout.max_tokens, fn: constant, value: 65}"],
            r"control\.c .*rollout\.max_tokens .* 65 .*rollout\.max_tokens=.*`start`",
        ),
        (
            [
                "rollout.repetition.count=16",
                "+control.c={knob: rollout.max_tokens, fn: constant, value: 15}",
            ],
            r"repetition\.count=16 .*rollout\.max_tokens=15",
        ),
        (
            ["+control.c={knob: objective.estimator.fn, fn: constant, value: 3}"],
            r"control: `objective\.estimator\.fn` .* '\w+'",
        ),
        (
            ["+control.c={knob: sampler.temperature, fn: linear, start: 1, end: 0, steps: 9}"],
            r"control\.c .*sampler\.temperature .* 0 .*end=0.* 0\.01$",
        ),
        (
            [
                "+control.c={knob: sampler.temperature, fn: bang_bang, signal: entropy/mean, target: 0.2, "
                "step: 0.1, low: 0.7, high: 1.3}"
            ],
            r"control\.c .*sampler\.temperature .* 0 .*gate=0.* 0\.01$",
        ),
        (
            ["+control.c={knob: objective.surrogate.low, fn: constant, value: -1}"],
            r"control\.c .*objective\.surrogate\.low .* -1 .*\.low` .* -1",
        ),
        (
            [BONUS, "control=entropy_pi", "control.entropy.knob=learner.lr", "control.entropy.low=-1"],
            r"control\.entropy .*learner\.lr .* -1 .*low=-1.* 0$",
        ),
    ],
)
def test_a_knob_that_cannot_be_moved_there_is_refused_at_start(overrides, said):
    with pytest.raises(ConfigError, match=said):
        configured(*overrides)


@pytest.mark.parametrize(
    ("signal", "more"),
    [
        ("eval/pass@4", ["evaluate.every=5", "evaluate.samples=4"]),
        ("objective/clip_tokens", []),
        ("pass/8", []),
        ("covariance/p99_8", []),
        ("entropy/mean:chain_sum", ["data=mixture"]),
        ("update/ratio_max", []),
        ("reward/part_form", ["reward.path=mine.py:judge"]),
    ],
)
def test_a_signal_that_these_settings_bring_is_read(signal, more):
    config = configured("control=temperature_band", f"control.temperature.signal={signal}", *more)
    assert [c.signal for c in build_parts(config).controllers] == [signal]


@pytest.mark.parametrize("name", sorted(p.stem for p in (rows.conf_folder() / "control").glob("*.yaml")))
def test_every_control_composes_and_says_what_it_does(name):
    config = configured(f"control={name}")
    lines = [c.describe() for c in build_parts(config).controllers]
    assert bool(lines) == (name != "none") and all("<-" in line for line in lines)


def steered(config, world):
    d = driver(world)
    parts = build_parts(config)
    d.control = controllers.build_control(config, parts.controllers)
    d.tune = controllers.build_tuner(config.objective, config.packages, parts)
    return d


def test_the_driver_holds_the_entropy_of_the_toy_where_without_control_it_collapses():
    loose, held = (
        configured("objective=grpo", BONUS),
        configured("objective=grpo", "control=entropy_pi", BONUS),
    )
    c = {"target": 1.5, "gain": 2.0, "integral": 0.2, "mean": 3, "high": 5.0}
    held.control["entropy"] |= c
    runs = []
    for config in (loose, held):
        world = ToyWorld(build_objective(config.objective), lr=2.0)
        asyncio.run(steered(config, world).train(60))
        runs.append([s["entropy/mean"] for s in world.steps[-15:]])
    assert sum(runs[0]) / 15 < 1.0 and abs(sum(runs[1]) / 15 - 1.5) < 0.2
    assert world.steps[-1]["control/entropy"] > 0 and "law/a" not in world.steps[-1]


def test_a_steered_run_is_the_same_after_a_resume():
    config = configured("objective=grpo", "control=entropy_pi", BONUS)
    config.control["entropy"] |= {"target": 1.8, "gain": 2.0, "integral": 0.1, "mean": 3, "high": 5.0}

    def world():
        return ToyWorld(build_objective(config.objective), lr=2.0)

    async def interrupted(first, second):
        begun = steered(config, first)
        await begun.train(7)
        for name in ("rng", "logits", "served", "version"):
            setattr(second, name, getattr(first, name))
        rest = steered(config, second)
        rest.restore(json.loads(json.dumps(begun.committed)))
        await rest.train(14)
        return rest

    whole, first, second = world(), world(), world()
    straight = steered(config, whole)
    asyncio.run(straight.train(14))
    rest = asyncio.run(interrupted(first, second))
    took = [s["control/entropy"] for s in first.steps + second.steps]
    assert took == [s["control/entropy"] for s in whole.steps] and len(set(took)) > 5
    assert rest.control.state() == straight.control.state()
