"""Settings moved in a run reach the engines with the next requests."""

import asyncio
from types import SimpleNamespace

import numpy as np
import pytest

from entroray.errors import ConfigError
from entroray.objective import build_objective
from entroray.objective.compatibility import remarks
from entroray.train.driver import Knobs
from entroray.types import Batch
from entroray.wiring import controllers, sampler
from entroray.wiring.objective import objective_schedule
from entroray.wiring.parts import build_parts
from entroray.workers.roles import LearnerRole
from tests.composed import configured


def knobs_of(config):
    parts = build_parts(config)
    draw = sampler.training_draw(config.sampler, config.rollout, parts, None)
    return Knobs(parts.objective, draw, 1)


def control_and_tuner(config):
    parts = build_parts(config)
    tune = controllers.build_tuner(config.objective, config.packages, parts)
    return controllers.build_control(config, parts.controllers), tune


def test_a_number_of_the_rule_and_the_longest_response_travel_with_the_next_requests():
    rule = "+control.hot={knob: sampler.rule.maximum, fn: linear, start: 1.3, end: 1.5, steps: 3}"
    longest = "+control.long={knob: rollout.max_tokens, fn: linear, start: 16, end: 31, steps: 3}"
    config = configured("sampler=by_entropy", rule, longest)
    control, tune = control_and_tuner(config)
    knobs = knobs_of(config)
    draws = [tune(control.turn(step), knobs).draw for step in (1, 2, 3)]
    maxima = [1.3, pytest.approx(1.4), 1.5]
    assert [draw.rule for draw in draws] == [config.sampler.rule | {"maximum": x} for x in maxima]
    assert [draw.max_tokens for draw in draws] == [16, 24, 31]  # 23.5 is rounded
    assert {draw.temperature for draw in draws} == {knobs.draw.temperature}


def test_two_numbers_of_the_rule_that_may_contradict_each_other_are_refused():
    full = "+control.full={knob: sampler.rule.full, fn: linear, start: 2.0, end: 1.0, steps: 3}"
    start = "+control.start={knob: sampler.rule.start, fn: linear, start: 0.3, end: 1.5, steps: 3}"
    configured("sampler=by_entropy", full)
    configured("sampler=by_entropy", start)
    with pytest.raises(ConfigError, match=r"control: full, start .*sampler\.rule: full=.*start="):
        configured("sampler=by_entropy", full, start)


UPDATES = "+control.u={knob: learner.updates_per_rollout, fn: linear, start: 1, end: 4, steps: 4}"


def test_the_number_of_updates_moves_on_the_learner_and_is_said_with_the_most_it_reaches():
    config = configured(UPDATES, "rollout.groups_per_step=4")
    control, tune = control_and_tuner(config)
    assert [tune(control.turn(step), knobs_of(config)).updates for step in (1, 2, 4)] == [1, 2, 4]
    assert controllers.updates_range(1, build_parts(config).controllers) == (1, 4)
    assert controllers.updates_range(1, ()) == (1, 1)
    said = [
        r.text
        for r in remarks(build_objective(config.objective), objective_schedule(config, build_parts(config)))
    ]
    assert not [text for text in said if "r is 1 throughout" in text]
    assert [
        r.text
        for r in remarks(
            build_objective(config.objective), objective_schedule(configured(), build_parts(configured()))
        )
        if "throughout" in r.text
    ]


def test_scoring_fewer_groups_than_updates_is_no_update():
    two = LearnerRole(SimpleNamespace(handles=[None], all=None), 64, 1.0)
    seen = []

    async def scored(call, *, deadline):
        seen.append(call(0, SimpleNamespace(score=SimpleNamespace(remote=lambda micros, extra: len(micros)))))
        return [[{"entropy": np.zeros(2, np.float32)}] * seen[-1]]

    two.gang.all = scored
    one, ids = np.ones(2, np.int32), np.arange(2, dtype=np.int32)
    batch = Batch(ids, one, ids, one, np.ones(2, np.float32))
    found = asyncio.run(two.score(batch, np.array([0, 1]), 4))
    assert seen == [2] and found["entropy"].shape == (2,)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([UPDATES], r"control\.u .*updates_per_rollout .* 4 .*rollout\.groups_per_step=2"),
        (
            [UPDATES, "learner.schedule=cosine", "rollout.groups_per_step=4"],
            r"control\.u .*updates_per_rollout .*learner\.schedule=cosine .*constant.*learner\.lr",
        ),
        ([UPDATES.replace("start: 1", "start: 0")], r"control\.u .*updates_per_rollout .* 0 .* 1$"),
        (
            ["+control.c={knob: learner.max_grad_norm, fn: constant, value: 3}"],
            r"`learner\.max_grad_norm`.*learner\.zero_stage",
        ),
        (
            [
                "+control.c={knob: rollout.max_tokens, fn: pi, signal: entropy/mean, target: 1, gain: 1, "
                "integral: 0, low: 1, high: inf}"
            ],
            r"control\.c .*rollout\.max_tokens .*high=inf",
        ),
    ],
)
def test_a_number_of_updates_that_cannot_be_is_refused_at_start(overrides, said):
    two = [] if any("groups_per_step" in o for o in overrides) else ["rollout.groups_per_step=2"]
    with pytest.raises(ConfigError, match=said):
        configured(*overrides, *two)


TOP = "objective.penalties=[{fn: top_entropy_bonus, coef: 0.001, k: 2}]"


def test_a_whole_number_of_the_objective_is_rounded_and_the_rule_keeps_what_it_had():
    rule = "fn: pi, signal: lag/max, target: 1.0, gain: 0.75, integral: 0.0, low: 1, high: 6"
    config = configured(TOP, f"+control.k={{knob: objective.penalties.0.k, {rule}}}")
    control, tune = control_and_tuner(config)
    took = []
    for step in (1, 2):
        took.append(tune(control.turn(step), knobs_of(config)).objective.penalties[0].keywords["k"])
        noted = control.observe({"lag/max": 0.0})
    assert took == [2, 3] and noted == {"control/k": 2.75}
    assert controllers.describe_controllers(build_parts(config), config.driver.max_lag)[0].endswith(
        "of lag/max, 1 step(s) late, rounded"
    )
    configured(TOP, "+control.k={knob: objective.penalties.0.k, fn: cosine, start: 2, end: 5, steps: 9}")
    with pytest.raises(ConfigError, match=r"control\.k .*objective\.penalties\.0\.k .* 0 .*end=0"):
        configured(TOP, "+control.k={knob: objective.penalties.0.k, fn: linear, start: 2, end: 0, steps: 9}")


def test_under_lag_what_is_drawn_with_is_said_to_be_trained_on_later():
    late = "for groups begun from then on, trained on up to 2 step(s) later (driver.max_lag)"
    hot = configured("control=temperature_band", "driver.max_lag=2")
    assert [
        line.endswith(late) for line in controllers.describe_controllers(build_parts(hot), hot.driver.max_lag)
    ] == [True]
    for rest in (configured("control=temperature_band"), configured("control=lr_cosine", "driver.max_lag=2")):
        assert not any(
            "trained on" in line
            for line in controllers.describe_controllers(build_parts(rest), rest.driver.max_lag)
        )
