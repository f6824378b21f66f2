"""Closed doors: a run listens on loopback alone, and nothing that it leaves has a secret of its shell."""

import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

import psutil
import pytest

from tests.conftest import SECRETS
from tests.ray.processes import Watched, listening, on_a_named_machine, start
from tests.ray.stack import FinishedRun, lines

MAY: dict[str, str] = {}
"""Name of a process -> why it may listen beyond loopback. Ray 2.60 can be told all of it: nobody may."""
PARTS = ("gcs_server", "raylet", "ray::Generator", "ray::LearnerRan", "ray::Verifier", "ray::DashboardA")


def beyond(found: Iterable[tuple[str, object]]) -> set[str]:
    return {f"{name} on {address}" for name, address in found if not address.is_loopback and name not in MAY}


def holding(mark: str, *folders: Path) -> list[str]:
    """Files under folders that have `mark` in them, packed or not."""
    found = subprocess.run(
        ["grep", "-rlaF", mark, *map(str, folders)], capture_output=True, text=True, timeout=60
    )
    assert found.returncode in (0, 1), found.stderr
    return found.stdout.split()


def test_no_part_of_a_run_listens_beyond_loopback(finished_run: FinishedRun) -> None:
    names = {name for name, _ in finished_run.listened}
    assert {part for part in PARTS if not any(name.startswith(part) for name in names)} == set(), names
    assert beyond(finished_run.listened) == set()
    if not on_a_named_machine():
        pytest.skip("NOT TESTED: where the machine's name leads beyond loopback (it takes root)")


def test_a_socket_beyond_loopback_is_seen() -> None:
    """What the test above would miss, it would pass by."""
    import socket

    before = listening(psutil.Process())  # Ray's own, where this session has joined one
    with socket.create_server(("", 0)), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
        assert len(beyond(listening(psutil.Process()) - before)) == 1
        datagrams.bind(("", 0))
        assert {str(address) for _, address in listening(psutil.Process())} >= {"0.0.0.0"}
    assert beyond(listening(psutil.Process()) - before) == set()


def test_nothing_that_a_run_writes_or_prints_has_a_secret(finished_run: FinishedRun) -> None:
    assert "canary" not in finished_run.printed
    assert (finished_run.logs / "ray").is_dir(), "no logs of Ray to look at"
    assert holding("canary", finished_run.folder, finished_run.logs) == []


JUDGE = """import os
n = 0
def judge(response, prompt):
    global n
    n += 1
    if n > 6:  # not when it is tried before the start
        raise RuntimeError(f"401 for {os.environ['DB_PASSWORD']} at {os.environ['HF_ENDPOINT']}")
    return n % 2
"""


@pytest.mark.faults
def test_an_exception_that_tells_a_secret_is_kept_without_it(tmp_path: Path, model: str) -> None:
    (tmp_path / "mine.py").write_text(JUDGE)
    folder, logs = tmp_path / "run", Path(tempfile.mkdtemp(prefix="entroray-"))  # short: sockets lie in it
    settings = ["experiment=quickstart", "objective=grpo", "run.steps=3", "rollout.groups_per_step=4"]
    settings += ["learner.lr_high=true", "learner.ranks=2", "generator.replicas=1", "data.max_prompt=128"]
    settings += [f"model.path={model}", f"reward.path={tmp_path}/mine.py:judge", f"run.dir={folder}"]
    told = {**SECRETS, "RAY_TMPDIR": str(logs)}
    process = start("train", *settings, "evaluate.final=false", within=on_a_named_machine(), variables=told)
    watched = Watched(process)
    try:
        printed, _ = process.communicate(timeout=500)
    finally:
        process.kill()
    events = lines(folder / "events.jsonl")
    assert any("RuntimeError: 401 for *** at ***" in str(event) for event in events), printed[-3000:]
    left = holding("canary", folder, logs)
    shutil.rmtree(logs, ignore_errors=True)
    assert "canary" not in printed and left == []
    assert beyond(watched.found) == set()
