"""What would hold up the event loop, in a thread; where a task of it stands."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


async def in_thread(work: Callable[[], T]) -> T:
    """What `work` gives, or its error, from a thread of its own; cancelled, that thread goes on by itself.

    The end of the process does not wait for it, as it would for `asyncio.to_thread`: a disk that hangs must
    not outlast `driver.stall`.
    """
    done: Future[T] = Future()
    done.set_running_or_notify_cancel()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:  # boundary: whoever awaits it is told, whatever it is
            done.set_exception(error)

    threading.Thread(target=run, name="in_thread", daemon=True).start()
    return await asyncio.wrap_future(done)


def describe_stack(task: "asyncio.Task[Any]") -> str:
    """File, line and function of a task's frames, outermost first."""
    frames = task.get_stack(limit=8)
    at = lambda f: f"{Path(f.f_code.co_filename).name}:{f.f_lineno} {f.f_code.co_name}"
    return f"{task.get_name()}: {' > '.join(map(at, frames))}"
