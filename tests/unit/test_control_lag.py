"""Settings that move while groups are drawn ahead of training, and after a resume in the midst of it."""

import asyncio
import json
from dataclasses import replace

import pytest

from entroray.objective import build_objective
from entroray.wiring import controllers
from entroray.wiring.parts import build_parts
from tests.composed import configured
from tests.toy import ToyWorld, driver
from tests.unit.test_control import BONUS

HOT = "+control.hot={knob: sampler.temperature, fn: linear, start: 1.0, end: 1.9, steps: 10}"
COUNT = "+control.u={knob: learner.updates_per_rollout, fn: linear, start: 1, end: 2, steps: 10}"


class Watched(ToyWorld):
    """The toy world; its rollouts carry their temperature, its metrics what each step was asked for."""

    async def sample(self, prompt, seeds, draw, after=()):
        drawn = await super().sample(prompt, seeds, draw, after)
        return [replace(r, temperature=draw.temperature) for r in drawn]

    async def update(self, batch, tokens, objective, updates=1, lr=None):
        return await super().update(batch, tokens, objective) | {"asked": float(updates)}

    def step(self, step, metrics, groups, tokens):
        temperatures = {r.temperature for g in groups for r in g.rollouts}
        found = {"coolest": min(temperatures), "hottest": max(temperatures)}
        super().step(step, metrics | found, groups, tokens)


def steered(config, world, max_lag):
    d = driver(world, max_lag=max_lag)
    parts = build_parts(config)
    d.control = controllers.build_control(config, parts.controllers)
    d.tune = controllers.build_tuner(config.objective, config.packages, parts)
    return d


def resumed(config, max_lag, steps):
    """(first world, second world, state between them) of a run broken off in the middle of `steps`."""
    first, second = (Watched(build_objective(config.objective)) for _ in range(2))

    async def run():
        begun = steered(config, first, max_lag)
        await begun.train(steps // 2)
        for name in ("rng", "logits", "served", "version"):
            setattr(second, name, getattr(first, name))
        rest, state = steered(config, second, max_lag), json.loads(json.dumps(begun.committed))
        rest.restore(state)
        await rest.train(steps)
        return state

    return first, second, asyncio.run(run())


@pytest.mark.parametrize("max_lag", [0, 1, 2])
def test_a_moved_temperature_is_trained_on_at_most_the_lag_later(max_lag):
    config = configured(HOT, COUNT, "rollout.groups_per_step=4")
    world = Watched(build_objective(config.objective))
    asyncio.run(steered(config, world, max_lag).train(10))
    late = [round((s["control/hot"] - s["coolest"]) / 0.1) for s in world.steps]
    assert max(late) == max_lag and min(late) == 0 == late[0]
    assert all(s["hottest"] <= s["control/hot"] for s in world.steps)
    assert [s["asked"] for s in world.steps] == [1.0] * 5 + [2.0] * 5, "updates are at once what was asked"


@pytest.mark.parametrize("max_lag", [1, 2])
def test_after_a_resume_what_was_in_flight_is_drawn_anew_with_what_is_in_effect(max_lag):
    first, second, _ = resumed(configured(HOT), max_lag, 10)
    took = [s["control/hot"] for s in first.steps + second.steps]
    assert took == pytest.approx([1.0 + 0.1 * i for i in range(10)])
    again = second.steps[0]
    assert again["coolest"] == again["hottest"] == again["control/hot"] and again["lag/max"] == 0
    assert second.steps[-1]["coolest"] < second.steps[-1]["control/hot"], "drawn ahead once more"
    assert max(s["lag/max"] for s in second.steps) <= max_lag


@pytest.mark.parametrize("max_lag", [1, 2])
def test_a_controller_goes_on_from_what_it_remembers_under_lag(max_lag):
    config = configured("objective=grpo", "control=entropy_pi", BONUS)
    config.control["entropy"] |= {"target": 1.8, "gain": 2.0, "integral": 0.1, "mean": 3, "high": 5.0}
    first, second, state = resumed(config, max_lag, 14)
    alone = controllers.build_control(config, build_parts(config).controllers)
    alone.restore(state["control"])
    for s in second.steps:  # its own arithmetic on the measured entropies, no driver between
        (value,) = alone.turn(int(s["step"])).values()
        alone.observe(s)
        assert s["control/entropy"] == value
    took = [s["control/entropy"] for s in first.steps + second.steps]
    assert len(set(took[3:])) > 5 and len(took) == 14
    assert max(s["lag/max"] for s in first.steps) > 0


def test_members_drawn_anew_are_drawn_as_their_group_was_begun():
    """A member of q1 fails at 1.0, and the temperature moves before it is drawn again."""
    config = configured(HOT, "rollout.groups_per_step=4")
    world, asked = Watched(build_objective(config.objective), bad="q1"), []
    d = steered(config, world, 1)

    async def sample(prompt, seeds, draw, after=()):
        if prompt.id == "q1":
            asked.append(draw.temperature)
            if len(asked) == 2:  # the first step is trained on the other groups meanwhile
                while d.version < 1:
                    await asyncio.sleep(0)
        return await Watched.sample(world, prompt, seeds, draw, after)

    world.sample = sample
    asyncio.run(d.train(3))
    assert asked == [1.0] * 3 and d.knobs.draw.temperature > 1.1
