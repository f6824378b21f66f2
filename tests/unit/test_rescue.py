"""What is done for all-wrong groups, and for slow and looping responses: literal numbers, and resumes."""

import asyncio
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from entroray.data.prompts import PromptStream
from entroray.metrics import early_stop
from entroray.metrics.diversity import Loops
from entroray.objective import build_objective
from entroray.rollout.replay import Replay
from entroray.rollout.second_draw import SecondDraw
from entroray.rollout.selection import Selection
from entroray.rollout.stream import Dropped
from entroray.train.driver import Driver
from entroray.types import Draw, Group, MaskReason, Prompt, Rollout, SamplerNotes, Span, Status, Verdict
from tests.cases import ROWS
from tests.documented import CHOSEN, matches
from tests.toy import ToyWorld, driver, trained
from tests.unit.test_choices import PROMPTS, InOrder, group, rollout

PLAIN = Draw(1.0, 2)
WEIGHED = {"correction": {"fn": "truncated_importance"}}

# Replay.


def test_the_newest_success_of_a_prompt_mostly_wrong_is_kept_within_bounds() -> None:
    replay = Replay(tokens=5, rare=0.25)
    replay.observe(group("p0", 0, 0, 0, 1))
    replay.observe(group("p1", 0, 0, 1, 1))  # not rare
    replay.observe(group("p2", 0, 0, 0, 0))
    assert list(replay.kept) == ["p0"] and replay.kept["p0"][0].replayed
    replay.observe(group("p3", 0, 1, 0, 0))
    replay.observe(group("p0", 0, 0, 1, 0, version=4))  # newer: p3 is now kept longest
    assert list(replay.kept) == ["p3", "p0"] and replay.kept["p0"][0].version == 4
    replay.observe(group("p4", 0, 0, 0, 1))  # six tokens: the one kept longest leaves
    assert list(replay.kept) == ["p0", "p4"]
    replay.observe(group("p0", 0, 0, 1, 1))  # answered often enough
    assert list(replay.kept) == ["p4"]


def test_an_all_wrong_group_gets_the_success_of_old_and_stays_all_wrong_as_drawn() -> None:
    replay = Replay(tokens=100, rare=0.5)
    replay.observe(group("p0", 0, 1, version=3))
    for as_it_was in (group("p0", 0, 1), group("p1", 0, 0)):
        assert replay.insert_success(as_it_was) is as_it_was
    branched = group("p0", 0, 0)
    branched = replace(branched, rollouts=(branched.rollouts[0], rollout(parent=0)))
    assert replay.insert_success(branched) is branched
    mended = replay.insert_success(group("p0", 0, 0, 0, version=7))
    assert [r.replayed for r in mended.rollouts] == [False, False, True]
    assert mended.correct.tolist() == [0, 0, 1] and mended.share_right == 0
    assert [r.replayed for r in mended.replaced] == [False], "the one that made room"
    assert mended.version == 7 and mended.rollouts[-1].version == 3
    assert replay.metrics([mended, group("p1", 0, 1, 1)], [], 9) == pytest.approx(
        {"replay/kept": 1, "replay/groups": 1 / 2, "replay/share": 2 / 12, "replay/age": 5}
    )
    replay.observe(mended)
    assert replay.kept["p0"][0].version == 3, "a replayed success is not a new one"


def test_a_second_draws_success_is_rare_by_both_draws() -> None:
    replay = Replay(tokens=100, rare=0.25)
    replay.observe(replace(group("p0", 1, 0), earlier=(group("p0", 0, 0),)))
    assert "p0" in replay.kept


def test_what_is_kept_survives_the_checkpoint_bit_for_bit() -> None:
    notes = np.array([[0.1, 0.2], [1e-8, 3.0], [1.2, np.nan]], np.float32)
    odd = rollout(notes=SamplerNotes(*notes), spans=(Span(0, 1, MaskReason.TOOL),))
    replay, again = Replay(100, 0.5), Replay(100, 0.5)
    kept = Verdict(0.7, True, answer="7", parts={"form": 0.1})
    replay.observe(Group(Prompt("p0", "", (0,), ""), (odd, odd), (kept, Verdict(0.0, False))))
    again.restore(json.loads(json.dumps(replay.state())))
    old, new = replay.kept["p0"], again.kept["p0"]
    assert new[1] == old[1] == kept and new[0].spans == odd.spans and new[0].replayed
    assert new[0].notes is not None
    for name in ("token_ids", "logprobs", "versions"):
        a, b = getattr(old[0], name), getattr(new[0], name)
        assert a.dtype == b.dtype and (a == b).all()
    for name, column in zip(("entropy", "varentropy", "temperature"), notes, strict=True):
        np.testing.assert_array_equal(getattr(new[0].notes, name), column)


def replayed(steps: int, state: dict | None = None) -> tuple[ToyWorld, dict[int, dict]]:
    """Four prompts again and again; one of each group is right in steps 1 and 4, none otherwise."""
    world = ToyWorld(build_objective(ROWS["grpo"] | WEIGHED))

    async def judge(prompt: Prompt, rollouts: list) -> list[Verdict]:
        lucky = world.version in (0, 3)
        return [Verdict(x, bool(x)) for x in (float(lucky and i == 2) for i in range(len(rollouts)))]

    world.judge = judge  # type: ignore[method-assign]
    replay = Replay(10_000, 0.25)
    choice = Selection({"replay": replay}, SecondDraw(replay=replay), (replay.metrics,))

    world.version = state["version"] if state else 0
    d = driver(world, prompts=PromptStream(PROMPTS[:4], seed=0), selection=choice)
    return world, trained(d, steps, state)


def test_replay_trains_on_old_answers_and_reports_the_new_ones_alone() -> None:
    world, states = replayed(5)
    told = [(s["correct/mean"], s["replay/groups"], s["correct/trained_mean"]) for s in world.steps]
    assert told == [(1 / 8, 0, 1 / 8), (0, 1, 1 / 8), (0, 1, 1 / 8), (1 / 8, 0, 1 / 8), (0, 1, 1 / 8)]
    assert [s.get("replay/age") for s in world.steps] == [None, 1, 2, None, 1]
    assert {s["lag/max"] for s in world.steps} == {0}, "they are exempt from the lag, which is of the rest"
    assert world.steps[1]["groups/all_wrong"] == 1 and world.steps[1]["replay/share"] == 1 / 8
    assert all(matches(name, CHOSEN) for name in world.steps[1] if name.startswith("replay/"))
    assert states[5]["observers"]["replay"].keys() == {"p0", "p1", "p2", "p3"}


def test_replay_goes_on_identically_after_a_resume() -> None:
    _, states = replayed(5)
    resumed, later = replayed(5, states[2])
    assert [s["replay/age"] for s in resumed.steps[:1]] == [2]
    assert later[3]["observers"] == states[3]["observers"]


# Second draws, and the first to finish.


class Scripted(ToyWorld):
    """Even prompts are right in their own draw, odd ones in a hotter one alone, p3 never; two are slow."""

    def __init__(self) -> None:
        super().__init__(build_objective(ROWS["grpo"] | WEIGHED))
        self.asked: list[tuple[str, float, tuple[int, ...]]] = []

    async def sample(self, prompt: Prompt, seeds: Any, draw: Draw, after: Any = ()) -> list[Rollout]:
        self.asked.append((prompt.id, draw.factor, tuple(seeds)))
        found = [
            replace(r, temperature=draw.factor) for r in await super().sample(prompt, seeds, draw, after)
        ]
        slow = range(1, 1 + len(seeds) - (draw.enough or len(seeds)))
        left = replace(found[0], token_ids=np.empty(0, np.int32), status=Status.ABANDONED)
        return [left if i in slow else r for i, r in enumerate(found)]

    async def judge(self, prompt: Prompt, rollouts: Any) -> list[Verdict]:
        hot = rollouts[0].temperature > 1
        right = prompt.id != "p3" and (hot or int(prompt.id[1:]) % 2 == 0)
        return [Verdict(x, bool(x)) for x in (float(right and i < 2) for i in range(len(rollouts)))]


def test_an_all_wrong_group_is_drawn_again_hotter_at_once_and_both_draws_count() -> None:
    world, second_draw = Scripted(), SecondDraw(1.5)
    choice = Selection({}, second_draw, (second_draw.metrics,))
    asyncio.run(driver(world, prompts=InOrder(), selection=choice).train(1))
    assert [(name, factor) for name, factor, _ in world.asked] == [
        *((f"p{i}", 1.0) for i in range(4)),
        *(("p1", 1.5), ("p3", 1.5)),
    ]
    assert len({seed for _, _, drawn in world.asked for seed in drawn}) == 6 * 8
    (told,) = world.steps
    assert told["correct/mean"] == pytest.approx((3 * 0.25 + 3 * 0) / 6), "six draws: three hold two of eight"
    assert told["correct/trained_mean"] == pytest.approx(3 * 0.25 / 4)
    assert told["groups/all_wrong"] == 0.5
    second = {name: value for name, value in told.items() if name.startswith("second/")}
    assert second == {"second/groups": 0.5, "second/right": 0.125, "second/mended": 0.5}
    assert all(matches(name, CHOSEN) for name in second)


def test_a_second_draw_that_gives_no_group_leaves_the_first() -> None:
    first = group("p0", 0, 0)

    async def again(draw: Draw) -> Dropped:
        return Dropped("engine gone")

    assert asyncio.run(SecondDraw(1.2)(first, PLAIN, again)) is first
    dropped = Dropped("timeout")
    assert asyncio.run(SecondDraw(1.2)(dropped, PLAIN, again)) is dropped


def test_a_failed_prompt_is_drawn_hotter_next_time_up_to_a_bound_until_one_answer_is_right() -> None:
    second_draw, prompt = SecondDraw(1.2, "next_time"), Prompt("p0", "", (0,), "")
    found = []
    for right in (0, 0, 0, 1, 0):
        second_draw.observe(group("p0", 0, right))
        found.append(second_draw.first(prompt, PLAIN).factor)
    assert found == pytest.approx([1.2, 1.44, 1.5, 1.0, 1.2])
    assert second_draw.first(PROMPTS[1], PLAIN) == PLAIN, "another prompt"
    at_once = SecondDraw(1.2)
    at_once.observe(group("p0", 0, 0))
    assert at_once.state() == {}


def next_time(world: Scripted) -> Driver:
    second_draw = SecondDraw(1.2, "next_time")
    choice = Selection({"second_draw": second_draw}, second_draw)
    return driver(world, prompts=PromptStream(PROMPTS[:4], seed=0), selection=choice)


def test_the_driver_draws_failed_prompts_hotter_when_they_come_up_again_and_after_a_resume() -> None:
    world, resumed = Scripted(), Scripted()
    states = trained(next_time(world), 3)
    heat = lambda asked: sorted((name, factor) for name, factor, _ in asked)
    cool, hot = [("p0", 1.0), ("p2", 1.0)], [("p1", 1.2), ("p3", 1.2)]
    assert heat(world.asked[:4]) == sorted((f"p{i}", 1.0) for i in range(4)), "nothing is drawn twice"
    assert heat(world.asked[4:8]) == sorted(cool + hot)
    assert heat(world.asked[8:]) == sorted([*cool, ("p1", 1.0), ("p3", 1.44)]), "p1 was right when hotter"
    trained(next_time(resumed), 3, states[1])
    assert resumed.asked == world.asked[4:]


def test_the_first_to_finish_make_the_group_and_the_rest_are_no_failures() -> None:
    world = Scripted()
    choice = Selection(metrics=(early_stop.abandoned_metrics,))
    asyncio.run(driver(world, prompts=InOrder(), selection=choice, extra=2).train(1))
    assert {len(drawn) for _, _, drawn in world.asked} == {10}
    (told,) = world.steps
    assert told["early/abandoned"] == 0.2 and told["groups/dropped"] == 0 and world.events == []
    assert told["verdicts/failed"] == 0 and told["length/mean"] == 2


def test_the_bias_of_taking_the_first_is_at_least_what_is_said() -> None:
    short = replace(group("p0", 0, 1), rollouts=(rollout(length=2), rollout(length=4)))
    left = rollout(length=0, status=Status.ABANDONED), rollout(length=6, status=Status.ABANDONED)
    told = early_stop.abandoned_metrics([], [replace(short, abandoned=left), group("p1", 0, 1)], 1)
    assert told == pytest.approx(
        {
            "early/abandoned": 2 / 6,
            "early/length_kept": 10 / 4,
            "early/length_drawn": (10 + 4 + 6) / 6,
            "early/length_bias": 2.5 / (20 / 6) - 1,
        }
    )
    assert all(matches(name, CHOSEN) for name in told)


@pytest.mark.parametrize(
    ("ids", "looping"),
    [
        ([7, 7, 7], True),
        ([1, 7, 7, 7], True),
        ([7, 7, 7, 1], False),
        ([7, 7], False),
        ([1, 2, 1, 2, 1, 2], True),
        ([2, 1, 2, 1, 2], False),
        ([1, 2, 3] * 3, True),
        ([1, 2, 3, 4] * 3, False),
        ([], False),
    ],
)
def test_a_loop_is_the_last_tokens_said_again_and_again(ids: list[int], looping: bool) -> None:
    loops = Loops(count=3, shortest=1, longest=3)
    assert loops(ids) == looping
    wrong = replace(group("p0", 0), rollouts=(replace(rollout(), token_ids=np.array(ids, np.int32)),))
    assert early_stop.repetition_metrics(loops)([], [wrong, group("p1", 0)], 1) == {
        "repetition/looped": looping / 2
    }


def test_a_shortest_loop_spares_runs_of_one_token() -> None:
    assert not Loops(count=3, shortest=2, longest=4)([7] * 5)
    assert Loops(count=3, shortest=2, longest=4)([7] * 6)


# Surplus.


@pytest.mark.parametrize(
    ("max_lag", "surplus", "dropped", "held"),
    [
        *((0, "by_lag", True, False), (0, "drop", True, False)),
        *((1, "by_lag", False, True), (1, "keep", False, True), (1, "drop", True, False)),
    ],
)
def test_surplus_is_kept_where_the_lag_allows_it(
    max_lag: int, surplus: str, dropped: bool, held: bool
) -> None:
    world = ToyWorld(build_objective(ROWS["grpo"] | {"keep": {"fn": "informative"}}))
    asyncio.run(driver(world, groups_per_step=3, max_lag=max_lag, surplus=surplus).train(8))
    assert (world.steps[-1]["groups/surplus"] > 0) == dropped
    assert any(s["groups/held"] > 0 for s in world.steps) == held
    assert max(s["lag/max"] for s in world.steps) <= max_lag
    with pytest.raises(ValueError, match=r"rollout\.surplus=keep .*driver\.max_lag .*0"):
        driver(world, max_lag=0, surplus="keep")
