"""Forks a process for each program that is judged, and shuts it in before the program's first line runs.

Run by file, `python -I -S program_server.py FD`, with an empty environment; only the standard library is
imported. FD is one end of a SOCK_SEQPACKET pair, of which many may hold the other. The first message is the
settings; each later one brings five descriptors: a socket to reply on, the program as JSON, and its stdin,
stdout and channel for results. The reply is the pid, then how it ended; to close the reply socket kills the
program. The server never sees what a test expects, nor does it read a program: only the fork does.
"""

import atexit
import ctypes
import gc
import json
import os
import resource
import select
import shutil
import signal
import socket
import struct
import sys
import threading
import traceback
import types
from typing import Any, NoReturn

REPLY = struct.Struct("!q")
"""A pid, then a wait status."""
NOT_STARTED = -1
"""In place of a pid."""
_NAMES = (
    "string re datetime collections heapq bisect copy math random statistics itertools functools operator io "
    "sys json"
)
PRELUDE = "\n".join(
    [
        *[f"from {name} import *" for name in f"{_NAMES} builtins typing".split()],
        f"import {', '.join(_NAMES.split())}",
    ]
)
"""What graders of APPS, LiveCodeBench and verl put before a program: its starter code imports nothing."""

_libc = ctypes.CDLL(None, use_errno=True)
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
"""Landlock's system calls, of one number on every machine."""
_READ_FILE, _READ_DIR, _WRITE_FILE, _TRUNCATE = 1 << 2, 1 << 3, 1 << 1, 1 << 14
_NEVER = 1 << 0 | 1 << 6 | 1 << 9 | 1 << 11
"""To execute, to make devices and sockets: not even in the scratch folder."""
_NEW_NAMESPACES = 0x20000 | 0x8000000 | 0x4000000 | 0x40000000
"""Mounts, IPC, host name, network."""
_NEW_USER = 0x10000000
_OPTIONS = {"end with the parent": (1, signal.SIGKILL), "no new rights": (38, 1), "not dumpable": (4, 0)}
"""Of prctl."""


class Unprotected(OSError):
    """A layer that the machine has could not be put around a program."""


def _call(what: str, result: int) -> int:
    if result < 0:
        raise Unprotected(f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def landlock_version() -> int:
    """0 where the kernel has no Landlock, or has it switched off."""
    return max(0, _libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), 1))


def restrict_files(version: int, readable: list[str], scratch: str) -> None:
    """Leave `readable` to read and `scratch` to write, no TCP and no signal to others, by Landlock."""
    rights = [13, 14, 15, 15, 16][min(version, 5) - 1]
    handled = (1 << rights) - 1
    attributes = struct.pack("=QQQ", handled, 3, 3)[: 8 if version < 4 else 16 if version < 6 else 24]
    ruleset = _call(
        "landlock_create_ruleset",
        _libc.syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0),
    )
    device = _READ_FILE | _WRITE_FILE | _TRUNCATE
    read = {path: _READ_FILE | _READ_DIR if os.path.isdir(path) else _READ_FILE for path in readable}
    for path, allowed in {**read, "/dev/null": device, scratch: handled & ~_NEVER}.items():
        parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("=Qi", allowed & handled, parent)
        _call(f"landlock_add_rule {path}", _libc.syscall(_ADD_RULE, ruleset, 1, rule, 0))
        os.close(parent)
    _call("landlock_restrict_self", _libc.syscall(_RESTRICT_SELF, ruleset, 0))
    os.close(ruleset)


def filter_calls(program: bytes) -> None:
    """Refuse system calls by seccomp, as compiled for this machine by `isolation.compile_filter`."""
    code = ctypes.create_string_buffer(program, len(program))
    head = struct.pack("@HP", len(program) // 8, ctypes.addressof(code))
    _call("seccomp", _libc.prctl(22, 2, head, 0, 0))


def separate(scratch: str) -> None:
    """Namespaces of this process's own for mounts, network and IPC, in which it can mount folders."""
    ids = os.getuid(), os.getgid()
    if _libc.unshare(_NEW_NAMESPACES):
        _call("unshare", _libc.unshare(_NEW_NAMESPACES | _NEW_USER))
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {ids[0]} 1"), ("gid_map", f"0 {ids[1]} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    _call("mount", _libc.mount(b"none", b"/", None, 0x4000 | 0x40000, None))  # private: seen nowhere else
    mount(scratch)
    _call("umount", _libc.umount2(scratch.encode(), 2))


def mount(folder: str) -> None:
    """A folder in memory, of 64 MiB and 4,096 files."""
    options = b"size=64m,nr_inodes=4096,mode=700"
    _call("mount", _libc.mount(b"none", folder.encode(), b"tmpfs", 6, options))


def _enclose(settings: dict[str, Any], scratch: str, limits: dict[str, int]) -> None:
    """Whatever this process does from here on, it does within its limits."""
    with open("/proc/self/statm") as file:
        held = int(file.read().split()[0]) * resource.getpagesize()
    memory, seconds = held + limits["memory_mb"] * 2**20, limits["seconds"]
    limited = {"AS": memory, "CPU": seconds, "FSIZE": 32 << 20, "NOFILE": 64, "CORE": 0, "MEMLOCK": 0}
    for name, most in limited.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))
    os.chdir(scratch)
    for name, (option, value) in _OPTIONS.items():
        _call(name, _libc.prctl(option, value, 0, 0, 0))
    if settings["landlock"]:
        restrict_files(settings["landlock"], settings["readable"], scratch)
    none = struct.pack("=IIIIII", *[0] * 6)
    _call("capset", _libc.capset(struct.pack("=Ii", 0x20080522, 0), none))
    if settings["filter"]:
        filter_calls(bytes.fromhex(settings["filter"]))


# In the program's process.


_MANY: tuple[Any, ...] = (list, tuple, set, frozenset)


def plain(value: Any) -> list[Any]:
    """A value as JSON, its type named; of a subclass what the builtin type in it holds, whatever it says."""
    if value is None or isinstance(value, bool):
        return ["bool" if value is not None else "none", value]
    if isinstance(value, int):
        return ["int", int.__format__(value, "x")]
    if isinstance(value, float):
        return ["float", float.hex(value)]
    if isinstance(value, complex):
        return ["complex", [float.hex(value.real), float.hex(value.imag)]]
    if isinstance(value, str):
        return ["str", str.__getitem__(value, slice(None))]
    if isinstance(value, bytes | bytearray):
        return ["bytes", bytes(memoryview(value)).hex()]
    if isinstance(value, dict):
        return ["dict", [[plain(k), plain(v)] for k, v in dict.items(value)]]
    for kind in _MANY:
        if isinstance(value, kind):
            return [kind.__name__, [plain(each) for each in kind.__iter__(value)]]
    if hasattr(type(value), "__index__"):  # numpy's whole numbers
        return plain(int(type(value).__index__(value)))
    return ["other", type(value).__name__]


def _play(request: dict[str, Any], results: int) -> None:
    """Run the program, then each step; "do" and "hold" are executed, of a "value" is sent what it gives."""
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    space = vars(main)
    if request["prelude"]:
        space.update(_PRELUDED)
    failed = _step("do", request["source"], space)
    steps = request["steps"]
    if not steps and not failed.get("error", "SystemExit").startswith("SystemExit"):
        _send(results, failed)
    for kind, text in steps:
        _send(results, failed if "error" in failed else _step(kind, text, space, "<test>"))
    threading._shutdown()  # type: ignore[attr-defined]  # as an interpreter ends, without taking itself apart
    atexit._run_exitfuncs()
    for stream in filter(None, (sys.stdout, sys.__stdout__)):
        stream.flush()


def _step(kind: str, text: str, space: dict[str, Any], name: str = "<answer>") -> dict[str, Any]:
    try:
        code = compile(text, name, "eval" if kind == "value" else "exec", dont_inherit=True)
        value = eval(code, space)
        return {"value": plain(value)} if kind == "value" else {"held": True}
    except BaseException as error:  # boundary: a program raises what it likes
        return {"error": _said(error)}


def _said(error: BaseException) -> str:
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == "<answer>"]
    return f"{type(error).__name__}: {error}"[:200] + (f" (line {lines[-1]})" if lines else "")


def _send(results: int, message: dict[str, Any]) -> None:
    data = memoryview(json.dumps(message).encode() + b"\n")
    while data:
        data = data[os.write(results, data) :]


def _run(fds: list[int], scratch: str, settings: dict[str, Any]) -> NoReturn:
    """The fork's own life; whatever happens, it never returns into the server's loop."""
    results, shut_in = fds[4], False
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        with open(fds[1], closefd=False) as file:
            request = json.load(file)
        os.setsid()
        os.dup2(fds[2], 0)
        os.dup2(fds[3], 1)
        os.closerange(3, results)
        os.closerange(results + 1, 1 << 16)
        _enclose(settings, scratch, request["limits"])
        del settings
        _send(results, {"shut in": True})  # the one line that is believed: no program has run yet
        shut_in = True
        _play(request, results)
        os._exit(0)
    except BaseException as error:  # boundary: a layer that is missing, or a program that broke what plays it
        _send(results, {"error" if shut_in else "open": _said(error)})
    finally:
        os._exit(1)


# The server.


class Server:
    """Programs under way: a pid, the socket that its end is told on, its scratch folder."""

    def __init__(self, control: socket.socket, settings: dict[str, Any]):
        self.control, self.settings = control, settings
        self.running: dict[int, tuple[socket.socket, str]] = {}
        self.poll, self.count = select.poll(), 0
        wake, woken = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
        self.wake = wake
        for fd in (wake, control.fileno()):
            self.poll.register(fd, select.POLLIN)

    def serve(self) -> None:
        """Until nobody holds the other end of `control`."""
        while True:
            for fd, _ in self.poll.poll():
                if fd == self.control.fileno():
                    if not self.start():
                        self.end()
                        return
                elif fd == self.wake:
                    os.read(self.wake, 4096)
                else:
                    self.kill(fd)
            self.reap()

    def start(self) -> bool:
        """Fork for what was asked; False if nobody can ask any more."""
        message, fds, _, _ = socket.recv_fds(self.control, 16, 5)
        if not message:
            return False
        reply, self.count = socket.socket(fileno=fds[0]), self.count + 1
        scratch = os.path.join(self.settings["scratch"], str(self.count))
        try:
            os.mkdir(scratch, 0o700)
            if self.settings["namespaces"]:
                mount(scratch)
            pid = os.fork()
        except OSError:
            _tell(reply, NOT_STARTED)
            reply.close()
        else:
            if not pid:
                _run(fds, scratch, self.settings)
            self.running[pid] = reply, scratch
            self.poll.register(reply.fileno(), select.POLLIN)
            _tell(reply, pid)
        for fd in fds[1:]:
            os.close(fd)
        return True

    def kill(self, fd: int) -> None:
        """Kill the program whose reply socket was closed at its other end."""
        for pid, (reply, _) in self.running.items():
            if reply.fileno() == fd:
                self.poll.unregister(fd)
                os.kill(pid, signal.SIGKILL)
                return

    def reap(self) -> None:
        """See who has ended, end what they left behind, and tell."""
        while pid := _ended_child():
            if pid in self.running:
                _quietly(lambda pid=pid: os.killpg(pid, signal.SIGKILL))
            _, status = os.waitpid(pid, 0)
            if not self.settings["filter"]:
                self.kill_strays()
            if pid not in self.running:
                continue
            reply, scratch = self.running.pop(pid)
            _quietly(lambda reply=reply: self.poll.unregister(reply.fileno()))
            _tell(reply, status)
            reply.close()
            if self.settings["namespaces"]:
                _libc.umount2(scratch.encode(), 2)
            shutil.rmtree(scratch, ignore_errors=True)

    def kill_strays(self) -> None:
        """What programs started and left: this process is given their orphans."""
        try:
            with open(f"/proc/self/task/{os.getpid()}/children") as file:
                children = {int(pid) for pid in file.read().split()}
        except FileNotFoundError:  # a kernel without CONFIG_PROC_CHILDREN
            return
        for pid in children - set(self.running):
            _quietly(lambda pid=pid: os.kill(pid, signal.SIGKILL))

    def end(self) -> None:
        """Kill every program and remove the scratch folder."""
        for pid in self.running:
            os.kill(pid, signal.SIGKILL)
        while self.running:
            select.select([self.wake], [], [], 1.0)
            self.reap()
        shutil.rmtree(self.settings["scratch"], ignore_errors=True)


def _ended_child() -> int:
    """A child that has ended and still has its number; 0 if there is none."""
    try:
        ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return 0
    return ended.si_pid if ended else 0


def _tell(reply: socket.socket, number: int) -> None:
    _quietly(lambda: reply.send(REPLY.pack(number), socket.MSG_NOSIGNAL))


def _quietly(act: Any) -> None:
    """Do what may come too late: whom it is for may be gone."""
    try:
        act()
    except (OSError, KeyError):
        return


def _holds(layer: Any) -> bool:
    """Whether a fork can put a layer around itself."""
    if not (pid := os.fork()):
        try:
            _call("prctl", _libc.prctl(38, 1, 0, 0, 0))
            layer()
        except BaseException:  # boundary: whatever stands in its way, it does not hold
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1] == 0


def main(fd: int) -> None:
    """Say which layers this machine has, then serve."""
    control = socket.socket(fileno=fd)
    settings = json.loads(control.recv(1 << 17))
    scratch = settings["scratch"]
    sys.path += settings["libraries"]
    _libc.prctl(36, 1, 0, 0, 0)  # orphans of programs come to this process
    settings["namespaces"] = settings["namespaces"] and _holds(lambda: separate(scratch))
    if settings["namespaces"]:
        separate(scratch)
    version = settings["landlock"] and landlock_version()
    held = version and _holds(lambda: restrict_files(version, settings["readable"], scratch))
    settings["landlock"] = version if held else 0
    program = settings["filters"][1 if held else 0]  # without Landlock nothing is written
    filtered = program and _holds(lambda: filter_calls(bytes.fromhex(program)))
    settings["filter"] = program if filtered else ""
    found = {"Landlock": bool(held), "seccomp": bool(filtered), "namespaces": settings["namespaces"]}
    control.send(json.dumps({**found, "modules": sorted(sys.modules)}).encode())
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        os.putenv(name, "1")  # for libraries in C; `os.environ` stays empty
    os.environ.clear()
    gc.freeze()
    Server(control, settings).serve()


_PRELUDED: dict[str, Any] = {}

if __name__ == "__main__":
    exec(PRELUDE, _PRELUDED)
    main(int(sys.argv[1]))
