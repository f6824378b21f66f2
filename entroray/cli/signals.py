"""Ctrl-C and SIGTERM: in training they stop the driver, which saves a checkpoint; elsewhere they end all."""

import asyncio
import signal
import sys
from typing import Any

from entroray.errors import Stopped
from entroray.train.driver import Driver

OUTSIDE = "ended by SIGTERM outside of training"


def take_sigterm() -> None:
    """While no event loop runs, SIGTERM is an exception like Ctrl-C: what was started is ended."""
    signal.signal(signal.SIGTERM, _raise)


def _raise(number: int, _: Any) -> None:
    raise Stopped(number, OUTSIDE)


def cancel_on_sigterm() -> None:
    """Have SIGTERM cancel this task, which unwinds in order: an exception out of the event loop does not."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.remove_signal_handler(number)
    loop.add_signal_handler(signal.SIGTERM, task.cancel, OUTSIDE)  # asyncio's own, of Ctrl-C, says nothing


def cancel_on_sigint() -> None:
    """Have Ctrl-C cancel this task as well, once, where a driver has taken asyncio's own way with it."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task

    def cancel() -> None:
        loop.remove_signal_handler(signal.SIGINT)
        task.cancel()

    loop.add_signal_handler(signal.SIGINT, cancel)


def stop_on_signals(driver: Driver) -> list[int]:
    """Ctrl-C and SIGTERM ask the driver to stop, once; a second one ends the process as it always did."""
    caught: list[int] = []
    loop = asyncio.get_running_loop()

    def stop(number: int) -> None:
        caught.append(number)
        print(f"\n{signal.Signals(number).name}: saving a checkpoint", file=sys.stderr, flush=True)
        for each in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(each)
        driver.stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop, number)
    return caught
