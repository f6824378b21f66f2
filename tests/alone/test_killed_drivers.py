"""What a killed driver or rank does not leave: a warm start under way, files, a lock that others wait for."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from entroray.installation import op_folder
from entroray.workers import cluster
from entroray.workers.orphans import GRACE
from tests.ray.processes import descendants, is_dead, start, until
from tests.ray.stack import Stack


def test_a_warm_start_ends_with_its_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENTRORAY_CACHE", str(tmp_path))
    process = start("train", "experiment=quickstart", f"run.dir={tmp_path}/run")
    ours = lambda: [p for p in descendants(process) if "warm-start" in p.cmdline()]
    until(process, lambda: any("raylet" in p.name() for p in descendants(process)))
    (warm,) = ours()
    process.kill()
    _, alive = psutil.wait_procs([warm], timeout=10 * GRACE)
    assert all(map(is_dead, alive))
    process.communicate(timeout=30)


WITH_FILE = """
import os, pathlib, signal, subprocess, time
from entroray.workers import orphans
variables = orphans.end_with_parent()
pathlib.Path(variables["TMPDIR"], "vllm_dist_1").touch()
child = subprocess.Popen(["sleep", "62"], stdout=subprocess.DEVNULL, start_new_session=True)
time.sleep(5)  # until it is known
print(variables["TMPDIR"], variables["TORCHINDUCTOR_CACHE_DIR"], child.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_children_and_their_temporary_files_go_with_the_driver_and_what_was_compiled_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    driver = [sys.executable, "-c", WITH_FILE]
    killed = subprocess.run(driver, stdout=subprocess.PIPE, text=True, timeout=60, check=False)
    *folders, child = killed.stdout.split()
    temporary, compiled = map(Path, folders)
    assert temporary.parent == compiled.parent == tmp_path
    until = time.monotonic() + 30
    while temporary.exists() and time.monotonic() < until:
        time.sleep(0.1)
    assert not temporary.exists()
    assert all(is_dead(p) for p in psutil.process_iter() if p.pid == int(child))


def test_a_lock_of_a_rank_that_was_killed_as_it_loaded_its_op_is_removed_by_the_next(stack: Stack) -> None:
    """Torch takes it for each load, of a compiled op too, and waits for one that is there without an end."""
    lock = op_folder() / "deepspeed_shm_comm" / "lock"
    lock.touch()
    os.utime(lock, (0, 0))
    gang = stack.wait(stack.another_gang(1))
    cluster.kill_actors(gang.handles)
    assert not lock.exists()
