"""Processes of tests/gpu that are called over a socket, as an engine and a rank are there without Ray."""

import os
import signal
import time
from collections.abc import Iterator

import pytest

from tests.gpu.processes import DiedError, Process, answers


@pytest.fixture
def process() -> Iterator[Process]:
    begun = Process("tests.gpu.processes:Named")
    yield begun
    begun.end()


def test_a_method_gives_its_value_or_its_own_error(process):
    assert process.call("call", "math", "hypot", 3, 4) == 5
    with pytest.raises(ZeroDivisionError):
        process.call("call", "operator", "truediv", 1, 0)
    with pytest.raises(AttributeError):
        process.call("no_such_method")


def test_calls_made_at_once_share_their_seconds(process):
    sleep = process.handle.call.remote("time", "sleep", 5)
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        answers([sleep, process.handle.call.remote("math", "sqrt", 4)], 0.1)
    assert time.monotonic() - began < 1


def test_whoever_calls_a_process_that_is_killed_is_told(process):
    process.call("call", "math", "sqrt", 4)
    asked = process.handle.call.remote("time", "sleep", 60)
    time.sleep(0.05)
    os.kill(process.process.pid, signal.SIGKILL)
    with pytest.raises(DiedError, match="call"):
        asked.result(10)


def test_what_cannot_be_made_is_told_to_every_call():
    process = Process("tests.gpu.no_such_module:Engine")
    try:
        for _ in range(2):
            with pytest.raises(ModuleNotFoundError, match="no_such_module"):
                process.call("begin")
    finally:
        process.end()


def test_a_process_has_the_variables_that_it_is_given():
    process = Process("tests.gpu.processes:Named", {"NCCL_HOSTID": "engine"})
    try:
        assert process.call("call", "os", "getenv", "NCCL_HOSTID") == "engine"
    finally:
        process.end()
