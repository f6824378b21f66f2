"""The faults of a soak: how each finds its victim in the state it wants, fires, and is seen to have fired."""

import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import psutil

from tests.faults import soak_machine
from tests.faults.soak_machine import is_dead, title

STOPPED = 4.0
"""Seconds between SIGSTOP and SIGCONT: slow, which nobody may be killed for."""
PATIENCE = 60.0
"""Seconds for a victim to come into the state that a fault wants; after it the fault fires as it is."""
LOOK = 0.05
"""Seconds over which a process is seen to compute or not."""


class Kind(NamedTuple):
    """Of a fault."""

    role: str
    number: signal.Signals
    state: str = ""
    """Of an engine: serving | idle."""
    answers: tuple[str, ...] = ()
    """Events that tell that it was noticed and healed; without any, and no exit, two more steps are it."""
    exits: tuple[int, ...] = ()
    """Exit codes that a driver may end with because of it."""


KILLED, ENDED = -signal.SIGKILL, 128 + signal.SIGTERM
KINDS = {
    "kill an idle engine": Kind("engine", signal.SIGKILL, "idle", ("engine_joined",)),
    "kill a serving engine": Kind("engine", signal.SIGKILL, "serving", ("engine_joined",)),
    "kill a verifier": Kind("verifier", signal.SIGKILL, answers=("verifier_joined",)),
    "kill a judge process": Kind("judge", signal.SIGKILL),
    "kill a rank": Kind("rank", signal.SIGKILL, answers=("rolled_back",), exits=(4,)),
    "kill the driver": Kind("driver", signal.SIGKILL, exits=(KILLED,)),
    "terminate the driver": Kind("driver", signal.SIGTERM, exits=(ENDED,)),
    "stop an engine": Kind("engine", signal.SIGSTOP),
    "stop a verifier": Kind("verifier", signal.SIGSTOP),
    "stop a rank": Kind("rank", signal.SIGSTOP),
    "stop the driver": Kind("driver", signal.SIGSTOP),
}
"""A full disk is none of them: it would be that of everybody on the machine."""


def fire(
    kind: str, share: float, driver: int, living: Callable[[], Sequence[psutil.Process]]
) -> dict[str, Any] | None:
    """Signal the victim at `share` of those there are; its witness, or None where none was so in time.

    `living()` are the processes of the run.
    """
    what, until = KINDS[kind], time.monotonic() + PATIENCE
    while time.monotonic() < until and not is_dead(psutil.Process(driver)):
        processes = living()
        victims = [p for p in processes if _is_a(what.role, p, driver)]
        victim = victims[int(share * len(victims))] if victims else None
        if victim and (not what.state or _state(victim, processes) == what.state):
            witness = {"pid": victim.pid, "title": title(victim.pid)[:80].strip(), "state": what.state}
            return witness | (_stop if what.number == signal.SIGSTOP else _kill)(victim, what.number)
        time.sleep(0.0 if victim else 0.2)
    return None


def _is_a(role: str, process: psutil.Process, driver: int) -> bool:
    if role == "judge":
        return soak_machine.is_judge(process)
    return role == soak_machine.role(process, driver)


def _state(engine: psutil.Process, living: Sequence[psutil.Process]) -> str:
    """serving: it computes and no rank does; idle: a rank answers a call, which Ray shows in its title."""
    with suppress(psutil.Error):
        began = sum(engine.cpu_times()[:2])
        time.sleep(LOOK)
        computes = sum(engine.cpu_times()[:2]) - began >= LOOK / 4
        ranks = any(title(p.pid).startswith("ray::LearnerRank.") for p in living)
        if computes != ranks:
            return "serving" if computes else "idle"
    return ""


def _kill(victim: psutil.Process, number: signal.Signals) -> dict[str, Any]:
    """Seconds until it was gone; a driver that was asked to end takes as long as it says."""
    began = time.monotonic()
    os.kill(victim.pid, number)
    while number == signal.SIGKILL and not is_dead(victim) and time.monotonic() < began + 30.0:
        time.sleep(0.005)
    return {"gone": is_dead(victim), "seconds": round(time.monotonic() - began, 3)}


def _stop(victim: psutil.Process, number: signal.Signals) -> dict[str, Any]:
    """Whether the kernel showed it as stopped, and whether it lived when it went on."""
    os.kill(victim.pid, number)
    try:
        time.sleep(STOPPED / 2)
        seen = victim.status() == psutil.STATUS_STOPPED
        time.sleep(STOPPED / 2)
        return {"stopped": seen, "lives": not is_dead(victim)}
    finally:
        with suppress(ProcessLookupError):
            os.kill(victim.pid, signal.SIGCONT)


def fired(kind: str, witness: dict[str, Any] | None) -> bool:
    """Whether a witness shows that a fault was there."""
    if witness is None:
        return False
    number = KINDS[kind].number
    if number == signal.SIGSTOP:
        return bool(witness["stopped"] and witness["lives"])
    return bool(witness["gone"] or number == signal.SIGTERM)
