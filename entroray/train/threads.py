"""What would hold up the event loop, in a thread."""

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")


async def in_thread(work: Callable[[], T]) -> T:
    """What `work` gives, or its error, from a thread of its own; cancelled, that thread goes on by itself.

    The end of the process does not wait for it, as it would for `asyncio.to_thread`: a disk that hangs must
    not outlast `driver.stall`.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def give(result: T | None, error: BaseException | None) -> None:
        if done.done():  # nobody waits any more
            return
        if error is None:
            done.set_result(result)  # type: ignore[arg-type]
        else:
            done.set_exception(error)

    def run() -> None:
        result, failed = None, None
        try:
            result = work()
        except BaseException as error:  # boundary: whoever awaits it is told, whatever it is
            failed = error
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(give, result, failed)

    threading.Thread(target=run, name="in_thread", daemon=True).start()
    return await done
