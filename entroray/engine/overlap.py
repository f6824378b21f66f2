"""Steps that vLLM schedules before the last is read (`generator.overlap`), and how an engine comes to rest.

A token gets the version that is served as its step is read, not as it is drawn: before weights change,
nothing more is scheduled and what is under way is read.
"""

import time
from collections.abc import Callable
from typing import Any

from entroray.errors import InfrastructureError

REST = 60.0
"""Seconds for the steps under way, of which there are two at most."""


def come_to_rest(llm: Any, collect: Callable[[list[Any]], None]) -> None:
    """Pause scheduling and have `collect` take every output under way; requests stay, and wait for `go_on`.

    InfrastructureError if a step is under way after `REST` seconds. Nothing is done without overlap.
    """
    queue = llm.llm_engine.engine_core.engine_core.batch_queue
    if queue is not None:
        llm.sleep(level=0, mode="keep")
    until = time.monotonic() + REST
    while queue:
        if time.monotonic() > until:
            raise InfrastructureError(
                f"{len(queue)} steps of an engine are under way after {REST:g} s: set generator.overlap=false"
            )
        collect(llm.llm_engine.step())


def go_on(llm: Any) -> None:
    """Schedule again."""
    if llm.llm_engine.engine_core.engine_core.batch_queue is not None:
        llm.wake_up(tags=["scheduling"])
