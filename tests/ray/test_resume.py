"""Killed and stopped runs go on: every step once, the prompts they would have had, and what they printed."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from entroray.observe.trackers import TrackedRun, tensorboard
from tests.ray.processes import (
    beyond_loopback,
    descendants,
    left_over,
    printed_at_end,
    start,
    step_reached,
    steps,
    until,
)
from tests.ray.stack import FinishedRun, lines, metrics
from tests.records import query

BASE = [
    *("train", "experiment=quickstart", "objective=grpo", "run.steps=6", "rollout.groups_per_step=4"),
    "learner.lr_high=true",
    *("observe.tokens.every=1", "observe.report=false", "evaluate.final=false", "checkpoint.every=2"),
    *("run.resume=auto", "++data.settings.size=2000", "data.max_prompt=128"),
    *("generator.replicas=1", "evaluate.every=2", "evaluate.prompts=16", "evaluate.samples=2"),
    "+control.high={knob: objective.surrogate.high, fn: band, signal: entropy/mean, at_least: 9, at_most: 9, "
    "step: 0.1, low: 0.2, high: 1}",
]


def prompts(folder: Path) -> dict[int, set[str]]:
    """Step -> the prompts it was trained on."""
    rows = query(f"select distinct step, prompt_id from '{folder}/tokens/*.parquet'")
    return {step: {r["prompt_id"] for r in rows if r["step"] == step} for step in {r["step"] for r in rows}}


def steady(row: dict[str, Any]) -> dict[str, Any]:
    """What the clock and an evaluation have no part in."""
    return {k: v for k, v in row.items() if not k.startswith(("seconds/", "idle/", "tokens/", "eval/"))}


@dataclass(frozen=True)
class Resumed:
    """A run killed and started again: where it is, what it was caught at, what it printed the second time."""

    folder: Path
    listening: set[str]
    left_over: list[str]
    printed: str


@pytest.fixture(scope="module")
def resumed(finished_run: FinishedRun, tmp_path_factory: pytest.TempPathFactory) -> Resumed:
    """The finished run once more, not evaluated, and killed after step 3."""
    folder, shared = tmp_path_factory.mktemp("runs") / "killed", set(os.listdir("/dev/shm"))
    again = ["train", *finished_run.overrides, "evaluate.every=0", "run.resume=auto", f"run.dir={folder}"]
    process = start(*again)
    until(process, step_reached(folder, 3))
    ours = descendants(process)
    listening = beyond_loopback(ours)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    left = left_over(ours, shared)
    return Resumed(folder, listening, left, printed_at_end(start(*again), 0))


def test_a_run_listens_on_loopback(resumed: Resumed) -> None:
    assert resumed.listening == set()


def test_a_killed_driver_leaves_nothing(resumed: Resumed) -> None:
    assert resumed.left_over == []


def test_a_killed_run_goes_on_after_its_last_checkpoint(finished_run: FinishedRun, resumed: Resumed) -> None:
    assert "going on after step" in resumed.printed
    assert steps(resumed.folder) == [1, 2, 3, 4, 5, 6]
    assert prompts(resumed.folder) == prompts(finished_run.folder)
    assert "high: objective.surrogate.high <- band(" in resumed.printed
    high = [row["control/high"] for row in metrics(resumed.folder)]
    assert high == pytest.approx([0.2, 0.3, 0.4, 0.5, 0.6, 0.7])


def test_held_out_accuracy_is_measured_and_changes_nothing(
    finished_run: FinishedRun, resumed: Resumed
) -> None:
    rows = metrics(finished_run.folder)
    assert [row["step"] for row in rows if "eval/greedy" in row] == [2, 4, 6]
    assert {"eval/greedy", "eval/pass@1", "eval/pass@2"} <= rows[-1].keys()
    events = lines(finished_run.folder / "events.jsonl")
    assert [e["fields"]["step"] for e in events if e["kind"] == "evaluation"] == [0]
    assert [steady(row) for row in metrics(resumed.folder)] == [steady(row) for row in rows]


@pytest.mark.slow
def test_a_resumed_run_is_the_same_run_bit_for_bit(tmp_path: Path, model: str) -> None:
    settings = [*BASE[1:], f"model.path={model}", f"--dir={tmp_path}/both", "--steps=3"]
    command = [sys.executable, "-m", "entroray", "verify-resume", *settings]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "3 + 3 steps equal 6" in done.stdout


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_a_signal_saves_a_checkpoint_and_ends_with_its_code(
    tmp_path: Path, model: str, number: signal.Signals
) -> None:
    folder = tmp_path / "run"
    process = start(*BASE, f"run.dir={folder}", f"model.path={model}")
    until(process, step_reached(folder, 1))
    os.kill(process.pid, number)
    began = time.monotonic()
    said = printed_at_end(process, 128 + number, 60)
    assert time.monotonic() - began < 30
    last = steps(folder)[-1]
    saved = folder / "checkpoints" / f"step-{last:06d}"
    assert (saved / "COMMITTED").exists() and "run.resume=auto" in said


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_before_the_first_step_ends_with_its_code_too(
    tmp_path: Path, model: str, number: signal.Signals
) -> None:
    deaf = lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell starts `... &`
    process = start(*BASE, f"run.dir={tmp_path}/run", f"model.path={model}", first=deaf)
    while not any("raylet" in p.name() for p in psutil.Process(process.pid).children(recursive=True)):
        assert process.poll() is None
        time.sleep(0.05)
    ours, began = psutil.Process(process.pid).children(recursive=True), time.monotonic()
    os.kill(process.pid, number)
    printed_at_end(process, 128 + number, 60)
    psutil.wait_procs(ours, timeout=30)
    assert time.monotonic() - began < 30


def test_tensorboard_shows_a_step_that_was_done_again_once(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, last, value in ((1, 5, 1.0), (4, 6, 2.0)):  # killed after 5, resumed after 3
        time.sleep(1.1 * (first > 1))  # files are read in the order of their names, which have seconds
        tracker = tensorboard(TrackedRun(tmp_path, "run", {}, first))
        for step in range(first, last + 1):
            tracker.log(step, {"entropy/mean": value})
        tracker.close()
    shown = EventAccumulator(str(tmp_path / "tensorboard"))
    shown.Reload()
    points = [(e.step, e.value) for e in shown.Scalars("entropy/mean")]
    assert points == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0), (6, 2.0)]
