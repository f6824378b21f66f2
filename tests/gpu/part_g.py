"""Part g: an engine and a rank over NCCL, both on one card, and an engine that dies in a broadcast.

    python -m tests.gpu.part_g

NCCL refuses two ranks of one host on one card and tells hosts apart by NCCL_HOSTID: each has its own here,
and they meet over loopback. On the CPU the engine dies while `plasma` reads the weights.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

from entroray.errors import InfrastructureError
from tests.gpu import record
from tests.gpu.pair import Pair
from tests.gpu.part_d import _free_port
from tests.gpu.record import Asked, Check, Step, holds, measured, not_here

SOCKETS = {"NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1"}
HOSTS = tuple({**SOCKETS, "NCCL_HOSTID": name} for name in ("engine", "learner"))
FREED = 60.0
"""Seconds that an engine's death in a broadcast may cost."""
HELD: dict[str, Any] = {}


def met(asked: Asked) -> Iterator[Check]:
    """Two ranks on one card, ten megabytes."""
    if not asked.card:
        yield not_here("NCCL", "it needs a card")
        return
    command = [sys.executable, "-m", "tests.gpu.nccl_pair"]
    port = str(_free_port())
    begin = lambda rank: subprocess.Popen(
        [*command, str(rank), port], env={**os.environ, **HOSTS[rank]}, stdout=subprocess.PIPE
    )
    both = [begin(0), begin(1)]
    try:
        said = both[1].communicate(timeout=25)[0]
    finally:
        for process in both:
            process.kill()
    found = json.loads(said or b"{}")
    why = "ten megabytes arrive between two NCCL_HOSTIDs on one card"
    yield holds("NCCL on one card", bool(found.get("right")), why, **found)


def pair(asked: Asked) -> Pair:
    """Of this call."""
    if "pair" not in HELD:
        HELD["pair"] = Pair(asked, "plasma" if asked.dry else "nccl", HOSTS)
    return HELD["pair"]


def started(asked: Asked) -> Iterator[Check]:
    """Both processes, and weights sent."""
    both = pair(asked)
    yield from both.start()
    began = time.perf_counter()
    both.connect()
    yield measured(f"{both.transfer}: connected", seconds=time.perf_counter() - began)
    for _ in range(2):
        yield both.compare(f"{both.transfer}: sent in {both.sync():.2f} s")


def killed(asked: Asked) -> Iterator[Check]:
    """The engine dies behind half of the parameters: the learner is free within a minute, and goes on."""
    both = pair(asked).restart()
    both.rank.call("break_at", 0.5, both.engine.process.pid)
    began, error = time.perf_counter(), None
    try:
        both.sync()
    except Exception as raised:  # boundary: which it is, is what is looked at
        error = raised
    took = time.perf_counter() - began
    said = f"{type(error).__name__}: {error}"[:200]
    held = isinstance(error, InfrastructureError) and took <= FREED
    why = f"InfrastructureError within {FREED:g} s; it was {said}"
    yield holds("an engine dies in a transfer", held, why, seconds=took)
    began = time.perf_counter()
    both.rank.call("prompt_logprobs", both.text(), seconds=20.0)
    yield holds("the rank computes again", True, "within 20 s", seconds=time.perf_counter() - began)


def replaced(asked: Asked) -> Iterator[Check]:
    """Another engine takes its place and is served."""
    if asked.dry:
        yield not_here("another engine", "CI would start vLLM once more")
        return
    both = pair(asked).restart()
    both.renew_engine()
    yield from both.begin_engine()
    both.connect()
    yield both.compare(f"another engine, served in {both.sync():.2f} s")


def leave() -> None:
    """No process is left."""
    if "pair" in HELD:
        HELD["pair"].end()


STEPS: dict[str, Step] = {f.__name__: f for f in (met, started, killed, replaced)}

if __name__ == "__main__":
    try:
        record.main("g", "engine and learner on one card, over nccl", STEPS)
    finally:
        leave()
