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


class RestlessError(InfrastructureError):
    """An engine that was paused has steps under way which nobody can read: it serves nothing any more."""


def come_to_rest(llm: Any, collect: Callable[[list[Any]], None]) -> None:
    """Pause scheduling and have `collect` take every output under way; requests stay, and wait for `go_on`.

    RestlessError if a step fails, or is under way after `REST` seconds. Nothing is done without overlap.
    """
    queue = llm.llm_engine.engine_core.engine_core.batch_queue
    if queue is not None:
        llm.sleep(level=0, mode="keep")
    until = time.monotonic() + REST
    while queue:
        if time.monotonic() > until:
            raise RestlessError(
                f"{len(queue)} steps of an engine are under way after {REST:g} s: set generator.overlap=false"
            )
        try:
            collect(llm.llm_engine.step())
        except Exception as error:  # boundary: vLLM raises what the card does
            raise RestlessError(f"a step of an engine failed as it came to rest: {error!r}") from error


def go_on(llm: Any) -> None:
    """Schedule again."""
    if llm.llm_engine.engine_core.engine_core.batch_queue is not None:
        llm.wake_up(tags=["scheduling"])
