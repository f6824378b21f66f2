"""An object in a process of its own, its methods called over a socket: an engine or a rank without Ray.

python -m tests.gpu.processes SOCKET MODULE:CLASS
"""

import asyncio
import contextlib
import inspect
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

BORN = 60.0
"""Seconds in which a process opens its socket."""


class DiedError(Exception):
    """The process of a handle is no more."""


@dataclass(frozen=True)
class Handle:
    """Called as Ray's handle of an actor: `handle.method.remote(...)` is a `Future` at once."""

    address: str

    def __getattr__(self, name: str) -> "Method":
        if name.startswith("_"):
            raise AttributeError(name)
        return Method(self, name)


@dataclass(frozen=True)
class Method:
    """One method of the object behind a handle."""

    handle: Handle
    name: str

    def remote(self, *arguments: Any) -> "Future[Any]":
        """Call it; its value or its error is in what is returned."""
        answer: Future[Any] = Future()
        threading.Thread(target=_ask, args=(self, arguments, answer), daemon=True).start()
        return answer


def _ask(method: Method, arguments: Sequence[Any], answer: "Future[Any]") -> None:
    try:
        with _reach(method.handle.address) as pipe:
            pipe.send((method.name, arguments))
            done, value = pipe.recv()
    except Exception as error:  # boundary: whatever a broken socket raises
        done, value = False, DiedError(f"{method.name}: {error!r}")
    (answer.set_result if done else answer.set_exception)(value)


def _reach(address: str) -> Connection:
    """A socket that may not have been opened yet."""
    ends = time.monotonic() + BORN
    while True:
        try:
            return Client(address, "AF_UNIX")
        except FileNotFoundError:
            if time.monotonic() > ends:
                raise
            time.sleep(0.05)


class Process:
    """What `module:class` names, made without arguments in a process that ends with this one."""

    def __init__(self, what: str, environment: Mapping[str, str] | None = None):
        self.folder = tempfile.TemporaryDirectory()
        address = str(Path(self.folder.name, "socket"))
        self.handle = Handle(address)
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__, address, what],
            stdin=subprocess.PIPE,  # it ends when this end is closed
            env={**os.environ, **(environment or {})},
        )

    def call(self, name: str, *arguments: Any, seconds: float = 60.0) -> Any:
        """The value of a method within `seconds`."""
        return getattr(self.handle, name).remote(*arguments).result(seconds)

    def end(self) -> None:
        """At once, whatever it is doing."""
        self.process.kill()
        self.process.wait(timeout=10)
        self.folder.cleanup()


def answers(calls: Sequence["Future[Any]"], seconds: float) -> list[Any]:
    """The values of all, within `seconds` in all."""
    ends = time.monotonic() + seconds
    return [call.result(max(0.0, ends - time.monotonic())) for call in calls]


class Named:
    """Any function of any module, for what needs no object."""

    def call(self, module: str, name: str, *arguments: Any) -> Any:
        return getattr(import_module(module), name)(*arguments)


def _serve(address: str, what: str) -> None:
    """Answer calls one after another in the main thread, as Ray does; coroutines in threads of their own."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with Listener(address, "AF_UNIX", backlog=16) as listener:
        module, name = what.split(":")
        try:
            made: Any = getattr(import_module(module), name)()
        except Exception as error:  # boundary: every call is told
            made = _Unmade(error)
        while True:
            pipe = listener.accept()
            method, arguments = pipe.recv()
            try:
                own = getattr(made, method)
            except Exception as error:  # boundary: told to who asked
                _send(pipe, error)
                continue
            if inspect.iscoroutinefunction(own):
                threading.Thread(target=_answer, args=(pipe, own, arguments), daemon=True).start()
            else:
                _answer(pipe, own, arguments)


class _Unmade:
    def __init__(self, error: Exception):
        self.error = error

    def __getattr__(self, name: str) -> Any:
        raise self.error


def _answer(pipe: Connection, method: Any, arguments: Sequence[Any]) -> None:
    try:
        value = method(*arguments)
        _send(pipe, asyncio.run(value) if inspect.iscoroutine(value) else value)
    except Exception as error:  # boundary: told to who asked
        _send(pipe, error)


def _send(pipe: Connection, value: Any) -> None:
    if failed := isinstance(value, Exception):
        traceback.print_exception(value)
        try:
            pickle.loads(pickle.dumps(value))
        except Exception:  # boundary: an error of whatever library
            value = RuntimeError(f"{type(value).__name__}: {value}")
    with pipe, contextlib.suppress(OSError):  # who asked may be gone
        pipe.send((not failed, value))


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


if __name__ == "__main__":
    _serve(*sys.argv[1:])
