"""Runs programs in the processes of `program_server.py`: one at a time for each caller, within limits."""

import json
import math
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from entroray.errors import ConfigError, InfrastructureError
from entroray.reward import isolation
from entroray.reward.program_server import NOT_STARTED, REPLY

LAYERS = ("Landlock", "seccomp", "namespaces")

_START_DEADLINE = 60.0
_END_DEADLINE = 10.0
"""Seconds for the server to start, and to tell that a program it was to kill is gone."""


@dataclass(frozen=True)
class Program:
    """Source, and what is then done with it: ("do" | "hold" | "value", Python)."""

    source: str
    steps: Sequence[tuple[str, str]] = ()
    stdin: str = ""
    prelude: bool = False
    """Whether it begins with the imports that graders of contests put before a program."""


@dataclass(frozen=True)
class Limits:
    """Of one program. `seconds` are from one thing that it gives to the next, those not counted in which it
    is ready and no core is free; `wall` are all seconds.
    """

    seconds: float
    memory_mb: int = 1024
    wall: float = math.inf
    count: int = 1
    """How many things it is to give."""
    output: int = 4 << 20
    """Bytes, of what it prints and of what its steps give."""


@dataclass
class Outcome:
    """What a program did."""

    printed: str = ""
    given: list[Any] = field(default_factory=list)
    """Of each step {"value": coded}, {"held": True} or {"error": text}; or what the program forged."""
    ended: str = ""
    """Empty where it ended by itself, else how."""
    waited: float = 0.0
    """Seconds that it was ready to run and no core was free."""


class Programs:
    """A server of programs, started now and shared with forks of this process; it ends with the last of them.

    InfrastructureError if it does not start. Of `layers` it has those that the machine allows; `held` are
    those that were seen to hold.
    """

    def __init__(self, layers: Sequence[str] = LAYERS):
        self.layers = layers
        self._start()
        self.tried = self._try()
        refuses = {
            "Landlock": not any(map(self.tried.get, isolation.FILES_TRIED)),
            "seccomp": not any(map(self.tried.get, isolation.CALLS_TRIED)),
            "namespaces": True,
        }
        self.held = [name for name in LAYERS if self.found[name] and refuses[name]]

    def _start(self) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        server = Path(__file__).with_name("program_server.py")
        self._scratch = tempfile.mkdtemp(prefix="entroray-programs-")
        filters = [isolation.compile_filter(writes=writes).hex() for writes in (False, True)]
        settings = {
            "landlock": "Landlock" in self.layers,
            "filters": filters if "seccomp" in self.layers else ["", ""],
            "readable": isolation.readable(),
            "libraries": isolation.libraries(),
            "namespaces": "namespaces" in self.layers,
            "scratch": self._scratch,
        }
        with theirs:
            self._server = subprocess.Popen(
                [sys.executable, "-I", "-S", "-X", "utf8", str(server), str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
                env={},
                cwd="/",
            )
        try:
            self._control.settimeout(_START_DEADLINE)
            self._control.send(json.dumps(settings).encode())
            self.found = json.loads(self._control.recv(1 << 17))
        except (OSError, ValueError) as error:
            shutil.rmtree(self._scratch, ignore_errors=True)
            raise InfrastructureError(
                f"the server of programs did not start ({error!r}): see the verifier's log"
            ) from error

    def _try(self) -> dict[str, bool]:
        outside = isolation.outside_file()
        try:
            tried = self.run(Program(isolation.TRIAL, stdin=str(outside)), Limits(10.0))
        finally:
            outside.unlink()
        return isolation.read_trial(tried.printed)

    def require(self, choice: str) -> None:
        """ConfigError where nothing keeps a program from the machine, unless that was said to be so."""
        if choice == "auto" and not {"Landlock", "seccomp"} & {*self.held}:
            raise ConfigError(
                f"reward.judge.fn=code: neither Landlock nor seccomp holds here ({self.describe()}). Judge "
                "on a kernel from 5.13 on, in a container that allows landlock_* and seccomp; or, if what "
                "this machine or container has may be lost, say verifier.isolation=contained"
            )

    def describe(self) -> str:
        """What holds, and what a program could and could not do, in words."""
        refused = [name for name, could in self.tried.items() if not could]
        could = [name for name, could in self.tried.items() if could]
        said = [
            f"holding: {', '.join(self.held) or 'nothing'}",
            f"refused: {', '.join(refused) or 'nothing'}",
            f"allowed: {', '.join(could)}" if could else "",
        ]
        return "; ".join(filter(None, said))

    def run(self, program: Program, limits: Limits) -> Outcome:
        """What `program` does, ended at the latest when it has used up its limits.

        InfrastructureError where it could not be started, or not be shut in.
        """
        for last in (False, True):
            try:
                return self._run(program, limits)
            except ConnectionError as error:  # the server is gone: this process gets one of its own
                if last:
                    raise InfrastructureError(f"no program can be run: {error!r}") from error
                shutil.rmtree(self._scratch, ignore_errors=True)
                self._start()
            except TimeoutError as error:
                raise InfrastructureError("the server of programs does not answer") from error
        raise AssertionError("unreachable")

    def close(self) -> None:
        """End the server, if no fork of this process holds on to it."""
        self._control.close()
        with suppress(subprocess.TimeoutExpired):
            self._server.wait(_END_DEADLINE)

    def _run(self, program: Program, limits: Limits) -> Outcome:
        request = {
            "source": program.source,
            "steps": program.steps,
            "prelude": program.prelude,
            "limits": {
                "memory_mb": limits.memory_mb,
                "seconds": int(min(limits.seconds * limits.count, limits.wall)) + 2,
            },
        }
        with ExitStack() as stack:
            ours, reply = (stack.enter_context(each) for each in socket.socketpair())
            body = _memory(stack, json.dumps(request).encode())
            stdin = _memory(stack, program.stdin.encode(errors="surrogateescape"))
            printed, stdout = _pipe(stack)
            given, results = _pipe(stack)
            fds = [reply.fileno(), body, stdin, stdout, results]
            socket.send_fds(self._control, [b"run"], fds)
            for fd in (stdout, results):
                os.close(fd)
            reply.close()
            return _Watch(ours, printed, given, limits).outcome()


class _Watch:
    """One program from its start to its end: reads what it says, and kills it at its limits."""

    def __init__(self, reply: socket.socket, printed: int, given: int, limits: Limits):
        self.reply, self.printed, self.given, self.limits = reply, printed, given, limits
        self.said = {printed: bytearray(), given: bytearray()}
        self.began = self.turn = time.monotonic()
        self.waited = self.waited_before = 0.0
        self.ended = ""
        reply.settimeout(_START_DEADLINE)
        self.pid = self._number()

    def _number(self) -> int:
        message = self.reply.recv(REPLY.size, socket.MSG_WAITALL)
        if len(message) < REPLY.size:
            raise ConnectionResetError("the server of programs is gone")
        return REPLY.unpack(message)[0]

    def outcome(self) -> Outcome:
        """InfrastructureError where it did not start, or a layer could not be put around it."""
        if self.pid == NOT_STARTED:
            raise InfrastructureError("no process for a program: look at the limits of processes and memory")
        status = self._follow()
        first, *lines = [_line(line) for line in bytes(self.said[self.given]).split(b"\n")]
        if first != {"shut in": True} and not self.ended:  # it is said before the program's first line
            raise InfrastructureError(f"a program could not be shut in: {first or status}")
        if not self.ended and os.WIFSIGNALED(status):
            self.ended = f"ended by {signal.Signals(os.WTERMSIG(status)).name}"
        printed = self.said[self.printed].decode(errors="replace")
        return Outcome(printed, lines[:-1], self.ended, self.waited)

    def _follow(self) -> int:
        """Its wait status, once all that it said is read."""
        with selectors.DefaultSelector() as selector:
            for fd in self.said:
                os.set_blocking(fd, False)
                selector.register(fd, selectors.EVENT_READ)
            selector.register(self.reply, selectors.EVENT_READ)
            while not self.ended:
                ready = [key.fileobj for key, _ in selector.select(max(0.0, self._left()))]
                for each in ready:
                    if each is not self.reply and self._read(each):
                        selector.unregister(each)
                if self.reply in ready:
                    break
                if not ready and self._left() <= 0:
                    self.ended = "it took too long"
        if self.ended:
            self.reply.shutdown(socket.SHUT_WR)
        self.reply.settimeout(_END_DEADLINE)
        status = self._number()
        for end in self.said:
            self._read(end)
        return status

    def _left(self) -> float:
        """Seconds that it may still take."""
        with suppress(OSError, ValueError, IndexError):
            self.waited = int(Path(f"/proc/{self.pid}/schedstat").read_text().split()[1]) / 1e9
        now = time.monotonic()
        took = now - self.turn - (self.waited - self.waited_before)
        return min(self.limits.seconds - took, self.limits.wall - (now - self.began))

    def _read(self, fd: Any) -> bool:
        """Read what there is; True at the end of it. Too much ends the program."""
        while True:
            try:
                data = os.read(fd, 1 << 16)
            except BlockingIOError:
                return False
            room = self.limits.output - len(self.said[fd])
            self.said[fd].extend(data[:room])
            if fd == self.given and b"\n" in data:
                self.turn, self.waited_before = time.monotonic(), self.waited
            if len(data) > room:
                self.ended = f"said more than {self.limits.output:,} bytes"
            if not data or self.ended:
                return True


def _memory(stack: ExitStack, data: bytes) -> int:
    """A file in memory with `data`, at its beginning."""
    file = stack.enter_context(os.fdopen(os.memfd_create("program"), "w+b"))
    file.write(data)
    file.seek(0)
    return file.fileno()


def _pipe(stack: ExitStack) -> tuple[int, int]:
    read, write = os.pipe()
    stack.callback(os.close, read)
    return read, write


def _line(line: bytes) -> Any:
    """A message from the program's process, which may be anything."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
