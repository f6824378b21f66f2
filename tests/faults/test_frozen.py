"""What is frozen is killed and replaced, what is slow is not, and no collective waits for half an hour."""

import asyncio
import os
import signal
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import psutil
import pytest

from entroray.engine.vllm_request import Request
from entroray.errors import InfrastructureError
from entroray.types import Draw
from entroray.wiring import actors, compose, dataset
from entroray.wiring.parts import build_parts
from entroray.workers import cluster
from tests.faults.record import Fault
from tests.ray.stack import ROOM, Stack

STOPPED, RAN = 0.9, 0.1


def ask(handle: Any, question: Callable[[Any], Any]) -> Any:
    """What an actor answers to a function of itself."""
    return cluster.wait([handle.__ray_call__.remote(question)], deadline=60.0, what="an actor")[0]


def pid(handle: Any) -> int:
    return ask(handle, lambda actor: os.getpid())


async def slowed(pids: list[int], seconds: float) -> int:
    """Processes run a tenth of the time; how often they were stopped."""
    times = int(seconds / (STOPPED + RAN))
    for _ in range(times):
        for number, wait in ((signal.SIGSTOP, STOPPED), (signal.SIGCONT, RAN)):
            for each in pids:
                os.kill(each, number)
            await asyncio.sleep(wait)
    return times


@contextmanager
def lost_by(events: list[str], *expected: str) -> Any:
    """Inside something is frozen; afterwards these are the events that came."""
    del events[:]
    yield
    assert sorted(events) == sorted(expected)


async def until(true: Callable[[], bool], seconds: float) -> None:
    async with asyncio.timeout(seconds):
        while not true():
            await asyncio.sleep(0.1)


def ended(number: int) -> bool:
    return not psutil.pid_exists(number) or psutil.Process(number).status() == psutil.STATUS_ZOMBIE


def killer_of_the_thread() -> Callable[[Any], None]:
    """What ends the thread of an engine; pickled by value, since an actor cannot import a test."""

    def kill(engine: Any) -> None:
        def die(future: Future) -> None:
            raise SystemExit("for the test")

        engine.inbox.put((die, Future()))

    return kill


@pytest.mark.faults
@pytest.mark.fault(
    "F04", "SIGSTOP to an idle engine, a verifier and a rank; before, a tenth of the time to each"
)
@pytest.mark.timeout(580)
def test_whoever_is_frozen_is_killed_and_replaced_and_who_is_slow_is_not(
    fault: Fault, stack: Stack, model: str
) -> None:
    events = list[str]()

    def report(kind: str, **fields: Any) -> None:
        name = next(fields[role] for role in ("engine", "verifier", "rank") if role in fields)
        events.append(f"{kind} {name}" + (f": {fields['error'][:24]}" if "error" in fields else ""))

    async def run() -> None:
        config, _ = compose.load_config([*ROOM, f"model.path={model}", "generator.restarts=2"])
        parts, judge = build_parts(config), dataset.judge_spec(config)
        m = await actors.start_actors(config, model, parts, judge, (1, 2, 3), total_updates=1, report=report)
        try:
            await slow_and_frozen(m)
        finally:
            await m.end()

    async def slow_and_frozen(m: actors.Actors) -> None:
        every = [m.engines.handles[0], m.verifiers.handles[0], m.learner.handles[0]]
        pids = [await asyncio.to_thread(pid, handle) for handle in every]
        with lost_by(events):
            request = Request("q", (1, 2, 3), (5,), Draw(1.0, 64), deadline=200.0)
            drawn = asyncio.create_task(m.engines.sample(request))
            assert await slowed(pids, 45.0) == 45
            assert len(await drawn) == 1, "witness: 45 times stopped, and it drew its sample"
        with lost_by(
            events, "engine_lost generator 0: the engine's thread died", "engine_joined generator 1"
        ):
            every[0].__ray_call__.remote(killer_of_the_thread())
            await until(lambda: len(events) == 2, 150.0)
        idle = await asyncio.to_thread(pid, m.engines.handles[0])
        lost = "frozen: no sign of life "
        with lost_by(
            events,
            f"engine_lost generator 1: {lost}",
            "engine_joined generator 2",
            f"verifier_lost verifier 0: {lost}",
            "verifier_joined verifier 1",
            f"rank_lost learner rank 0: {lost}",
        ):
            os.kill(idle, signal.SIGSTOP)
            os.kill(pids[1], signal.SIGSTOP)
            fault.fired(f"processes {idle}, {pids[1]} are stopped; slowed for 45 s they were not lost")
            await until(lambda: any("lost" in event for event in events), 200.0)
            fault.saw("engine_lost and verifier_lost: no sign of life")
            await until(lambda: len(events) == 4, 200.0)
            fault.goes_on("engine_joined, verifier_joined; the rank, stopped next, is lost to its gang")
            os.kill(pids[2], signal.SIGSTOP)
            await until(lambda: len(events) == 5, 100.0)
        with pytest.raises(InfrastructureError, match="learner rank 0: frozen"):
            await m.learner.all(lambda r, h: h.prompt_logprobs.remote([1, 2, 3]), deadline=60.0)
        await until(lambda: all(map(ended, (idle, *pids))), 30.0)

    stack.wait(run(), 560.0)


def test_every_process_group_of_a_rank_has_our_timeout(stack: Stack) -> None:
    """Torch's own, of groups that DeepSpeed makes, is 30 minutes with gloo."""

    def timeouts(rank: Any) -> list[float]:
        import torch

        groups = torch.distributed.distributed_c10d._world.pg_map
        cpu = torch.device("cpu")
        return [group._get_backend(cpu).options._timeout.total_seconds() for group in groups]

    gang = stack.wait(stack.gang(2))
    found = [ask(handle, timeouts) for handle in gang.handles]
    assert min(map(len, found)) > 1, "DeepSpeed has made one of its own"
    assert {seconds for each in found for seconds in each} == {120.0}
