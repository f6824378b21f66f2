"""What the process that outlives a driver clears away: `entroray.workers.orphans`."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from entroray.workers import orphans

HOLDER = """import mmap, sys, time
files = [open(name, mode) for name, mode in zip(sys.argv[1:], ("w+b", "r+b"))]
files[0].truncate(4096)
maps = [mmap.mmap(file.fileno(), 4096) for file in files]
print("mapped", flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="NOT TESTED: no /dev/shm")
def test_what_a_killed_process_left_in_shared_memory_goes_and_an_older_file_stays(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(orphans, "POLL_INTERVAL", 0.02)
    monkeypatch.setattr(orphans, "GRACE", 0.1)
    own, older = (Path(f"/dev/shm/entroray-test-{os.getpid()}-{name}") for name in ("own", "older"))
    older.write_bytes(bytes(4096))
    command = ["sh", "-c", 'read _; "$0" -c "$1" "$2" "$3" & wait', sys.executable, HOLDER, own, older]
    try:
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as driver:
            assert driver.stdin and driver.stdout
            read, write = os.pipe()
            watching = threading.Thread(target=orphans.main, args=(read, driver.pid, str(tmp_path / "none")))
            watching.start()
            time.sleep(0.05)
            driver.stdin.write(b"\n")
            driver.stdin.flush()
            assert driver.stdout.readline() == b"mapped\n" and own.exists()
            time.sleep(0.1)
            driver.kill()
            os.close(write)
            watching.join(10.0)
        assert not watching.is_alive() and not own.exists() and older.exists()
    finally:
        for file in (own, older):
            file.unlink(missing_ok=True)
