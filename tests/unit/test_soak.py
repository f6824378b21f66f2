"""What a soak decides by arithmetic: literal schedules, lines, intervals, and what counts as left over."""

from collections import Counter
from itertools import pairwise
from typing import Any

import pytest

from tests.faults import soak
from tests.faults.soak_faults import KINDS, fired
from tests.faults.soak_numbers import Growth, Machine, growth, growths, interval, left_over, schedule


def test_a_seed_gives_the_same_faults_about_every_15_steps_and_every_kind_before_one_comes_twice() -> None:
    drawn = schedule(1, 300, 15, ["a", "b", "c"])
    assert [(fault.step, fault.kind) for fault in drawn[:4]] == [(12, "b"), (29, "a"), (40, "c"), (56, "c")]
    assert drawn == schedule(1, 300, 15, ["a", "b", "c"]) != schedule(2, 300, 15, ["a", "b", "c"])
    steps = [0, *(fault.step for fault in drawn)]
    assert all(10 <= later - step <= 20 for step, later in pairwise(steps))
    assert max(steps) <= 298 and all(0 <= f.victim < 1 and 0 <= f.delay < 1 for f in drawn)
    kinds = [fault.kind for fault in drawn]
    assert all(set(kinds[i : i + 3]) == {"a", "b", "c"} for i in range(0, len(kinds) - 2, 3))


def test_no_fault_comes_so_late_that_nobody_sees_it_heal() -> None:
    assert schedule(1, 12, 15, list(KINDS)) == []
    assert set(Counter(fault.kind for fault in schedule(7, 1000, 15, list(KINDS)))) == set(KINDS)


def test_growth_is_the_rise_of_the_line_of_least_squares_over_the_mean() -> None:
    assert growth([50, 60, 70], [100.0, 102.0, 104.0]) == pytest.approx(4 / 102)
    assert growth([50, 60, 70], [100.0, 130.0, 100.0]) == 0.0
    assert growth([0, 1, 2, 3], [8.0, 6.0, 4.0, 2.0]) == pytest.approx(-6 / 5)
    assert growth([0, 1], [0.0, 0.0]) == 0.0


def samples(pid: int, born: float, turns: range, mb: list[float]) -> list[dict[str, Any]]:
    row = {"role": "engine", "pid": pid, "born": born, "descriptors": 40}
    return [{**row, "turn": turn, "mb": each} for turn, each in zip(turns, mb, strict=True)]


def test_a_process_is_measured_from_the_50th_step_of_its_own_life() -> None:
    steep_then_flat = samples(7, 1.0, range(10, 120, 10), [100, 200, 300, 400, 500, *[600.0] * 6])
    assert growths(steep_then_flat) == [Growth("engine", 7, 100, 600.0, 0.0, 0.0)]
    leaking = growths(samples(7, 1.0, range(0, 110, 10), [*[100.0] * 5, *[100.0, 104, 108, 112, 116, 120]]))
    assert leaking == [Growth("engine", 7, 100, 110.0, round(20 / 110, 4), 0.0)] and not leaking[0].holds


def test_a_process_that_lived_briefly_is_not_measured_nor_is_its_number_mistaken_for_another() -> None:
    brief = samples(7, 1.0, range(0, 60, 10), [100.0] * 6)
    another = samples(7, 2.0, range(60, 120, 10), [900.0] * 6)
    assert growths(brief + another) == [Growth("engine", 7, 50), Growth("engine", 7, 50)]
    assert growths(brief)[0].holds


def test_descriptors_may_not_grow_either() -> None:
    assert Growth("engine", 7, 100, 600.0, 0.0, 0.05).holds
    assert not Growth("engine", 7, 100, 600.0, 0.0, 0.06).holds


def test_the_interval_is_student_t_over_pairs() -> None:
    found = interval([-0.01, 0.0, 0.01])
    assert found is not None and found.mean == 0.0
    assert found.high == -found.low == pytest.approx(4.303 * 0.01 / 3**0.5)
    assert interval([0.02]) is None and interval([]) is None
    with pytest.raises(ValueError, match="11 seeds"):
        interval([0.0] * 11)


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([-0.01, 0.0, 0.01], "holds"),
        ([0.0, 0.0, 0.0], "holds"),
        ([0.1, 0.5, -0.01], "MISS: it reaches"),
        ([-0.01, -0.0101, -0.0102], "MISS: it does not hold 0"),
        ([-0.05, 0.05, 0.0], "MISS: it reaches"),
        ([0.0, 0.05, 0.04], "holds"),
    ],
)
def test_only_the_losing_side_has_a_limit(differences: list[float], verdict: str) -> None:
    found = interval(differences)
    assert found is not None and found.verdict.startswith(verdict), found


def test_what_is_new_and_nobodys_or_ours_is_left_over_and_what_another_holds_is_not() -> None:
    before = Machine(shared={"old": set()}, ports={"127.0.0.1:22": {1}}, descriptors={"socket:[1]": {5}})
    after = Machine(
        processes={"70 ray::Generator": {70}},
        shared={"old": set(), "psm_1": set(), "psm_2": {70}, "psm_3": {99}},
        ports={"127.0.0.1:22": {1}, "127.0.0.1:8265": {70}, "0.0.0.0:80": {99}, "127.0.0.1:9": set()},
        folders={"ray/session_1": set(), "torchinductor_0": set(), "entroray-x": set()},
        descriptors={"socket:[1]": {5}, "socket:[2]": {5}},
    )
    assert left_over(before, after, {5, 70}) == [
        "descriptors: socket:[2]",
        "folders: entroray-x",
        "ports: 127.0.0.1:8265",
        "ports: 127.0.0.1:9",
        "processes: 70 ray::Generator",
        "shared: psm_1",
        "shared: psm_2",
    ]
    assert left_over(before, before, {5, 70}) == []


def test_a_fault_without_its_witness_was_none() -> None:
    assert not fired("kill an idle engine", None)
    assert not fired("kill an idle engine", {"gone": False})
    assert fired("kill an idle engine", {"gone": True})
    assert fired("stop a rank", {"stopped": True, "lives": True})
    assert not fired("stop a rank", {"stopped": True, "lives": False}), "it was killed for being slow"
    assert not fired("stop a rank", {"stopped": False, "lives": True})


def logged(**changed: Any) -> list[dict[str, Any]]:
    """What the supervisor wrote down of a run with one fault that ended one driver."""
    end = {"kind": "end", "time": "2026-11-27T08:00:00.000+00:00", "left_over": [], "ray_mb": 0.6}
    return [
        {"kind": "start", "turn": 0},
        {"kind": "fault", "name": "kill the driver", "fired": True, "turn": 1},
        {"kind": "exit", "code": -9, "explained": True, "turn": 1},
        {"kind": "answer", "name": "kill the driver", "how": "exit -9"},
        {"kind": "start", "turn": 1},
        {"kind": "exit", "code": 0, "explained": True, "turn": 3},
        end | {"ray_sessions": 2} | changed,
    ]


ROWS = [
    {"step": step, "reward/mean": reward, "groups/dropped": 2.0}
    for step, reward in ((1, 0.25), (2, 0.5), (3, 0.75))
]
ABOUT = {"seed": 1, "steps": 3, "every": 15, "commit": "abc"}


def test_a_run_is_kept_with_its_faults_restarts_rewards_and_what_it_dropped() -> None:
    kept = soak.result(logged(), ROWS)
    assert kept["faults"] == {"kill the driver": 1} and kept["restarts"] == 1 and kept["done"] == 3
    assert kept["reward"] == kept["reward_last"] == 0.5 and kept["rewards"] == [0.25, 0.5, 0.75]
    assert kept["dropped"] == {"groups/dropped": 2.0} and kept["date"] == "2026-11-27"
    assert kept["unexplained"] == [] and kept["not_answered"] == 0
    assert list(soak.misses(ABOUT | kept)) == []


def test_an_interruption_is_no_restart_and_leaves_a_fault_without_an_answer() -> None:
    fault = {"kind": "fault", "name": "stop a rank", "fired": True, "turn": 1}
    ended = [{"kind": "interrupted", "open": True, "turn": 2}, {"kind": "start", "turn": 2}]
    kept = soak.result([*logged()[:-2], fault, *ended, *logged()[-2:]], ROWS)
    assert kept["restarts"] == 1 and kept["not_answered"] == 0


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ({"done": False}, "not each once of 3 steps"),
        ({"done": 2}, "2 of 3 steps"),
        ({"not_fired": ["kill a rank"]}, "not fired: kill a rank"),
        ({"not_answered": 1}, "1 faults without an answer"),
        ({"unexplained": [4]}, "a driver ended with 4"),
        ({"left_over": ["shared: psm_1"]}, "left over: shared: psm_1"),
        ({"growths": [Growth("engine", 7, 100, 600.0, 0.06, 0.0)._asdict()]}, "grown by +6.0 %"),
    ],
)
def test_each_promise_that_is_not_kept_is_called_a_miss(broken: dict[str, Any], said: str) -> None:
    run = ABOUT | soak.result(logged(), ROWS) | broken
    lines, holds = soak.table([run])
    assert not holds and any(
        line.startswith("MISS seed 1, a fault every 15: ") and said in line for line in lines
    )


def test_a_step_done_twice_or_left_out_is_seen() -> None:
    assert soak.result(logged(), [*ROWS[:2], ROWS[1]])["done"] is False


def test_the_table_compares_the_mean_reward_of_each_seed_with_and_without_faults() -> None:
    hurt = [
        ABOUT | soak.result(logged(), ROWS) | {"seed": seed, "reward": 0.5 + seed / 100} for seed in (1, 2)
    ]
    calm = [run | {"every": 0, "reward": 0.515, "faults": {}} for run in hurt]
    lines, holds = soak.table([*hurt, *calm])
    assert lines[-1].startswith(
        "reward with faults minus without: -0.0050, +0.0050; mean +0.0000, 95 % from -0.0635"
    )
    assert not holds, "two seeds are too few for an interval of 0.05"
    lines, holds = soak.table([hurt[0], calm[0]])
    assert holds and "no interval from fewer than two seeds" in lines[-1]
