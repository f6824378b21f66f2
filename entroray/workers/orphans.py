"""Ends the processes that a local Ray cluster leaves behind when the process that started it is killed.

Ray's own processes follow a killed driver, but two agents wait a minute and more for servers that are
gone. Run as `python -m entroray.workers.orphans FD PID`: it keeps a list of the descendants of PID, and
kills those that outlive the closing of the other end of the pipe FD by `GRACE` seconds.
"""

import os
import select
import subprocess
import sys
from contextlib import suppress
from functools import cache

import psutil

POLL_INTERVAL = 2.0
"""Seconds between two lists of descendants; titles overwrite environments, so a mark there would not last."""
GRACE = 5.0


@cache
def end_with_parent() -> None:
    """Start a process that ends all descendants of this one some seconds after it is gone."""
    read, _ = os.pipe()  # the other end stays open here, and nowhere else, until this process is gone
    command = [sys.executable, "-m", __name__, str(read), str(os.getpid())]
    # deadline: it lives as long as this process and GRACE more
    subprocess.Popen(command, pass_fds=[read], start_new_session=True)
    os.close(read)


def main(fd: int, pid: int) -> None:
    """Watch until the pipe closes, then kill what is left."""
    known: set[psutil.Process] = set()
    while not select.select([fd], [], [], POLL_INTERVAL)[0]:
        known = {p for p in (*known, *_children(pid)) if p.is_running() and p.pid != os.getpid()}
    _, alive = psutil.wait_procs(known, timeout=GRACE)
    for process in alive:
        for each in (*_children(process.pid), process):
            with suppress(psutil.NoSuchProcess):
                each.kill()


def _children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
