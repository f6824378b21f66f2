"""Who is frozen, by the beats of a process and a clock that runs only while somebody looks."""

import math
import os
import signal
import subprocess
import time
from collections.abc import Iterable

import pytest

from entroray.train.pulse import TURN, Beat, Pulse, Turns
from entroray.workers.verifier import _beat_of

WORK = 60.0


def frozen_after(
    beats: Iterable[Beat | None], pulse: Pulse, step: float = 1.0, allowed: float = 0.0
) -> float:
    """Seconds until `pulse` is found frozen by one beat every `step`; infinite if it never is."""
    return next((i * step for i, beat in enumerate(beats) if pulse.look(beat, step, allowed)), math.inf)


def test_twenty_seconds_without_a_beat_are_frozen_and_nineteen_are_not() -> None:
    assert frozen_after([Beat(1, 5)] * 20, Pulse()) == math.inf, "19 s since the first look"
    assert frozen_after([Beat(1, 5)] * 60, Pulse()) == 20.0


def test_one_that_has_not_turned_yet_has_sixty_seconds_and_one_without_a_first_beat_is_its_starters() -> None:
    assert frozen_after([Beat(1, 0)] * 100, Pulse()) == 60.0
    assert frozen_after([None] * 10_000, Pulse()) == math.inf


def test_a_thread_that_stays_in_one_turn_is_frozen_after_sixty_seconds_though_its_process_beats() -> None:
    assert frozen_after([Beat(i, 7, WORK) for i in range(200)], Pulse()) == 60.0


def test_a_thread_that_rests_or_whose_call_has_a_deadline_is_never_frozen_by_its_turns() -> None:
    assert frozen_after([Beat(i, 7, None) for i in range(5000)], Pulse()) == math.inf
    assert frozen_after([Beat(i, 7, math.inf) for i in range(5000)], Pulse()) == math.inf


def test_a_turn_may_last_ten_times_the_longest_before_it() -> None:
    long = [Beat(i, 1 + i // 12, WORK) for i in range(40)]  # turns of 12 s
    stuck = [Beat(i, 4, WORK) for i in range(40, 400)]
    pulse = Pulse()
    assert frozen_after(long, pulse) == math.inf and pulse.longest == 12.0
    assert frozen_after(stuck, pulse) == 120.0 - 4.0, "4 s of it were in `long`"


def test_a_rest_is_no_turn() -> None:
    rest = [Beat(i, 3, None) for i in range(500)]
    pulse = Pulse()
    frozen_after([*rest, *(Beat(i, 4 + i, WORK) for i in range(500, 510))], pulse)
    assert pulse.longest == 1.0, "one look"


def test_an_update_of_weights_may_take_longer_and_is_no_measure_for_turns() -> None:
    pulse = Pulse()
    assert frozen_after([Beat(i, 7, WORK) for i in range(150)], pulse, allowed=180.0) == math.inf
    assert frozen_after([Beat(150, 8, WORK)], pulse, allowed=180.0) == math.inf
    assert pulse.longest == 0.0
    assert frozen_after([Beat(i, 8, WORK) for i in range(151, 300)], pulse) == 59.0


def test_a_turn_that_an_update_began_has_its_leave_until_it_ends() -> None:
    pulse = Pulse()
    assert frozen_after([Beat(i, 7, WORK) for i in range(100)], pulse, allowed=180.0) == math.inf
    assert frozen_after([Beat(100 + i, 7, WORK) for i in range(50)], pulse) == math.inf, (
        "the lock is free again"
    )
    assert frozen_after([Beat(150, 8, WORK)], pulse) == math.inf and pulse.longest == 0.0
    assert frozen_after([Beat(151 + i, 8, WORK) for i in range(100)], pulse) == 59.0


def test_a_silence_may_be_twice_the_longest_that_ended_and_sixty_seconds_until_work_is_done() -> None:
    pulse = Pulse()
    assert frozen_after([Beat(1, 5, math.inf)] * 50, pulse) == math.inf
    assert frozen_after([Beat(2, 6, WORK)] * 200, pulse) == 98.0


def test_a_thread_that_died_in_a_living_process_is_told_at_once() -> None:
    assert (
        Pulse().look(Beat(1, 3, WORK, "the engine's thread died: boom"), 1.0)
        == "the engine's thread died: boom"
    )


@pytest.mark.parametrize("period", [1.0, 10.0, 20.0])
def test_a_process_that_runs_a_tenth_of_the_time_is_never_frozen(period: float) -> None:
    """It beats where it runs and 2 s have passed since the last; a turn of 5 s takes it 50."""

    def beats() -> Iterable[Beat]:
        serial, beaten, ran = 0, -2.0, 0.0
        for now in (tick * 0.1 for tick in range(20_000)):
            if now % period < period / 10 - 1e-9:
                ran += 0.1
                if now - beaten >= 2.0:
                    serial, beaten = serial + 1, now
            yield Beat(serial, 1 + int(ran / 5.0), WORK)

    assert frozen_after(beats(), Pulse(), step=0.1) == math.inf


def test_the_first_work_of_a_rank_proves_what_later_work_may_take() -> None:
    turns = Turns()
    with turns.working():
        assert turns.limit == math.inf
    with turns.working(proof=True):
        assert turns.limit == math.inf
    assert turns.limit is None and turns.count == 4
    with turns.working():
        assert turns.limit == TURN


def test_work_that_fails_leaves_the_thread_at_rest_and_proves_nothing() -> None:
    turns = Turns()
    with pytest.raises(KeyError), turns.working(proof=True):
        raise KeyError
    assert turns.limit is None and turns.usual == math.inf


def test_a_process_that_is_stopped_shows_the_same_until_it_runs_again() -> None:
    process = subprocess.Popen(["sleep", "60"])
    try:
        assert _beat_of(process.pid) != _beat_of(process.pid), "one that could run is not frozen"
        os.kill(process.pid, signal.SIGSTOP)
        end = time.monotonic() + 10.0
        while _beat_of(process.pid) != (seen := _beat_of(process.pid)) and time.monotonic() < end:
            time.sleep(0.01)
        assert _beat_of(process.pid) == seen
        for number in (signal.SIGCONT, signal.SIGSTOP):
            os.kill(process.pid, number)
            time.sleep(0.05)
        assert _beat_of(process.pid) != seen, "it ran between two looks"
    finally:
        process.kill()
        process.wait(timeout=10.0)
