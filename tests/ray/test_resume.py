"""Killed and stopped runs go on: every step once, the prompts they would have had, and what they printed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from entroray.observe.trackers import TensorBoard

BASE = [
    *("train", "experiment=quickstart", "objective=grpo", "run.steps=6", "rollout.groups_per_step=4"),
    *("observe.tokens.every=1", "observe.report=false", "evaluate.final=false", "checkpoint.every=2"),
    *("run.resume=auto", "++data.settings.size=2000", "data.max_prompt=128"),
    *("generator.replicas=1", "evaluate.every=2", "evaluate.prompts=16", "evaluate.samples=2"),
    "+control.high={knob: objective.surrogate.high, fn: band, signal: entropy/mean, at_least: 9, at_most: 9, "
    "step: 0.1, low: 0.2, high: 1}",
]


def start(
    folder: Path, model: str, *more: str, first: Callable[[], object] | None = None
) -> subprocess.Popen:
    command = [sys.executable, "-m", "entroray", *BASE, f"run.dir={folder}", f"model.path={model}", *more]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=subprocess.STDOUT, text=True, preexec_fn=first)


def steps(folder: Path) -> list[int]:
    path = folder / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def until(folder: Path, step: int, process: subprocess.Popen, deadline: float = 120.0) -> None:
    end = time.monotonic() + deadline
    while step not in steps(folder):
        assert process.poll() is None, process.communicate(timeout=30)[0][-3000:]
        assert time.monotonic() < end, f"step {step} did not come within {deadline} s"
        time.sleep(0.02)


def prompts(folder: Path) -> dict[int, set[str]]:
    import duckdb

    files = f"{folder}/tokens/*.parquet"
    rows = duckdb.sql(f"select distinct step, prompt_id from '{files}'").fetchall()
    return {step: {p for s, p in rows if s == step} for step, _ in rows}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, model: str) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    process = start(folder, model)
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 0, said[-3000:]
    return folder


def test_a_killed_run_goes_on_after_its_last_checkpoint(whole: Path, tmp_path: Path, model: str) -> None:
    folder = tmp_path / "run"
    process = start(folder, model)
    until(folder, 3, process)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    again = start(folder, model)
    said, _ = again.communicate(timeout=200)
    assert again.returncode == 0, said[-3000:]
    assert "going on after step" in said
    assert steps(folder) == [1, 2, 3, 4, 5, 6]
    assert prompts(folder) == prompts(whole)
    assert "high: objective.surrogate.high <- band(" in said
    assert [r["control/high"] for r in rows(folder)] == pytest.approx([0.2, 0.3, 0.4, 0.5, 0.6, 0.7])


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_held_out_accuracy_is_measured_and_changes_nothing(whole: Path, tmp_path: Path, model: str) -> None:
    measured = [row["step"] for row in rows(whole) if "eval/greedy" in row]
    assert measured == [2, 4, 6]
    assert {"eval/greedy", "eval/pass@1", "eval/pass@2"} <= rows(whole)[-1].keys()
    events = [json.loads(line) for line in (whole / "events.jsonl").read_text().splitlines()]
    assert [e["fields"]["step"] for e in events if e["kind"] == "evaluation"] == [0]
    process = start(tmp_path / "run", model, "evaluate.every=0")
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 0, said[-3000:]
    steady = lambda row: {k: v for k, v in row.items() if not k.startswith(("seconds/", "tokens/", "eval/"))}
    assert [steady(r) for r in rows(tmp_path / "run")] == [steady(r) for r in rows(whole)]


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
    process = start(folder, model)
    until(folder, 1, process)
    os.kill(process.pid, number)
    began = time.monotonic()
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, said[-3000:]
    assert time.monotonic() - began < 30
    last = steps(folder)[-1]
    saved = folder / "checkpoints" / f"step-{last:06d}"
    assert (saved / "COMMITTED").exists() and "run.resume=auto" in said


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_before_the_first_step_ends_with_its_code_too(
    tmp_path: Path, model: str, number: signal.Signals
) -> None:
    deaf = lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell starts `... &`
    process = start(tmp_path / "run", model, first=deaf)
    while not any("raylet" in p.name() for p in psutil.Process(process.pid).children(recursive=True)):
        assert process.poll() is None
        time.sleep(0.05)
    ours, began = psutil.Process(process.pid).children(recursive=True), time.monotonic()
    os.kill(process.pid, number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, said[-3000:]
    psutil.wait_procs(ours, timeout=30)
    assert time.monotonic() - began < 30


def test_tensorboard_shows_a_step_that_was_done_again_once(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, last, value in ((1, 5, 1.0), (4, 6, 2.0)):  # killed after 5, resumed after 3
        time.sleep(1.1 * (first > 1))  # files are read in the order of their names, which have seconds
        tracker = TensorBoard(tmp_path, first_step=first)
        for step in range(first, last + 1):
            tracker.log(step, {"entropy/mean": value})
        tracker.close()
    shown = EventAccumulator(str(tmp_path))
    shown.Reload()
    points = [(e.step, e.value) for e in shown.Scalars("entropy/mean")]
    assert points == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0), (6, 2.0)]
