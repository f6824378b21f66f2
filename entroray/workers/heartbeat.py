"""Who of a run's actors is frozen: each beats in a thread of its own, and the driver looks at all of them.

A beat is an entry of the key-value store of Ray's GCS. So an actor that still imports beats too, one whose
interpreter is held does not, and nobody waits for an actor in order to look at it.
"""

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import ray
from ray.exceptions import RayError
from ray.experimental import internal_kv

from entroray.errors import InfrastructureError, first_line
from entroray.train.pulse import TURNS, Beat, Pulse

INTERVAL = 2.0
"""Seconds between two beats, and between two looks."""
MOST = 2 * INTERVAL
"""Seconds that one look counts at most."""
_NAMESPACE = b"entroray"
_READ = 10.0
"""Seconds for the GCS to answer."""
GONE = 3
"""Reads in a row without an answer after which the run ends; after a minute Ray itself ends the process."""
MEMORY: dict[str, tuple[float, float]] = {}
"""By name of an actor GB of its process: as it began to work, and at its last beat."""


@dataclass(frozen=True)
class Watched:
    """One actor that is looked at."""

    handle: Any
    lose: Callable[[InfrastructureError], None]
    """Called once it is found frozen."""
    allowed: float = 0.0
    """As of `Pulse.look`."""
    name: str = ""


async def watch(actors: Callable[[], Iterable[Watched]]) -> None:
    """Look at all that `actors` gives, for ever; it is asked before every look.

    Time in which this task did not run, as the machine was stopped or busy, counts for nobody.
    InfrastructureError where Ray's head does not answer any more.
    """
    pulses, before, missed = dict[str, Pulse](), time.monotonic(), 0
    MEMORY.clear()
    while True:
        await asyncio.sleep(INTERVAL)
        looked = {_key(each.handle): each for each in actors()}
        try:
            beats = await asyncio.to_thread(_read, [*looked])
        except (RayError, OSError, RuntimeError) as error:  # of the GCS: nobody is frozen for that
            before, missed = time.monotonic(), missed + 1
            if missed == GONE:
                raise InfrastructureError(f"Ray's head is lost: {first_line(error)}") from error
            continue
        now, missed = time.monotonic(), 0
        passed, before = min(now - before, MOST), now
        pulses = {key: pulses.get(key) or Pulse() for key in looked}
        for key, each in looked.items():
            if beat := beats.get(key):
                first = MEMORY[each.name][0] if beat.turns and each.name in MEMORY else beat.memory
                MEMORY[each.name] = first, beat.memory
            if why := pulses[key].look(beats.get(key), passed, each.allowed):
                each.lose(InfrastructureError(why))


def memory_of(what: str) -> str:
    """How the memory of an actor that is lost grew, and that of another where it has more than doubled."""
    grown = {name: last - first for name, (first, last) in MEMORY.items()}
    name = what.partition(", ")[0]
    most = max(grown, key=lambda each: grown[each], default=name)
    told = [name, *([most] if most != name and grown[most] > MEMORY[most][0] else [])]
    said = [
        f"{each} grew from {{:.1f}} to {{:.1f}} GB".format(*MEMORY[each]) for each in told if each in MEMORY
    ]
    return f" ({', '.join(said)})" if said else ""


def _key(handle: Any) -> str:
    return str(handle._actor_id.hex())


def _read(keys: Sequence[str]) -> Mapping[str, Beat]:
    store = internal_kv.internal_kv_get_gcs_client()
    found = store.internal_kv_multi_get([key.encode() for key in keys], _NAMESPACE, timeout=_READ)
    return {key.decode(): Beat(*json.loads(value)) for key, value in found.items()}


def begin() -> None:
    """Beat from now on, once Ray makes this process an actor."""
    threading.Thread(target=_beat, name="heartbeat", daemon=True).start()


def _beat() -> None:
    serial = 0
    while True:
        if key := ray.get_runtime_context().get_actor_id():
            serial += 1
            memory = psutil.Process().memory_info().rss / 1e9
            beat = Beat(serial, TURNS.count, TURNS.limit, TURNS.failure, memory)
            _write(key, json.dumps(beat))
        time.sleep(INTERVAL)


def _write(key: str, value: str) -> None:
    try:
        internal_kv._internal_kv_put(key, value, overwrite=True, namespace=_NAMESPACE)
    except (RayError, OSError, RuntimeError):  # the next may get through
        return
