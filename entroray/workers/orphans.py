"""Ends the processes that a local Ray cluster leaves behind when the process that started it is killed.

Ray's own processes follow a killed driver, but two agents wait a minute and more for servers that are
gone. Run as `python -m entroray.workers.orphans FD PID FOLDER`: it keeps a list of the descendants of PID,
kills those that outlive the closing of the other end of the pipe FD by `GRACE` seconds, and removes FOLDER
and what they left in shared memory: workers of an engine that are killed leave 0.7 GB each.
"""

import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

import psutil

POLL_INTERVAL, STARTING = 2.0, 60.0
"""Seconds between two lists of descendants, and those at first in which it is a quarter, for most begin then.
Titles overwrite environments, so a mark there would not last."""
GRACE = 5.0


@cache
def end_with_parent() -> dict[str, str]:
    """Start a process that ends all descendants of this one some seconds after it is gone.

    Variables of a process whose temporary files go then, too: vLLM leaves one of each engine.
    """
    read, _ = os.pipe()  # the other end stays open here, and nowhere else, until this process is gone
    folder, shared = tempfile.mkdtemp(prefix="entroray-"), tempfile.gettempdir()
    command = [sys.executable, "-m", __name__, str(read), str(os.getpid()), folder]
    # deadline: it lives as long as this process and GRACE more
    subprocess.Popen(command, pass_fds=[read], start_new_session=True)
    os.close(read)
    compiled = os.environ.get("TORCHINDUCTOR_CACHE_DIR", f"{shared}/torchinductor_{os.getuid()}")
    return {"TMPDIR": folder, "TORCHINDUCTOR_CACHE_DIR": compiled}  # what is compiled serves the next run


def main(fd: int, pid: int, folder: str) -> None:
    """Watch until the pipe closes, then kill what is left and remove its temporary files."""
    known, shared, began = set[psutil.Process](), set[Path](), time.time()
    ended = False
    while not ended:
        known = {p for p in (*known, *_children(pid)) if p.is_running() and p.pid != os.getpid()}
        seen = {file for process in known for file in _shared_memory(process)}
        shared = {file for file in shared | seen if file.exists()}  # most are there for a moment
        often = 4 if time.time() - began < STARTING else 1
        ended = bool(select.select([fd], [], [], POLL_INTERVAL / often)[0])
    known |= {child for each in known if each.is_running() for child in _children(each.pid)}  # begun since
    _, alive = psutil.wait_procs(known, timeout=GRACE)
    for process in alive:
        for each in (*_children(process.pid), process):
            with suppress(psutil.NoSuchProcess):
                each.kill()
    psutil.wait_procs(alive, timeout=GRACE)
    shutil.rmtree(folder, ignore_errors=True)
    for process in psutil.process_iter() if shared else ():
        shared -= _shared_memory(process)
    for file in shared:
        with suppress(OSError):
            if file.stat().st_ctime > began:  # an older one is another's
                file.unlink()


def _shared_memory(process: psutil.Process) -> set[Path]:
    """Files of shared memory that a process has mapped."""
    try:
        lines = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
    except OSError:  # it has ended, or is another user's
        return set()
    found = (line.split(maxsplit=5)[5] for line in lines if " /dev/shm/" in line)
    return {Path(name) for name in found if not name.endswith(" (deleted)")}


def _children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
