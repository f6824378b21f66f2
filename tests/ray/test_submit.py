"""A job through Ray's own job server: with a token, on loopback, as launch/ray-head.sh starts it."""

import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from entroray.engine.interfaces import LOOPBACK

ROOT = Path(__file__).parents[2]
JOB = [
    "learner.lr_high=true",
    *("experiment=quickstart", "objective=grpo", "run.steps=1", "rollout.groups_per_step=4"),
    *("observe.report=false", "evaluate.final=false", "generator.replicas=1", "data.max_prompt=128"),
]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, str]]]:
    """(address of the job server, environment that holds its token)."""
    port, dashboard, agent = free_port(), free_port(), free_port()
    home = tmp_path_factory.mktemp("home")
    environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HOME": str(home)}
    environment |= {"RAY_TMPDIR": "/tmp/ray-submit-test", LOOPBACK: "0"}
    ray = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--disable-usage-stats"]
    ray += ["--node-ip-address=127.0.0.1", f"--port={port}", "--dashboard-host=127.0.0.1"]
    ray += [f"--dashboard-port={dashboard}", "--include-dashboard=true", "--num-cpus=2", "--block"]
    ray += [f"--dashboard-agent-listen-port={agent}"]  # else another Ray of this machine may have it already
    process = subprocess.Popen(ray, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if "--block" in line or "Ray runtime started" in line:
            break
    yield f"http://127.0.0.1:{dashboard}", environment
    ours = [process, *psutil.Process(process.pid).children(recursive=True)]
    process.terminate()
    psutil.wait_procs([p for p in ours if isinstance(p, psutil.Process)], timeout=30)
    process.wait(timeout=30)


def submit(head: tuple[str, dict[str, str]], *overrides: str, **changes: str) -> tuple[int, str]:
    address, environment = head
    command = [sys.executable, "-m", "entroray", "submit", f"--address={address}", *JOB, *overrides]
    done = subprocess.run(
        command, env=environment | changes, capture_output=True, text=True, timeout=580, check=False, cwd=ROOT
    )
    return done.returncode, done.stdout + done.stderr


def test_a_job_runs_streams_its_log_and_returns_its_exit_code(
    head: tuple[str, dict[str, str]], model: str, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text("def short(response, prompt):\n    return len(response) < 20\n")
    reward = f"reward.path={tmp_path}/mine.py:short"
    code, said = submit(head, f"model.path={model}", f"run.dir={tmp_path}/run", reward)
    assert code == 0, said
    assert "1 steps in" in said and re.search(r"submitted raysubmit_\w+ to http", said)
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_a_job_that_is_refused_says_so_with_its_own_code(
    head: tuple[str, dict[str, str]], model: str
) -> None:
    large = ("learner.ranks=99", "driver.call_deadline=2")  # so long are nodes waited for
    code, said = submit(head, f"model.path={model}", *large, "run.dir=/tmp/never")
    assert code == 3 and "99 learner ranks x 0.4" in said and "waiting at most 2 s for nodes" in said


def test_without_the_token_nothing_is_taken(head: tuple[str, dict[str, str]], model: str) -> None:
    code, said = submit(head, f"model.path={model}", "run.dir=/tmp/never", RAY_AUTH_TOKEN="wrong" * 8)
    assert code == 3 and "token" in said


def test_a_run_dir_in_the_packed_code_is_refused(head: tuple[str, dict[str, str]]) -> None:
    code, said = submit(head, "run.dir=runs/here")
    assert code == 2 and "absolute" in said


@pytest.mark.slow
def test_ctrl_c_stops_the_job_which_saves_a_checkpoint(
    head: tuple[str, dict[str, str]], model: str, tmp_path: Path
) -> None:
    address, environment = head
    overrides = [*JOB, "run.steps=1000", f"model.path={model}", f"run.dir={tmp_path}/run"]
    command = [sys.executable, "-m", "entroray", "submit", f"--address={address}", *overrides]
    process = subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    steps, end = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 300
    while not (steps.exists() and steps.stat().st_size):
        assert process.poll() is None and time.monotonic() < end, "no step came"
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=90)
    assert process.returncode == 130 and "saved in" in said, said[-3000:]
    assert list((tmp_path / "run" / "checkpoints").glob("step-*/COMMITTED"))
