"""Killed and stopped runs go on: every step once, the prompts they would have had, and what they printed."""

import os
import random
import shutil
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
from tests.faults.record import Fault
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
from tests.ray.stack import FinishedRun, entroray, lines, metrics
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
    gone: float
    """Seconds after which nothing of it was left."""
    step: float
    """Seconds after which it had its next step."""


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
    began = time.monotonic()
    process.communicate(timeout=30)
    left = left_over(ours, shared)
    gone, reached = time.monotonic() - began, steps(folder)[-1]
    process = start(*again)
    until(process, step_reached(folder, reached + 1))
    step = time.monotonic() - began
    return Resumed(folder, listening, left, printed_at_end(process, 0), gone, step)


def test_a_run_listens_on_loopback(resumed: Resumed) -> None:
    assert resumed.listening == set()


def test_a_killed_driver_leaves_nothing(resumed: Resumed) -> None:
    assert resumed.left_over == []


@pytest.mark.fault("F27", "SIGKILL to the driver after step 3, then the same command")
def test_a_killed_run_goes_on_after_its_last_checkpoint(
    fault: Fault, finished_run: FinishedRun, resumed: Resumed
) -> None:
    fault.fired("the process was killed, and said again: going on after step")
    assert "going on after step" in resumed.printed
    assert steps(resumed.folder) == [1, 2, 3, 4, 5, 6]
    assert prompts(resumed.folder) == prompts(finished_run.folder)
    assert "high: objective.surrogate.high <- band(" in resumed.printed
    high = [row["control/high"] for row in metrics(resumed.folder)]
    assert high == pytest.approx([0.2, 0.3, 0.4, 0.5, 0.6, 0.7])
    fault.saw("every process of it has ended", after=resumed.gone)
    fault.goes_on(
        "the next step; steps 1 to 6 once each, on the prompts of the run that was not killed",
        lost="steps since the last checkpoint, made again",
        after=resumed.step,
    )


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
@pytest.mark.fault("F27", "a run stopped after 3 of 6 steps and gone on with, beside one that was not")
def test_a_resumed_run_is_the_same_run_bit_for_bit(fault: Fault, tmp_path: Path, model: str) -> None:
    settings = [*BASE[1:], f"model.path={model}", f"--dir={tmp_path}/both", "--steps=3"]
    command = [sys.executable, "-m", "entroray", "verify-resume", *settings]
    done = subprocess.run(command, capture_output=True, text=True, timeout=580, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "3 + 3 steps equal 6" in done.stdout
    fault.fired("verify-resume made both runs")
    fault.saw("3 + 3 steps equal 6")
    fault.goes_on("bit for bit")


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
@pytest.mark.fault("F26", "{number.name} to the driver between steps")
def test_a_signal_saves_a_checkpoint_and_ends_with_its_code(
    fault: Fault, tmp_path: Path, model: str, number: signal.Signals
) -> None:
    folder = tmp_path / "run"
    process = start(*BASE, f"run.dir={folder}", f"model.path={model}")
    until(process, step_reached(folder, 1))
    os.kill(process.pid, number)
    fault.fired(f"after step {steps(folder)[-1]}")
    began = time.monotonic()
    said = printed_at_end(process, 128 + number, 60)
    assert time.monotonic() - began < 30
    last = steps(folder)[-1]
    saved = folder / "checkpoints" / f"step-{last:06d}"
    assert (saved / "COMMITTED").exists() and "run.resume=auto" in said
    fault.saw(f"ends with {128 + number}")
    fault.goes_on(f"a checkpoint of step {last}, its last")


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
@pytest.mark.fault("F26", "{number.name} to the driver while Ray starts")
def test_a_signal_before_the_first_step_ends_with_its_code_too(
    fault: Fault, tmp_path: Path, model: str, number: signal.Signals
) -> None:
    deaf = lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell starts `... &`
    process = start(*BASE, f"run.dir={tmp_path}/run", f"model.path={model}", first=deaf)
    while not any("raylet" in p.name() for p in psutil.Process(process.pid).children(recursive=True)):
        assert process.poll() is None
        time.sleep(0.05)
    ours, began = psutil.Process(process.pid).children(recursive=True), time.monotonic()
    os.kill(process.pid, number)
    fault.fired("a raylet is there, no step is")
    printed_at_end(process, 128 + number, 60)
    fault.saw(f"ends with {128 + number}")
    psutil.wait_procs(ours, timeout=30)
    assert time.monotonic() - began < 30
    fault.goes_on("every process of it has ended")


@pytest.mark.faults
@pytest.mark.fault("F43", "secrets in the environment of a run with two trackers that a signal ends")
def test_no_secret_of_the_environment_stands_in_what_a_run_writes(
    fault: Fault, tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, logs, canary = tmp_path / "run", Path(f"/tmp/fault-{os.getpid()}"), b"canary-5e1f"
    for name in ("HF_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, canary.decode() + name)
    monkeypatch.setenv("HF_ENDPOINT", f"https://me:{canary.decode()}@hub.example.org")
    monkeypatch.setenv("RAY_TMPDIR", str(logs))
    trackers = "observe.trackers=[{fn: csv}, {fn: tensorboard}]"
    process = start(*BASE, trackers, f"run.dir={folder}", f"model.path={model}")
    try:
        until(process, step_reached(folder, 1))
        told = [p for p in descendants(process) if canary.decode() in str(p.environ())]
        fault.fired(f"{len(told)} processes of the run have them in their environment")
        process.terminate()
        printed = printed_at_end(process, 143, 90)
        files = [f for place in (folder, logs) for f in place.rglob("*") if f.is_file()]
        assert told and len(files) > 20
        assert canary.decode() not in printed and [f for f in files if canary in f.read_bytes()] == []
        fault.saw(f"in none of {len(files)} files of the run and of Ray's logs, nor printed")
        fault.goes_on("nothing to heal")
    finally:
        shutil.rmtree(logs, ignore_errors=True)


@pytest.mark.faults
@pytest.mark.fault(
    "F28", "a resume with 2 ranks, ZeRO 3, two engines and verifiers; then with 1 rank, ZeRO 0"
)
def test_a_run_goes_on_with_other_ranks_another_stage_more_engines_and_verifiers(
    fault: Fault, tmp_path: Path, model: str
) -> None:
    told = [*BASE, f"run.dir={tmp_path}/run", f"model.path={model}", "evaluate.every=0"]
    entroray(*told, "run.steps=2")
    other = ["learner.ranks=2", "learner.zero_stage=3", "generator.replicas=2", "verifier.replicas=2"]
    fault.inject()
    said = entroray(*told, "run.steps=4", *other)
    fault.fired("each of the four settings is said: from here on")
    assert all(f"resume: {name} from here on" in said for name in other)
    assert "going on after step 2 of 4" in said and steps(tmp_path / "run") == [1, 2, 3, 4]
    fault.saw("going on after step 2 of 4; two steps")
    said = entroray(*told, "run.steps=6", "learner.zero_stage=0")
    assert "going on after step 4 of 6" in said and steps(tmp_path / "run") == [1, 2, 3, 4, 5, 6]
    drawn = prompts(tmp_path / "run")
    assert len(set.union(*drawn.values())) == sum(len(each) for each in drawn.values()), "each prompt once"
    fault.goes_on("two steps at ZeRO 0; every step and every prompt once")


@pytest.mark.faults
@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.fault("F27", "20 SIGKILLs to the driver at random moments of its life")
def test_twenty_deaths_of_the_driver_leave_every_step_once(fault: Fault, tmp_path: Path, model: str) -> None:
    folder, chance, shared = tmp_path / "run", random.Random(20), set(os.listdir("/dev/shm"))
    own = ["run.steps=100", "checkpoint.every=1", "++data.settings.size=20000"]
    settings = [*BASE, *own, f"run.dir={folder}", f"model.path={model}"]
    reached = [0]
    for _ in range(20):  # in the start or the first steps after it, so that a fast machine does not finish
        process, end = start(*settings), time.monotonic() + chance.uniform(1.0, 30.0)
        last, more = (steps(folder) or [0])[-1], chance.randint(1, 3)
        while time.monotonic() < end and (steps(folder) or [0])[-1] < last + more:
            time.sleep(0.01)
        assert process.poll() is None, process.communicate(timeout=30)[0][-3000:]
        ours = descendants(process)
        process.kill()
        process.communicate(timeout=30)
        assert left_over(ours, shared) == []
        reached.append((steps(folder) or [0])[-1])
    assert 10 < reached[-1] < 100
    fault.fired(f"steps reached: {', '.join(map(str, reached[1:]))}")
    fault.saw("every process of it has ended, each time")
    printed_at_end(start(*settings), 0, 400.0)
    assert steps(folder) == list(range(1, 101))
    trained = prompts(folder)
    assert sum(map(len, trained.values())) == len(set().union(*trained.values())) == 400
    fault.goes_on("steps 1 to 100 once each, 400 prompts once each", lost="steps under way, made again")


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
