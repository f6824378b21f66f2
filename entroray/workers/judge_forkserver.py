"""The fork server of a verifier: builds the judge once, and forks the processes that judge.

Run as `python -m entroray.workers.judge_forkserver FD REWARD MEMORY_MB`, FD being one end of a socket pair.
It takes two commands: fork a worker for the descriptor that comes along, or kill a worker with its process
group. Only it reaps its workers, so a pid is never that of another process. When the other end closes, it
kills them all and exits. Only the standard library is imported before its own first fork, which detaches it
from the Ray actor (Ray kills the children of a dying actor, but not their children).
"""

import ctypes
import gc
import json
import os
import pickle
import resource
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, NoReturn

HEADER = struct.Struct("!q")
"""Length of the message that follows; alone, a command to the fork server: a pid to kill, or FORK."""

FORK = 0


def send(channel: socket.socket, message: bytes) -> None:
    """One message, behind its length."""
    channel.sendall(HEADER.pack(len(message)) + message)


def main(fd: int, reward: str, memory_mb: str) -> None:
    """Build the judge, send an empty message (or what is wrong), and serve until EOF."""
    control = socket.socket(fileno=fd)
    if pid := os.fork():
        send(control, str(pid).encode())
        os._exit(0)
    from entroray.errors import ConfigError
    from entroray.reward import build_verification

    try:
        judge = build_verification(**json.loads(reward))
    except ConfigError as error:
        send(control, str(error).encode())
        return
    gc.freeze()  # pages that no collection touches stay shared with the workers
    send(control, b"")
    _serve(control, judge, json.loads(memory_mb))


def _serve(control: socket.socket, judge: Callable[..., Any], memory_mb: int | None) -> NoReturn:
    children: set[int] = set()
    while (command := _receive_command(control)) is not None:
        number, channel = command
        if channel is None:
            _kill_groups(children & {number})
            continue
        pid = os.fork()
        if pid == 0:
            control.close()
            _serve_items(judge, channel, memory_mb)
        channel.close()
        os.setpgid(pid, pid)
        children -= {child for child in children if os.waitpid(child, os.WNOHANG)[0]}
        children.add(pid)
        send(control, str(pid).encode())
    _kill_groups(children)
    for child in children:
        os.waitpid(child, 0)
    os._exit(0)


def _receive_command(control: socket.socket) -> tuple[int, socket.socket | None] | None:
    """(pid to kill, None) or (FORK, the worker's channel); None if the verifier is gone."""
    message, fds, _, _ = socket.recv_fds(control, HEADER.size, 1)
    if len(message) < HEADER.size:
        return None
    return HEADER.unpack(message)[0], socket.socket(fileno=fds[0]) if fds else None


def _kill_groups(pids: set[int]) -> None:
    for pid in pids:
        os.killpg(pid, signal.SIGKILL)


def _serve_items(judge: Callable[..., Any], channel: socket.socket, memory_mb: int | None) -> NoReturn:
    try:
        _limit_resources(memory_mb)
        while header := channel.recv(HEADER.size, socket.MSG_WAITALL):
            item = pickle.loads(channel.recv(HEADER.unpack(header)[0], socket.MSG_WAITALL))
            send(channel, json.dumps(asdict(judge(*item))).encode())
    except BaseException:  # boundary: a fork must never return into the server's loop
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _limit_resources(memory_mb: int | None) -> None:
    """Die with the fork server, leave no core file, allocate at most `memory_mb` more than now."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if memory_mb is not None:
        with open("/proc/self/status") as status:
            held = next(int(line.split()[1]) for line in status if line.startswith("VmData"))
        limit = held * 1024 + memory_mb * 2**20
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
