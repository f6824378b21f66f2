"""How the driver looks at heartbeats, and what pools and gangs do with who is frozen."""

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from entroray.engine.vllm_request import Request
from entroray.errors import InfrastructureError
from entroray.train.pulse import Beat
from entroray.types import Draw
from entroray.workers import cluster, heartbeat
from entroray.workers.cluster import Gang
from entroray.workers.heartbeat import Watched, watch
from tests.unit.test_engines import Gang as Learner
from tests.unit.test_engines import Handle, make_pool, names

__all__ = ["make_pool"]


def looks(monkeypatch: pytest.MonkeyPatch, seconds: float, read: Callable[[int], dict[str, Beat]]) -> int:
    """Looks, `seconds` of the clock apart, until the one actor is found frozen; 0 if 100 do not find it."""
    counted, lost, clock = [0], list[int](), [0.0]

    def answer(keys: Any) -> dict[str, Beat]:
        counted[0] += 1
        clock[0] += seconds
        return read(counted[0])

    monkeypatch.setattr(heartbeat, "INTERVAL", 0.0)
    monkeypatch.setattr(heartbeat, "MOST", 4.0)
    monkeypatch.setattr(heartbeat, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(heartbeat, "_read", answer)
    handle: Any = SimpleNamespace(_actor_id=SimpleNamespace(hex=lambda: "a"))
    one = Watched(handle, lambda error: lost.append(counted[0]))

    async def look() -> None:
        task = asyncio.create_task(watch(lambda: [] if lost else [one]))
        while not lost and counted[0] < 100 and not task.done():
            await asyncio.sleep(0)
        task.cancel()

    asyncio.run(asyncio.wait_for(look(), 10.0))
    return (lost or [0])[0]


def test_time_in_which_the_driver_did_not_look_counts_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    silent = lambda n: {"a": Beat(1, 5)}
    assert looks(monkeypatch, 2.0, silent) == 11, "20 s after the first look"
    assert looks(monkeypatch, 500.0, silent) == 6, "five looks of 4 s each, not one of 500"


def test_nobody_is_frozen_because_the_store_of_beats_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(n: int) -> dict[str, Beat]:
        if n > 1:
            raise RuntimeError("the GCS is gone")
        return {"a": Beat(1, 5)}

    assert looks(monkeypatch, 2.0, fails) == 0


def test_a_store_of_beats_that_misses_three_looks_in_a_row_is_a_lost_head_and_ends_what_is_under_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked, ended = [0], list[str]()

    def read(keys: Any) -> dict[str, Beat]:
        looked[0] += 1
        if looked[0] in (1, 2, 4, 5, 6):
            raise RuntimeError("Timed out while waiting for GCS")
        return {}

    async def work() -> None:
        try:
            await asyncio.sleep(5.0)
        finally:
            ended.append("in order")

    async def run() -> None:
        await heartbeat.alongside(asyncio.create_task(watch(list)), work())

    monkeypatch.setattr(heartbeat, "INTERVAL", 0.0)
    monkeypatch.setattr(heartbeat, "_read", read)
    with pytest.raises(InfrastructureError, match=r"head is lost: Timed out .* run.resume=auto"):
        asyncio.run(run())
    assert looked == [6] and ended == ["in order"]


def test_a_look_that_fails_ends_what_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        def fails() -> list[Watched]:
            raise KeyError("a fault of ours")

        await asyncio.wait_for(
            heartbeat.alongside(asyncio.create_task(watch(fails)), asyncio.sleep(60.0)), 5.0
        )

    monkeypatch.setattr(heartbeat, "INTERVAL", 0.0)
    with pytest.raises(KeyError, match="a fault of ours"):
        asyncio.run(run())


def test_what_goes_on_while_heartbeats_are_looked_at_ends_as_it_does_alone() -> None:
    async def work(error: Exception | None) -> None:
        await asyncio.sleep(0)
        if error:
            raise error

    async def cancelled() -> None:
        turn = asyncio.create_task(heartbeat.alongside(asyncio.create_task(watch(list)), asyncio.sleep(5.0)))
        await asyncio.sleep(0.01)
        turn.cancel()
        await turn

    asyncio.run(heartbeat.alongside(None, work(None)))
    with pytest.raises(KeyError):
        asyncio.run(heartbeat.alongside(None, work(KeyError("x"))))
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(cancelled())


def test_an_idle_engine_that_is_frozen_is_dropped_and_its_replacement_watched_as_it_starts(
    make_pool: Any,
) -> None:
    pool = make_pool(Learner(), Handle("a"), Handle("b"), spares=[Handle("c")])

    async def run() -> list[str]:
        assert len(pool.watched()) == 2
        pool.watched()[0].lose(InfrastructureError("frozen"))
        watched = [each.handle.name for each in pool.watched()]
        while pool.replacing:
            await asyncio.wait(pool.replacing, timeout=5.0)
        assert [each.handle.name for each in pool.watched()] == ["b", "c"] and not pool.starting
        return watched

    assert asyncio.run(run()) == ["b", "c"] and names(pool) == "bc"


def test_an_update_of_weights_allows_engines_more_time(make_pool: Any) -> None:
    pool = make_pool(Learner(), Handle("a"))
    pool.sender.deadline = 1800.0

    async def run() -> None:
        assert pool.watched()[0].allowed == 0.0
        async with pool.updating:
            assert pool.watched()[0].allowed == 1800.0, "of the first the size is not known"
            pool.sender.size = int(30e9)
            assert pool.watched()[0].allowed == 360.0

    asyncio.run(run())


def test_an_actor_that_is_lost_is_named_with_its_memory_and_with_another_that_more_than_doubled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    beats = {1: (0, 0.1), 2: (0, 0.2), 3: (2, 0.6)}  # what it took before it worked is no growth
    beat = lambda n: {"a": Beat(n, beats[n][0], memory=beats[n][1])} if n in beats else {}
    monkeypatch.setattr(heartbeat, "MEMORY", {})
    looks(monkeypatch, 2.0, beat)
    assert heartbeat.MEMORY == {"": (0.2, 0.6)}
    heartbeat.MEMORY.clear()
    heartbeat.MEMORY.update({"generator 0": (0.5, 0.7), "verifier 1": (0.4, 0.7)})
    assert heartbeat.memory_of("generator 0, sampling") == " (generator 0 grew from 0.5 to 0.7 GB)"
    heartbeat.MEMORY["verifier 1"] = 0.4, 2.04
    more = " (generator 0 grew from 0.5 to 0.7 GB, verifier 1 grew from 0.4 to 2.0 GB)"
    assert heartbeat.memory_of("generator 0, sampling") == more
    assert heartbeat.memory_of("verifier 1") == " (verifier 1 grew from 0.4 to 2.0 GB)"
    heartbeat.MEMORY.clear()
    assert heartbeat.memory_of("generator 0, sampling") == ""


def test_who_asks_is_told_of_an_error_in_the_deadline_of_a_call(make_pool: Any) -> None:
    pool = make_pool(Learner(), Handle("a"))
    pool.sender.generator = None  # has no transfer
    asked = pool.sample(Request("q", (1,), (1,), Draw(1.0, 1), deadline=1.0))
    with pytest.raises(AttributeError):
        asyncio.run(asyncio.wait_for(asked, 5.0))


def test_a_gang_that_lost_a_frozen_rank_says_so_and_watches_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    killed, events = list[Any](), list[tuple[str, str]]()
    monkeypatch.setattr(cluster, "kill_actors", killed.extend)

    async def settle(ref: Any, **_: Any) -> Any:
        return await ref

    monkeypatch.setattr(cluster, "settle", settle)
    gang = Gang("learner", ["r0", "r1"])
    report = lambda kind, **fields: events.append((kind, fields["rank"]))
    gang.watched(report)[1].lose(InfrastructureError("frozen: no sign of life for 20 s"))
    assert killed == ["r1"] and events == [("rank_lost", "learner rank 1")]
    assert [each.handle for each in gang.watched(report)] == ["r0"]

    async def dead(rank: int, handle: Any) -> None:
        raise InfrastructureError("its process died")

    with pytest.raises(InfrastructureError, match="learner rank 1: frozen: no sign of life for 20 s"):
        asyncio.run(gang.all(dead, deadline=1.0))
