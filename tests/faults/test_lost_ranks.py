"""Ranks that die, drivers that are killed or told to stop at any moment: every step once, and the same."""

import os
import random
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from entroray.cli.verify_resume import differences
from tests.faults.record import Fault
from tests.ray.processes import (
    descendants,
    is_dead,
    kinds,
    left_over,
    printed_at_end,
    start,
    step_reached,
    steps,
    until,
)
from tests.ray.stack import FinishedRun, lines

SMALL = [
    *("train", "experiment=quickstart", "objective=grpo", "run.steps=6", "rollout.groups_per_step=4"),
    *("learner.lr_high=true", "observe.tokens.every=1", "observe.report=false", "evaluate.final=false"),
    *("run.resume=auto", "++data.settings.size=2000", "data.max_prompt=128", "generator.replicas=1"),
]

START = 300.0
"""Seconds that a busy machine may take to the first steps of a run."""


def doing(run: subprocess.Popen, what: str) -> list[psutil.Process]:
    """Actors of a run that are at it now, as `LearnerRank.update`: Ray names it in the process title."""
    found = []
    for process in descendants(run):
        try:
            if what in " ".join(process.cmdline()) and not is_dead(process):
                found.append(process)
        except psutil.Error:  # it has ended meanwhile
            continue
    return found


def kill_in(run: subprocess.Popen, what: str, reached: Callable[[], bool]) -> int:
    """SIGKILL for the last actor found at it, once `reached()`; its process."""
    until(run, reached, START)
    caught = list[psutil.Process]()
    until(run, lambda: caught.extend(doing(run, what)) or caught)
    caught[-1].kill()
    return int(caught[-1].pid)


def happened(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [e["fields"] for e in lines(folder / "events.jsonl") if e["kind"] == kind]


@pytest.mark.fault("F05", "SIGKILL to the only rank in an update, after a checkpoint")
def test_a_run_whose_rank_was_killed_in_an_update_is_the_run_without(
    fault: Fault, finished_run: FinishedRun, tmp_path: Path
) -> None:
    """Bit for bit: metrics, token records and weights; step 3 is undone with what was drawn for step 4."""
    folder, shared = tmp_path / "run", set(os.listdir("/dev/shm"))
    process = start("train", *finished_run.overrides, f"run.dir={folder}")
    victim = kill_in(process, "LearnerRank.update", step_reached(folder, 3))
    fault.fired(f"process {victim} was in LearnerRank.update")
    until(process, lambda: "rolled_back" in kinds(folder), START)
    fault.saw("learner_lost, then rolled_back")
    until(process, step_reached(folder, 5), START)
    fault.goes_on(
        "step 5; metrics, records, weights as without", lost="nothing but the time since the checkpoint"
    )
    ours = descendants(process)
    printed = printed_at_end(process, 0)
    (lost,), (back,) = happened(folder, "learner_lost"), happened(folder, "rolled_back")
    assert "learner rank 0" in lost["error"] and lost["restarts_left"] == 0
    assert back["step"] in (2, 4) and back["groups"] % 8 == 0 and back["groups"] and back["tokens"] > 0
    assert f"the run goes on after step {back['step']}" in printed
    assert steps(folder) == [1, 2, 3, 4, 5, 6]
    assert differences(finished_run.folder, folder, after=0) == []
    assert left_over(ours, shared) == []


@pytest.mark.faults
@pytest.mark.fault("F05", "SIGKILL to one of two ranks before any checkpoint, and to another after it")
def test_of_two_ranks_one_that_dies_before_any_checkpoint_starts_the_run_over_and_a_second_ends_it_with_4(
    fault: Fault, tmp_path: Path, model: str
) -> None:
    folder = tmp_path / "run"
    process = start(*SMALL, "learner.ranks=2", "run.steps=30", f"run.dir={folder}", f"model.path={model}")
    victim = kill_in(process, "LearnerRank.update", step_reached(folder, 2))
    fault.fired(f"process {victim} was in LearnerRank.update")
    until(process, lambda: "rolled_back" in kinds(folder), START)
    fault.saw("learner_lost, then rolled_back to step 0")
    assert happened(folder, "rolled_back")[0]["step"] == 0
    kill_in(process, "LearnerRank.", lambda: steps(folder)[-1:] == [3])
    fault.goes_on("step 3; the second death ends it with 4", lost="the steps before, said")
    printed = printed_at_end(process, 4)
    assert "the run goes on from step 0" in printed
    assert "learner.restarts=1 is used up" in printed and "run.resume=auto" in printed
    assert len(happened(folder, "learner_lost")) == 2
    assert steps(folder) == [*range(1, len(steps(folder)) + 1)]


@pytest.mark.faults
@pytest.mark.fault("F27", "SIGKILL to the driver three times at random moments, then the same command")
@pytest.mark.timeout(900)
def test_a_driver_killed_at_random_moments_and_resumed_makes_every_step_once(
    fault: Fault, finished_run: FinishedRun, tmp_path: Path
) -> None:
    """Three times, at moments of a seed that `ENTRORAY_FAULT_SEED` gives."""
    folder, seed = tmp_path / "run", int(os.environ.get("ENTRORAY_FAULT_SEED", "0"))
    dice, again = random.Random(seed), ("train", *finished_run.overrides, "run.resume=auto")
    for kill in range(3):
        process = start(*again, f"run.dir={folder}", "checkpoint.every=1")
        began, step = len(kinds(folder)), (steps(folder) or [0])[-1] + dice.randrange(2)
        until(process, lambda began=began: len(kinds(folder)) > began, START)
        until(process, lambda step=step: (steps(folder) or [0])[-1] >= step, START)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=dice.uniform(0.0, 0.4))
        ours = descendants(process)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=30)
        fault.fired(f"killed {kill + 1} times, last behind step {(steps(folder) or [0])[-1]}")
        assert left_over(ours, set(os.listdir("/dev/shm"))) == [], f"kill {kill} of seed {seed}"
    fault.saw("every process of it has ended")
    printed_at_end(start(*again, f"run.dir={folder}", "checkpoint.every=1"), 0)
    fault.goes_on("the run's end; steps 1 to 6 once each, as in a run that nobody killed")
    assert steps(folder) == [1, 2, 3, 4, 5, 6]
    assert [n for n in differences(finished_run.folder, folder, after=0) if "eval/" not in n] == []


@pytest.mark.faults
@pytest.mark.fault("F26", "SIGTERM in {at}")
@pytest.mark.parametrize("at", ["LearnerRank.score", "LearnerRank.update", "LearnerRank.save", "evaluation"])
def test_sigterm_saves_what_is_whole_and_ends_with_143(
    fault: Fault, tmp_path: Path, model: str, at: str
) -> None:
    folder = tmp_path / "run"
    evaluated = (
        ["evaluate.every=2", "evaluate.samples=32", "evaluate.prompts=96"] if at == "evaluation" else []
    )
    saved = ["checkpoint.every=1"] if at.endswith("save") else []
    settings = [*SMALL, *evaluated, *saved, "run.steps=1000", f"run.dir={folder}"]
    process = start(*settings, f"model.path={model}")
    until(process, step_reached(folder, 1), START)
    if at == "evaluation":  # of step 2, whose weights are served
        until(process, lambda: doing(process, "LearnerRank.sync"))
        until(process, lambda: not doing(process, "LearnerRank.sync") and doing(process, "Generator.sample"))
    else:
        until(process, lambda: doing(process, at))
    process.send_signal(signal.SIGTERM)
    fault.fired(f"{at} was under way, behind step {steps(folder)[-1]}")
    printed = printed_at_end(process, 143, 60)
    fault.saw("ends with 143")
    last = steps(folder)[-1]
    assert "SIGTERM: saving a checkpoint" in printed and "run.resume=auto" in printed
    assert (folder / "checkpoints" / f"step-{last:06d}" / "COMMITTED").exists()
    assert happened(folder, "stopped")[0]["step"] == last
    fault.goes_on(f"a checkpoint of step {last}", lost="what no update had begun to use")
