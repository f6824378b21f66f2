"""Runs in processes of their own, to be watched, killed and looked for afterwards."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.ray.stack import lines, metrics


def start(*arguments: str, first: Callable[[], object] | None = None) -> subprocess.Popen:
    """`entroray <arguments>`, both of its streams in one pipe; `first` is called in the new process."""
    command = [sys.executable, "-m", "entroray", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=subprocess.STDOUT, text=True, preexec_fn=first)


def until(process: subprocess.Popen, true: Callable[[], object], seconds: float = 120.0) -> None:
    """Returns when `true()` is; fails if the process ends before or the time is up, which kills it."""
    end = time.monotonic() + seconds
    while not true():
        assert process.poll() is None, process.communicate(timeout=30)[0][-3000:]
        if time.monotonic() > end:
            process.kill()
            raise AssertionError(f"not within {seconds} s: {process.communicate(timeout=30)[0][-3000:]}")
        time.sleep(0.02)


def printed_at_end(process: subprocess.Popen, code: int, seconds: float = 200.0) -> str:
    """Everything it printed, once it has ended with `code`."""
    printed, _ = process.communicate(timeout=seconds)
    assert process.returncode == code, printed[-3000:]
    return printed


def steps(folder: Path) -> list[int]:
    return [row["step"] for row in metrics(folder)]


def step_reached(folder: Path, step: int) -> Callable[[], bool]:
    return lambda: any(reached >= step for reached in steps(folder))


def kinds(folder: Path) -> list[str]:
    """Of the events that a run wrote down."""
    return [event["kind"] for event in lines(folder / "events.jsonl")]


def descendants(process: subprocess.Popen) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def engines(process: subprocess.Popen) -> list[psutil.Process]:
    """Living actors of the class Generator, which Ray names in the process title."""
    return [p for p in descendants(process) if not is_dead(p) and "Generator" in " ".join(p.cmdline())]


def is_dead(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def left_over(processes: list[psutil.Process], shared: set[str], seconds: float = 30.0) -> list[str]:
    """Processes of a run that still live, and files in shared memory that were not in `shared`."""
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    return [str(p) for p in alive if not is_dead(p)] + sorted(set(os.listdir("/dev/shm")) - shared)


def beyond_loopback(processes: list[psutil.Process]) -> set[str]:
    """Names of processes that listen on more than loopback."""
    found = set()
    for process in processes:
        listening = [c.laddr.ip for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
        if any(not ip.removeprefix("::ffff:").startswith(("127.", "::1")) for ip in listening):
            found.add(process.name())
    return found
