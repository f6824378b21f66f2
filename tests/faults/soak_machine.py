"""The processes of a run and what they hold, seen from outside."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from tests.faults.soak_numbers import Machine

MARK = "ENTRORAY_SOAK"
"""Variable of the driver, and of every process that descends from it and does not write over its own."""
JUDGES = "entroray.workers.judge_forkserver"
ROLES = {
    "engine": r"^ray::Generator",
    "rank": r"^ray::LearnerRank",
    "verifier": r"^ray::Verifier",
    "judge fork server": rf"-m {re.escape(JUDGES)}",
    "engine fork server": r"-m entroray\.workers\.engine_forkserver",
    "orphans": r"-m entroray\.workers\.orphans",
    "raylet": r"/raylet/raylet ",
    "GCS": r"/gcs/gcs_server ",
    "Ray's agent": r"^ray::(Dashboard|RuntimeEnv)Agent",
    "Ray's monitor": r"/(monitor|log_monitor|dashboard)\.py ",
}
"""Role -> what the title of its processes has; Ray's actors are named by their class."""


def title(pid: int) -> str:
    """The command line of a process as it is shown; empty if it is gone."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""


def role(process: psutil.Process, driver: int) -> str | None:
    """What a process of a run lives for; None for one that comes and goes, as a judge's does."""
    if process.pid == driver:
        return "driver"
    shown = title(process.pid)
    found = next((name for name, pattern in ROLES.items() if re.search(pattern, shown)), None)
    return None if found == "judge fork server" and is_judge(process) else found


def is_judge(process: psutil.Process) -> bool:
    """Whether it was forked by a verifier's fork server."""
    with suppress(psutil.Error):
        return JUDGES in title(process.pid) and JUDGES in title(process.ppid())
    return False


class Processes:
    """Every process that a run has started: descendants of its drivers, and whoever carries its mark."""

    def __init__(self, mark: str, folder: Path):
        self.mark, self.folder = f"{MARK}={mark}".encode(), str(folder)
        self.seen: set[psutil.Process] = set()

    def look(self, driver: int) -> list[psutil.Process]:
        """Those that live now; called often, so that none which loses its parent is lost."""
        with suppress(psutil.NoSuchProcess):
            top = psutil.Process(driver)
            self.seen |= {top, *top.children(recursive=True)}
        self._find(lambda pid: self.mark in _read(pid, "environ"))
        return self.alive()

    def look_closely(self) -> list[psutil.Process]:
        """Those that live when no driver does: one that wrote over its mark has a file of the run open."""
        self._find(
            lambda pid: (
                self.mark in _read(pid, "environ")
                or any(name.startswith(self.folder) for name in _open_files(pid))
            )
        )
        return self.alive()

    def _find(self, is_ours: Callable[[int], bool]) -> None:
        for pid in _pids():
            with suppress(psutil.NoSuchProcess):
                if pid != os.getpid() and is_ours(pid):
                    self.seen.add(psutil.Process(pid))

    def alive(self) -> list[psutil.Process]:
        """Of those seen, by age."""
        found = [process for process in self.seen if not is_dead(process)]
        return sorted(found, key=lambda p: (p.create_time(), p.pid))

    def machine(self) -> Machine:
        """What is there now; files in shared memory with who has mapped them."""
        listening = [c for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
        return Machine(
            processes={f"{p.pid} {title(p.pid)[:120]}": {p.pid} for p in self.alive()},
            shared=_shared(),
            ports={f"{c.laddr.ip}:{c.laddr.port}": {c.pid} if c.pid else set() for c in listening},
            folders={name: set() for name in _folders(Path(self.folder))},
            descriptors={name: {os.getpid()} for name in _open_files(os.getpid())},
        )


def is_dead(process: psutil.Process) -> bool:
    """Gone, or a zombie that its parent has not asked after."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def memory(processes: list[psutil.Process], driver: int) -> Iterator[dict[str, Any]]:
    """Of each long-lived process: anonymous memory, which is of no file; open descriptors."""
    for process in processes:
        with suppress(psutil.Error, OSError):
            if named := role(process, driver):
                anonymous = re.search(rb"RssAnon:\s+(\d+) kB", _read(process.pid, "status"))
                mb = round(int(anonymous[1]) / 1024, 2) if anonymous else 0.0
                born = process.create_time()
                yield {
                    "role": named, "pid": process.pid, "born": born,
                    "mb": mb, "descriptors": process.num_fds(),
                }  # fmt: skip


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _read(pid: int, name: str) -> bytes:
    with suppress(OSError):
        return Path(f"/proc/{pid}/{name}").read_bytes()
    return b""


def _open_files(pid: int) -> list[str]:
    """What its descriptors are of, without the one that is open to list them."""
    found, folder = list[str](), f"/proc/{pid}/fd"
    with suppress(OSError):
        for number in os.listdir(folder):
            with suppress(OSError):
                found.append(os.readlink(f"{folder}/{number}"))
    return [name for name in found if not name.startswith("/proc/")]


def _shared() -> dict[str, set[int]]:
    """Files of /dev/shm, each with the processes that have it mapped or open."""
    held = {name: set[int]() for name in os.listdir("/dev/shm")}
    for pid in _pids() if held else ():
        text = _read(pid, "maps").decode(errors="replace") + "\n".join(_open_files(pid))
        for name in held:
            if f"/dev/shm/{name}" in text:
                held[name].add(pid)
    return held


def _folders(top: Path) -> Iterator[str]:
    """Folders and files at the top of `top`, those of Ray with their session."""
    for path in top.iterdir() if top.exists() else ():
        if path.name == "ray":
            yield from (f"ray/{each.name}" for each in path.iterdir())
        else:
            yield path.name
