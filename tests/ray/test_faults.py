"""What dies is replaced or ends the run with its code, and nothing of ours stays behind."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

BASE = [
    *("train", "experiment=quickstart", "objective=grpo", "run.steps=5", "rollout.groups_per_step=4"),
    *("observe.report=false", "evaluate.final=false", "++data.settings.size=2000", "data.max_prompt=128"),
    *("generator.replicas=1", "learner.ranks=1"),
]


def start(folder: Path, model: str, *more: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "entroray", *BASE, f"run.dir={folder}", f"model.path={model}", *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def until(process: subprocess.Popen, true: Callable[[], object], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert process.poll() is None, process.communicate(timeout=30)[0][-3000:]
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.02)


def step_reached(folder: Path, step: int) -> Callable[[], bool]:
    return lambda: any(m["step"] >= step for m in lines(folder / "metrics.jsonl"))


def descendants(process: subprocess.Popen) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def engines(process: subprocess.Popen) -> list[psutil.Process]:
    """Actors of the class Generator, which Ray names in the process title."""
    return [p for p in descendants(process) if "Generator" in " ".join(p.cmdline())]


def kinds(folder: Path) -> list[str]:
    return [event["kind"] for event in lines(folder / "events.jsonl")]


def gone(processes: list[psutil.Process], shared: set[str], seconds: float = 30.0) -> None:
    """No process of the run and no new file in shared memory is left."""
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]
    assert set(os.listdir("/dev/shm")) <= shared


@pytest.mark.parametrize("replicas", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_an_engine_that_dies_is_replaced_and_its_prompts_asked_again(
    tmp_path: Path, model: str, replicas: int
) -> None:
    folder = tmp_path / "run"
    process = start(folder, model, f"generator.replicas={replicas}", "run.steps=12")
    until(process, step_reached(folder, 2), 120)
    engines(process)[0].kill()
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 0, said[-3000:]
    assert [m["step"] for m in lines(folder / "metrics.jsonl")] == list(range(1, 13))
    assert "engine_lost" in kinds(folder)
    assert replicas > 1 or "engine_joined" in kinds(folder)


def test_the_last_engine_dying_ends_the_run_with_4_and_leaves_nothing(tmp_path: Path, model: str) -> None:
    folder, shared = tmp_path / "run", set(os.listdir("/dev/shm"))
    process = start(folder, model, "generator.restarts=0", "run.steps=1000")
    until(process, step_reached(folder, 2), 120)
    ours, began = descendants(process), time.monotonic()
    engines(process)[0].kill()
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 4 and time.monotonic() - began < 120
    assert "no generator is left" in said and "generator.restarts" in said
    gone(ours, shared)


def beyond_loopback(processes: list[psutil.Process]) -> set[str]:
    """Names of processes that listen on more than loopback."""
    found = set()
    for process in processes:
        listening = [c.laddr.ip for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
        if any(not ip.removeprefix("::ffff:").startswith(("127.", "::1")) for ip in listening):
            found.add(process.name())
    return found


def test_a_run_listens_on_loopback_and_a_killed_driver_leaves_nothing(tmp_path: Path, model: str) -> None:
    folder, shared = tmp_path / "run", set(os.listdir("/dev/shm"))
    process = start(folder, model, "run.steps=1000")
    until(process, step_reached(folder, 1), 120)
    ours = descendants(process)
    # The rendezvous of torch.distributed cannot be told where to listen.
    assert {name for name in beyond_loopback(ours) if "LearnerRank" not in name} == set()
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    gone(ours, shared)
