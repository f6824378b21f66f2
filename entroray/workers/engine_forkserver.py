"""The fork server of engines: imports vLLM once, while the driver reads its data, and forks Ray's workers.

Ray runs `python engine_forkserver.py SOCKET default_worker.py ...` where it would run `python
default_worker.py ...`. That process hands over its arguments, variables and streams, and lives as long as the
worker forked for it; where no server answers, it becomes the worker. It imports the standard library only.
"""

import gc
import json
import os
import runpy
import shutil
import signal
import socket
import struct
import sys
import tempfile
import threading
from collections.abc import Iterable
from importlib import import_module

MODULES = ("vllm.entrypoints.llm", "vllm.v1.worker.cpu_worker", "entroray.engine.generator")
"""What an engine on a CPU imports: 8 s."""
SIZE = struct.Struct("!q")
"""Length of the message that follows."""


def ask(path: str, arguments: list[str]) -> None:
    """Have the server at `path` fork `python <arguments>`, and stay until that has ended."""
    message = json.dumps([arguments, dict(os.environ), os.getcwd()]).encode()
    try:
        server = socket.socket(socket.AF_UNIX)
        server.connect(path)
        socket.send_fds(server, [SIZE.pack(len(message))], [0, 1, 2])
        server.sendall(message)
        forked = server.recv(1)
    except OSError:
        forked = b""
    if not forked:
        os.execv(sys.executable, [sys.executable, *arguments])
    server.recv(1)  # deadline: it lives as long as the worker


def serve(path: str, modules: Iterable[str] = MODULES) -> None:
    """Import `modules`, then fork a worker for each that asks, until standard input closes."""
    threading.Thread(target=_end_with_driver, args=(os.path.dirname(path),), daemon=True).start()
    server = socket.socket(socket.AF_UNIX)
    server.bind(f"{path}.new")
    server.listen()
    os.rename(f"{path}.new", path)
    sys.modules["ray"] = None  # type: ignore[assignment]  # Ray reads a worker's variables when imported
    for module in modules:
        import_module(module)
    del sys.modules["ray"]
    gc.collect()
    gc.freeze()  # pages that no collection touches stay shared
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # whoever ends is gone
    while True:
        channel, _ = server.accept()
        header, streams, _, _ = socket.recv_fds(channel, SIZE.size, 3)
        whole = len(header) == SIZE.size  # else whoever asked is dead
        message = channel.recv(SIZE.unpack(header)[0], socket.MSG_WAITALL) if whole else b""
        if whole and os.fork() == 0:
            server.close()
            channel.sendall(b"1")
            arguments, variables, folder = json.loads(message)
            return _become(streams, arguments, variables, folder, channel)
        for each in (channel.detach(), *streams):
            os.close(each)


def _end_with_driver(folder: str) -> None:
    sys.stdin.buffer.read()
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)


def _become(
    streams: list[int], arguments: list[str], variables: dict[str, str], folder: str, _: socket.socket
) -> None:
    """Go on as `python <arguments>`; the channel closes with this process."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setpgid(0, 0)  # Ray ends the whole group of a worker that died
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(variables)
    tempfile.tempdir = None  # of its own variables, not of those it was forked with
    os.chdir(folder)
    sys.argv, sys.path[0] = arguments, os.path.dirname(arguments[0])
    runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    path, *arguments = sys.argv[1:]
    if arguments:
        ask(path, arguments)
    else:
        serve(path)
