"""Runs in processes of their own, to be watched, killed and looked for afterwards."""

import ipaddress
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import psutil

from tests.ray.stack import lines, metrics

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def start(
    *arguments: str,
    first: Callable[[], object] | None = None,
    within: list[str] | None = None,
    variables: Mapping[str, str] | None = None,
) -> subprocess.Popen:
    """`entroray <arguments>`, both of its streams in one pipe; `first` is called in the new process.

    `within` comes before the command, `variables` are beside those of this process.
    """
    command = [*(within or ()), sys.executable, "-m", "entroray", *arguments]
    environment, out, err = {**os.environ, **(variables or {})}, subprocess.PIPE, subprocess.STDOUT
    streams = {"stdout": out, "stderr": err, "pipesize": 1 << 20}  # room for what nobody reads before the end
    return subprocess.Popen(command, text=True, preexec_fn=first, env=environment, **streams)


def until(process: subprocess.Popen, true: Callable[[], object], seconds: float = 300.0) -> None:
    """Returns when `true()` is; fails if the process ends before or the time is up, which kills it."""
    end = time.monotonic() + seconds
    while not true():
        assert process.poll() is None, process.communicate(timeout=30)[0][-3000:]
        if time.monotonic() > end:
            process.kill()
            raise AssertionError(f"not within {seconds} s: {process.communicate(timeout=30)[0][-3000:]}")
        time.sleep(0.02)


def printed_at_end(process: subprocess.Popen, code: int, seconds: float = 500.0) -> str:
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


ELSEWHERE = """set -e
ip link set lo up
ip link add er-name type veth peer name er-out
ip addr add 10.98.0.1/24 dev er-name
ip link set er-name up
ip link set er-out up
hostname entroray-test
hosts=$(mktemp)
printf '127.0.0.1 localhost\\n10.98.0.1 entroray-test\\n' > "$hosts"
mount --bind "$hosts" /etc/hosts
rm "$hosts"
exec "$@"
"""


def on_a_named_machine() -> list[str]:
    """What a command begins with to run where the machine's name leads beyond loopback, as it mostly does.

    Empty where namespaces are not allowed: then it runs on this machine.
    """
    words = ["unshare", "--net", "--uts", "--mount", "bash", "-c", ELSEWHERE, "bash"]
    try:
        tried = subprocess.run([*words, "true"], capture_output=True, timeout=30, check=False)
    except OSError:
        return []
    return [] if tried.returncode else words


def beyond_loopback(processes: list[psutil.Process]) -> set[str]:
    """Names of processes that listen on more than loopback."""
    found = [pair for process in processes for pair in listening(process)]
    return {name for name, address in found if not address.is_loopback}


def listening(process: psutil.Process) -> set[tuple[str, Address]]:
    """Its name, and each address where it takes connections, or datagrams of whoever sends them."""
    found = set()
    with suppress(OSError, psutil.Error):  # it may end meanwhile
        found = {(process.name(), address) for _, address, _ in bound(process)}
    return found


def bound(process: psutil.Process) -> set[tuple[str, Address, int]]:
    """`tcp` or `udp`, address and port of each socket where it waits for whoever comes."""
    own, found = set(_open_files(process.pid)), set()
    for table in ("tcp", "tcp6", "udp", "udp6"):  # as its own network has them
        for line in Path(f"/proc/{process.pid}/net/{table}").read_text().splitlines()[1:]:
            _, local, remote, state, *_, inode = line.split()[:10]
            waits = state == "0A" if table.startswith("tcp") else not int(remote.replace(":", ""), 16)
            if waits and f"socket:[{inode}]" in own:
                address, _, port = local.partition(":")
                found.add((table[:3], _address(address), int(port, 16)))
    return found


def _open_files(pid: int) -> Iterator[str]:
    for each in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile, as the one of this look itself
            yield os.readlink(each)


def _address(written: str) -> Address:
    """As the kernel writes it: words of four bytes, each turned around."""
    raw = bytes.fromhex(written)
    found = ipaddress.ip_address(b"".join(raw[i : i + 4][::-1] for i in range(0, len(raw), 4)))
    return getattr(found, "ipv4_mapped", None) or found


class Watched:
    """Where a run and all that it starts has listened, looked at four times a second until it ends."""

    def __init__(self, process: subprocess.Popen):
        self.process, self.found = process, set[tuple[str, Address]]()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def _watch(self) -> None:
        while self.process.poll() is None:
            with suppress(psutil.Error):
                for each in [psutil.Process(self.process.pid), *descendants(self.process)]:
                    self.found |= listening(each)
            time.sleep(0.25)
