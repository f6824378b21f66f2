"""What shuts a judged program in: its system calls, the files it may read, and a trial that proves both."""

import csv
import json
import os
import platform
import struct
import sysconfig
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

Isolation = Literal["auto", "contained"]

CALLS = Path(__file__).with_name("program_syscalls.tsv")
"""Name, number by machine, and whether a call writes files: all that a program may ask of the kernel."""
_MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_ALLOW, _REFUSE, _UNKNOWN = 0x7FFF0000, 0x50000 | 1, 0x50000 | 38
"""SECCOMP_RET_ALLOW, and SECCOMP_RET_ERRNO with EPERM or ENOSYS."""
_NEW = 424
"""Calls from this number on are so new that C libraries do without them where they are told ENOSYS."""
Instruction = tuple[int, int, int, int]
Code = list[Instruction]
Condition = tuple[int, int, tuple[int, ...]]
"""(number of the argument, mask, values that it may have under the mask)."""
_CONDITIONS: Mapping[str, tuple[Condition, ...]] = {
    "clone": ((0, 0x10000, (0x10000,)),),  # CLONE_THREAD: threads, no processes
    "prlimit64": ((0, 0xFFFFFFFF, (0,)),),  # of itself: another's limits could end it
    "socketpair": ((0, 0xFFFFFFFF, (1,)), (1, 0xF, (1,))),  # AF_UNIX, SOCK_STREAM, as asyncio has one
    "fcntl": ((1, 0xFFFFFFFF, (0, 1, 2, 3, 4, 5, 6, 7, 1030)),),  # not F_SETOWN, which sends signals
    "ioctl": ((1, 0xFFFFFFFF, (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)),),
}
_READING: Condition = (2, 0o3 | 0o100 | 0o1000, (0,))
"""Flags of `openat` without O_WRONLY, O_RDWR, O_CREAT and O_TRUNC."""


def compile_filter(*, writes: bool, machine: str | None = None) -> bytes:
    """A seccomp program that allows what `CALLS` lists; empty for a machine that it has no numbers of.

    Without `writes` nothing is written by path either: for kernels without Landlock. Our own few lines, not
    libseccomp through pyseccomp, because the process that installs it has the standard library alone.
    """
    machine = machine or platform.machine()
    if machine not in _MACHINES:
        return b""
    with CALLS.open() as file:
        rows = [row for row in csv.DictReader(file, delimiter="\t") if row[machine]]
    rules: dict[int, Code] = {}
    for row in rows:
        if writes or not row["writes"]:
            reads = () if writes or row["name"] != "openat" else (_READING,)
            conditions = (*_CONDITIONS.get(row["name"], ()), *reads)
            rules[int(row[machine])] = [*_conditions(conditions), _return(_ALLOW)]
    last, starts = Code(), list[tuple[int, Code]]()
    for number in (*range(max(*rules, _NEW) + 2), 0x40000000):  # from there on calls of x32
        refused = _return(_UNKNOWN if _NEW <= number < 0x40000000 else _REFUSE)
        if (rule := rules.get(number, [refused])) != last:
            starts.append((number, rule))
        last = rule
    head = [(0x20, 0, 0, 4), (0x15, 1, 0, _MACHINES[machine]), _return(_REFUSE), (0x20, 0, 0, 0)]
    return b"".join(struct.pack("=HBBI", *line) for line in (*head, *_search(starts)))


def _return(action: int) -> Instruction:
    return (0x06, 0, 0, action)


def _search(starts: list[tuple[int, Code]]) -> Code:
    """Instructions that find by halves the last of `starts` that is not above the number of a call.

    The kernel asks a filter about every number as it is installed, once for each program.
    """
    if len(starts) == 1:
        return starts[0][1]
    half = len(starts) // 2
    low, high = _search(starts[:half]), _search(starts[half:])
    return [(0x35, len(low), 0, starts[half][0]), *low, *high]


def _conditions(conditions: Iterable[Condition]) -> Iterable[Instruction]:
    """Instructions that go on where every condition holds, and refuse else."""
    for argument, mask, values in conditions:
        yield (0x20, 0, 0, 16 + 8 * argument)
        yield (0x54, 0, 0, mask)
        for number, value in enumerate(values):
            yield (0x15, len(values) - number, 0, value)
        yield _return(_REFUSE)


def libraries() -> list[str]:
    """Where programs find what is installed beside the standard library."""
    return list(dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib")))


def readable() -> list[str]:
    """Files and folders that a program may read: the interpreter's, libraries, the clock's zones."""
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    own = [sysconfig.get_path(name) for name in names] + [sysconfig.get_config_var("LIBDIR") or ""]
    shared = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/usr/share/zoneinfo")
    devices = ("/dev/urandom", "/dev/random", "/dev/zero")
    return [path for path in dict.fromkeys([*own, *shared, *devices]) if path and os.path.exists(path)]


TRIAL = """
import ctypes, json, os, socket
def allowed(act):
    try:
        act()
    except OSError:
        return False
    return True
def fork():
    if not (pid := os.fork()):
        os._exit(0)
    os.waitpid(pid, 0)
print(json.dumps({
    "a socket": allowed(lambda: socket.socket().close()),
    "a process": allowed(fork),
    "a file outside": allowed(lambda: open(input()).close()),
}))
"""
"""A program that tries what no program may, and says what it could do."""
CALLS_TRIED, FILES_TRIED = ("a socket", "a process"), ("a file outside",)


def outside_file() -> Path:
    """A new file that everybody may read, for `TRIAL`."""
    handle, name = tempfile.mkstemp(prefix="entroray-outside-")
    os.close(handle)
    os.chmod(name, 0o644)
    return Path(name)


def read_trial(said: str) -> dict[str, bool]:
    """What `TRIAL` could do; everything, where it said nothing of use."""
    try:
        found = json.loads(said)
        return {name: bool(found[name]) for name in (*CALLS_TRIED, *FILES_TRIED)}
    except (ValueError, KeyError, TypeError):
        return dict.fromkeys((*CALLS_TRIED, *FILES_TRIED), True)
