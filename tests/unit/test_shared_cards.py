"""Engines and ranks that share cards by turns, as far as stand-ins of both show it."""

import asyncio
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from entroray.errors import InfrastructureError
from entroray.types import Batch
from entroray.workers import cluster, engine_pool
from entroray.workers.cluster import Gang
from entroray.workers.engine_pool import Engine, EnginePool
from entroray.workers.in_step import InStep
from entroray.workers.roles import LearnerRole, rest
from entroray.workers.weight_sender import GeneratorClient
from tests.unit.test_shares import step


async def settle(ref: Any, **_: Any) -> Any:
    return await ref


def called(log: list[str], what: str, answer: Any = None) -> Any:
    """A method of an actor that writes down that it was called."""

    async def call(*_: Any) -> Any:
        log.append(what)
        return answer

    return SimpleNamespace(remote=call)


async def turns(call: str, *, late: bool = False, dead: bool = False) -> list[str]:
    """What two engines and two ranks do at a call of the learner; `late`: a third engine is starting, `dead`:
    it starts as the first does not go to sleep."""
    log: list[str] = []
    engine = lambda name: SimpleNamespace(sleep=called(log, f"{name} sleeps"))
    rank = SimpleNamespace(score=called(log, "score", [{}]), update=called(log, "update", defaultdict(float)))
    limits: dict[str, Any] = {"restarts": 0, "start_deadline": 1.0, "report": lambda *_, **__: None}
    pool = EnginePool([engine("a"), engine("b")], list, SimpleNamespace(), **limits)  # type: ignore[arg-type]

    async def start() -> None:
        await asyncio.sleep(0.01)
        log.append("c started")
        pool.newcomers.append(Engine("c", engine("c")))

    async def die() -> None:
        pool.live.pop(0)
        pool.replacing.add(task := asyncio.create_task(start()))
        task.add_done_callback(pool.replacing.discard)

    if dead:
        pool.live[0].handle.sleep.remote = die
    if late:
        pool.replacing.add(task := asyncio.create_task(start()))
        task.add_done_callback(pool.replacing.discard)
    learner = LearnerRole(Gang("learner", [rank, rank]), 64, 1.0, pool)
    ids, lengths = np.arange(4, dtype=np.int32), np.array([2, 2], dtype=np.int32)
    batch = Batch(ids, lengths, ids, lengths, np.ones(2, np.float32))
    if call == "score":
        await learner.score(batch, np.array([0, 1]))
    else:
        await learner.update(batch, step(2, 2), SimpleNamespace())  # type: ignore[arg-type]
    return log


@pytest.fixture(autouse=True)
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (cluster, engine_pool):
        monkeypatch.setattr(module, "settle", settle)


@pytest.mark.parametrize("call", ["score", "update"])
def test_every_engine_leaves_its_card_before_any_rank_works(call: str) -> None:
    """A warm start only updates, and nothing has put the engines to sleep before."""
    log = asyncio.run(turns(call))
    assert sorted(log[:2]) == ["a sleeps", "b sleeps"] and log[2:] == [call, call]


def test_ranks_wait_for_an_engine_that_starts_on_a_card_of_theirs() -> None:
    log = asyncio.run(turns("score", late=True))
    assert log[0] == "c started" and sorted(log[1:4]) == ["a sleeps", "b sleeps", "c sleeps"]
    assert log[4:] == ["score", "score"]


def test_ranks_wait_for_an_engine_that_starts_in_place_of_one_that_was_found_dead_as_it_was_to_sleep() -> (
    None
):
    log = asyncio.run(turns("score", dead=True))
    assert log[:5] == ["b sleeps", "c started", *log[2:4], "score"], log
    assert sorted(log[2:4]) == ["b sleeps", "c sleeps"]


def test_an_engine_that_never_comes_is_not_waited_for_for_ever() -> None:
    async def run() -> None:
        pool = EnginePool([], list, SimpleNamespace(), restarts=0, start_deadline=1.0, report=list)  # type: ignore[arg-type]
        pool.replacing.add(asyncio.create_task(asyncio.sleep(60.0)))
        await rest(pool, 0.02)

    with pytest.raises(InfrastructureError, match=r"driver\.call_deadline"):
        asyncio.run(run())


class Client(GeneratorClient):
    """Calls of rank 0 of which that with the second buffer fails."""

    def __init__(self) -> None:
        super().__init__([], 1, 1.0, False)
        self.calls: list[str] = []

    def start_weight_update(self) -> None:
        self.calls.append("start")

    def update_weights(self, update_info: Any) -> None:
        self.calls.append(update_info)
        if update_info == "second":
            raise InfrastructureError("generator 1: its process died")

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.calls.append("finish")


def send(client: Any, met: list[str]) -> None:
    """As vLLM's IPC engine sends on rank 0: all ranks meet before each buffer, after it, and at the end."""
    client.start_weight_update()
    for buffer in ("first", "second", "third"):
        met.append(f"before {buffer}")
        client.update_weights(buffer)
        met.append(f"after {buffer}")
    client.finish_weight_update()
    met.append("end")


@pytest.mark.parametrize(("in_step", "meetings"), [(False, 3), (True, 7)])
def test_rank_0_meets_the_others_at_every_buffer_although_an_engine_died(
    in_step: bool, meetings: int
) -> None:
    client, met = Client(), list[str]()
    caller: Any = InStep(client) if in_step else client
    with pytest.raises(InfrastructureError, match="generator 1"):
        caller.deliver(3, lambda: send(caller, met))
    assert len(met) == meetings
    assert client.calls == ["start", "first", "second"], "nobody is called after a failure"


def test_a_failure_is_of_one_transfer() -> None:
    caller = InStep(Client(), InfrastructureError("of the last one"))
    assert caller.deliver(4, lambda: None).version == 4 and caller.handles == []
