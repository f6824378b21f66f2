"""Settings moved in a run reach the engines with the next requests."""

import json
from dataclasses import replace

import pytest

from entroray.cli import knobs, sampling
from entroray.errors import ConfigError
from entroray.loop.turns import Turns
from entroray.objective import build
from entroray.workers.adapters import Generators
from tests.composed import configured
from tests.toy import ToyWorld, driver
from tests.unit.test_control import Knobbed


def test_a_number_of_the_rule_and_the_longest_response_travel_with_the_next_requests():
    rule = "+control.hot={knob: sampler.rule.most, fn: linear, start: 1.3, end: 1.5, steps: 3}"
    longest = "+control.long={knob: rollout.max_tokens, fn: linear, start: 16, end: 31, steps: 3}"
    config = configured("sampler=by_entropy", rule, longest)
    control, tune = knobs.control_of(config), knobs.tuner(config)
    world = ToyWorld(build(config.objective))
    drawn = sampling.shaped(config, config.sampler.temperature, None)
    roles = replace(
        driver(world).roles,
        learner=Knobbed(world, world.objective),
        generator=Generators(None, drawn, 1.0),
    )
    seen = []
    for step in (1, 2, 3):
        asked = tune(control.turn(step), roles)[1].generator.sampling
        seen.append((json.loads(asked.rule), asked.max_tokens))
    most = [1.3, pytest.approx(1.4), 1.5]
    assert [rule for rule, _ in seen] == [config.sampler.rule | {"most": x} for x in most]
    assert [tokens for _, tokens in seen] == [16, 24, 31]  # 23.5 is rounded
    assert drawn.moved({"most": 1.2}, None).max_tokens == config.rollout.max_tokens


def test_two_numbers_of_the_rule_that_may_contradict_each_other_are_refused():
    full = "+control.full={knob: sampler.rule.full, fn: linear, start: 2.0, end: 1.0, steps: 3}"
    start = "+control.start={knob: sampler.rule.start, fn: linear, start: 0.3, end: 1.5, steps: 3}"
    configured("sampler=by_entropy", full)
    configured("sampler=by_entropy", start)
    with pytest.raises(ConfigError, match="full, start may together"):
        configured("sampler=by_entropy", full, start)


def test_a_tool_s_turns_are_drawn_with_what_was_moved():
    drawn = sampling.plain(configured(), 1.0)
    talking = Turns(Generators(None, drawn, 1.0), None, None, 4, None, None).moved({}, 9.0)
    assert talking.generator.sampling.max_tokens == 9 and talking.generator.sampling.rule is None
