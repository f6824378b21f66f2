"""F40: a pickle that runs code, sent to every port where a process of a run listens."""

import os
import pickle
import re
import socket
import struct
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import zmq

from tests.faults.record import Fault
from tests.faults.test_lost_ranks import SMALL, START
from tests.ray.processes import bound, descendants, printed_at_end, start, step_reached, steps, until

ROOT = Path(__file__).parents[2]
SECONDS = 1.0
"""For a port to answer."""
PARTS = ("gcs_server", "raylet", "ray::Generator", "ray::LearnerRan", "ray::Verifier")


class Payload:
    """Makes a folder, wherever it is unpickled."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def send(host: str, port: int, data: bytes) -> bool:
    """As it is; whether somebody took the connection."""
    with socket.create_connection((host, port), SECONDS) as channel, suppress(OSError):
        channel.sendall(data)
        channel.recv(1 << 16)
    return True


def over_zmq(host: str, port: int, data: bytes) -> bool:
    """As pyzmq's `send_pyobj` does, and as vLLM's processes speak to each other."""
    with zmq.Context() as context:
        for kind in (zmq.DEALER, zmq.PUSH):
            channel = context.socket(kind)
            channel.setsockopt(zmq.LINGER, 200)
            channel.connect(f"tcp://{host}:{port}")
            with suppress(zmq.Again):
                channel.send(data, zmq.NOBLOCK)
                channel.send_multipart([b"", data], zmq.NOBLOCK)
            time.sleep(0.2)
            channel.close()
    return True


def into_store(host: str, port: int, data: bytes) -> bool:
    """As a value of torch's TCPStore, in its own protocol: its client waits for ever where none answers."""
    told, nonce = lambda text: struct.pack("<Q", len(text)) + text, struct.pack("<I", 7)
    with socket.create_connection((host, port), SECONDS) as channel, suppress(OSError):
        channel.sendall(b"\x00" + struct.pack("<I", 0x3C85F7CE) + b"\x0d" + nonce)  # its magic number, a ping
        if channel.recv(4) != nonce:
            return False
        for key in (b"/init", b"/worker_addr", b"/broadcast"):
            channel.sendall(b"\x01" + told(key) + told(data))
        return True
    return False


def over_http(host: str, port: int, data: bytes) -> bool:
    """As a body that says it is a pickle, to paths that a server of ours or of vLLM might have."""
    asked = b""
    for path in ("", "judge", "update_weights", "init_weight_transfer_engine", "collective_rpc"):
        head = f"POST /{path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/x-pickle\r\n"
        asked += f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data
    return send(host, port, asked)


WAYS: dict[str, Callable[[str, int, bytes], bool]] = {
    "raw": send,
    "behind its length": lambda host, port, data: send(host, port, struct.pack("!i", len(data)) + data),
    "behind a long length": lambda host, port, data: send(host, port, struct.pack("<Q", len(data)) + data),
    "http": over_http,
    "zmq": over_zmq,
    "store": into_store,
}


def send_everywhere(ports: set[tuple[str, int]], data: bytes) -> dict[str, int]:
    """Way -> how many ports took it."""

    def each(asked: tuple[str, tuple[str, int]]) -> tuple[str, bool]:
        with suppress(OSError):
            return asked[0], WAYS[asked[0]](*asked[1], data)
        return asked[0], False

    with ThreadPoolExecutor(16) as pool:
        told = list(pool.map(each, [(way, port) for way in WAYS for port in sorted(ports)]))
    return {way: sum(took for name, took in told if name == way) for way in WAYS}


@pytest.mark.faults
@pytest.mark.timeout(600)
@pytest.mark.fault("F40", "a pickle that runs code, sent in six ways to every port of a run with two ranks")
def test_no_port_of_a_run_unpickles_what_it_is_sent(fault: Fault, tmp_path: Path, model: str) -> None:
    folder, trap = tmp_path / "run", tmp_path / "trap"
    pickle.loads(pickle.dumps(Payload(trap)))
    assert trap.exists(), "the payload works"
    trap.rmdir()
    told = ["learner.ranks=2", "run.steps=1000", f"run.dir={folder}", f"model.path={model}"]
    process = start(*SMALL, *told)
    until(process, step_reached(folder, 2), START)
    ours = [psutil.Process(process.pid), *descendants(process)]
    names = {p.name() for p in ours if bound(p)}
    assert {part for part in PARTS if not any(name.startswith(part) for name in names)} == set(), names
    found = {(str(host), port) for p in ours for kind, host, port in bound(p) if kind == "tcp"}
    took = send_everywhere(found, pickle.dumps(Payload(trap)))
    assert took["raw"] > len(found) / 2 and took["store"] >= 1, took
    fault.fired(f"{took['raw']} of {len(found)} ports took it, {took['store']} as a value of torch's store")
    until(process, step_reached(folder, steps(folder)[-1] + 2), START)
    assert not trap.exists()
    fault.saw("nowhere was it run")
    process.terminate()
    printed_at_end(process, 143)
    assert not trap.exists()
    fault.goes_on("two more steps, then ended by SIGTERM with 143")


def unpickles(server: socket.socket) -> None:
    """What whoever connects has sent, behind a length or not, as multiprocessing and many others do."""
    while True:
        try:
            channel, _ = server.accept()
        except OSError:
            return
        data = channel.recv(1 << 16)
        for skipped in (0, 4, 8):
            with suppress(Exception):  # boundary: it is no pickle
                pickle.loads(data[skipped:])
        channel.close()


@pytest.mark.faults
def test_a_port_that_unpickles_would_be_found(tmp_path: Path) -> None:
    """What the test above would miss, it would pass by."""
    trap, data = tmp_path / "trap", pickle.dumps(Payload(tmp_path / "trap"))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert ("tcp", "127.0.0.1", port) in {(k, str(h), p) for k, h, p in bound(psutil.Process())}
        threading.Thread(target=unpickles, args=(server,), daemon=True).start()
        for way in ("raw", "behind its length", "behind a long length"):
            assert WAYS[way]("127.0.0.1", port, data) and trap.exists(), way
            trap.rmdir()
    with zmq.Context() as context, context.socket(zmq.PULL) as pulled:
        port = pulled.bind_to_random_port("tcp://127.0.0.1")
        over_zmq("127.0.0.1", port, data)
        assert pulled.poll(5000)
        pulled.recv_pyobj()
        assert trap.exists(), "zmq"
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    assert send_everywhere({("127.0.0.1", store.port)}, data)["store"] == 1
    assert store.get("init") == store.get("broadcast") == data


def test_what_is_unpickled_in_our_code_comes_from_no_socket_that_listens() -> None:
    """By the list of places: whoever adds one says here why it may."""
    may = {
        "data/large_questions.py": "files of our own cache",
        "reward/code_tests.py": "by an unpickler that knows no globals",
        "workers/judge_forkserver.py": "from its verifier, over a socketpair",
    }
    reads = re.compile(r"pickle\.loads?\b|Unpickler|recv_pyobj|multiprocessing\.connection|allow_pickle=True")
    sources = {str(f.relative_to(ROOT / "entroray")): f.read_text() for f in ROOT.glob("entroray/**/*.py")}
    assert {name for name, text in sources.items() if reads.search(text)} == set(may)
