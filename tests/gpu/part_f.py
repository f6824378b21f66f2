"""Part f: an engine and a rank on one card by turns, without Ray, over CUDA IPC: python -m tests.gpu.part_f

Qwen2.5-1.5B's shape, random weights; the engine decodes with CUDA graphs, which must serve what was loaded
into them. On the CPU the transfer is `plasma`, whose bytes a pipe carries in place of Ray.
"""

import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from tests.gpu import record
from tests.gpu.pair import NATS, Pair
from tests.gpu.record import Asked, Check, Step, at_most, holds, measured, not_here

ROUNDS = 3
HOLD = 20.0
"""GiB that a learner holds while the engine wakes."""
LEFT = 0.06
"""GiB of the card by which a later round may end below an earlier one."""
HELD: dict[str, Any] = {}


def pair(asked: Asked) -> Pair:
    """Of this call."""
    if "pair" not in HELD:
        HELD["pair"] = Pair(asked, "plasma" if asked.dry else "ipc", sleeps=asked.card)
    return HELD["pair"]


def started(asked: Asked) -> Iterator[Check]:
    """Both processes, and the first weights: those that both read from the disk."""
    both = pair(asked)
    yield from both.start()
    yield both.compare("read from the disk")


def first(asked: Asked) -> Iterator[Check]:
    """The same weights, sent."""
    both = pair(asked).restart()
    began = time.perf_counter()
    both.connect()
    yield measured(f"{both.transfer}: connected", seconds=time.perf_counter() - began)
    yield measured(f"{both.transfer}: the first sync", seconds=both.sync())
    yield both.compare("sent unchanged")


def rounds(asked: Asked) -> Iterator[Check]:
    """Draw, sleep, update, send, wake, thrice: both sides agree, and the card has as much room as before."""
    both, free = pair(asked).restart(), []
    begun = both.logprobs()[1]
    for number in range(1, ROUNDS + 1):
        groups = both.groups()
        if asked.card:
            both.engine.call("sleep")
        found = both.rank.call("train", groups, seconds=60.0)
        yield at_most(f"round {number}: mean nats of what was drawn", NATS, mean=found["mean_nats"])
        finite = bool(np.isfinite([found["loss"], found["grad_norm"]]).all()) and not found["skipped"]
        yield holds(f"round {number}: an update", finite, "finite, not skipped", **found)
        seconds = both.sync()
        yield both.compare(f"round {number}: sent in {seconds:.2f} s")
        free.append(both.free() if asked.card else 0.0)
    moved = float(np.abs(both.logprobs()[1] - begun).mean())
    least = 1e-4 if asked.dry else 2 * NATS
    yield holds("the text's log-probs moved", moved > least, f"by more than {least:g} nats", nats=moved)
    if not asked.card:
        yield not_here("memory after a round", "of a card")
        return
    yield at_most("GiB of the card lost between the rounds", LEFT, gib=free[0] - free[-1])


def crowded(asked: Asked) -> Iterator[Check]:
    """The engine wakes while the learner holds 20 GiB besides."""
    both = pair(asked).restart()
    if not asked.card:
        yield not_here("sleep", "on a card")
        return
    groups, awake = both.groups(), both.free()
    began = time.perf_counter()
    both.engine.call("sleep")
    yield measured("slept", seconds=time.perf_counter() - began, freed_gib=both.free() - awake)
    both.rank.call("hold", HOLD)
    both.rank.call("train", groups, seconds=60.0)
    yield measured("sent, woken", seconds=both.sync(), free_gib=both.free())
    yield both.compare("with 20 GiB held")
    both.rank.call("hold", 0.0)
    yield at_most("GiB of the card lost over it", LEFT, gib=awake - both.free())


def reconnected(asked: Asked) -> Iterator[Check]:
    """A transfer that is opened once more leaves nothing of the one before."""
    both = pair(asked).restart()
    free = []
    for _ in range(3):
        both.connect()
        both.sync()
        free.append(both.free() if asked.card else 0.0)
    yield both.compare("connected anew")
    if asked.card:  # the first takes what sending needs, which `crowded` gave back
        yield at_most("GiB of the card lost over two more connections", LEFT, gib=free[0] - free[-1])


def leave() -> None:
    """No process is left."""
    if "pair" in HELD:
        HELD["pair"].end()


STEPS: dict[str, Step] = {f.__name__: f for f in (started, first, rounds, crowded, reconnected)}

if __name__ == "__main__":
    try:
        record.main("f", "engine and learner on one card, over ipc", STEPS)
    finally:
        leave()
