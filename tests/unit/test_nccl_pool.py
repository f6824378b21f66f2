# ruff: noqa: F811 : a fixture of another module is a parameter here
"""What a pool does about engines that die, hang or are silent while weights travel by NCCL."""

import asyncio
from typing import Any

import pytest
from ray.exceptions import RayTaskError

from entroray.errors import InfrastructureError
from entroray.workers import engine_pool
from tests.unit.test_engines import (
    DEAD,
    Gang,
    Handle,
    Sampling,
    make_pool,  # noqa: F401 : a fixture
    names,
    replaced,
    wanted,
)

FAILURES = pytest.mark.parametrize("failure", [DEAD, RayTaskError("sync", "NCCL", ValueError())])


@FAILURES
def test_what_fails_within_nccl_is_tried_again_without_the_dead_who_are_replaced(
    make_pool: Any, failure: Exception
) -> None:
    dying = Handle("b")

    def fails(n: int, names: list[str]) -> Exception | None:
        if "b" not in names:
            return None
        dying.failures["check_alive"] = DEAD  # it answered before the transfer began
        return failure

    gang = Gang(fails)
    pool = make_pool(gang, Handle("a"), dying, spares=[Handle("c")], transfer="nccl")

    async def run() -> None:
        await pool.update_weights(1)
        await replaced(pool)

    asyncio.run(run())
    assert gang.sent[0] == (1, "ab") and not any("b" in to for _, to in gang.sent[1:])
    assert any(version == 1 for version, _ in gang.sent[1:]) and names(pool) == "ac" and pool.restarts == 0


@FAILURES
def test_what_fails_within_nccl_though_all_engines_answer_ends_the_run(
    make_pool: Any, failure: Exception
) -> None:
    gang = Gang(lambda n, names: failure)
    pool = make_pool(gang, Handle("a"), spares=[Handle("c")], transfer="nccl")
    with pytest.raises(InfrastructureError, match=r"(?s)transfer=nccl.*run\.resume=auto"):
        asyncio.run(pool.update_weights(1))
    assert gang.sent == [(1, "a")]


def test_after_a_failure_engines_and_learner_meet_anew(make_pool: Any) -> None:
    gang = Gang(lambda n, names: DEAD if n == 1 else None)
    pool, met = make_pool(gang, Handle("a"), transfer="nccl"), list[Any]()
    for _ in range(3):
        try:
            asyncio.run(pool.sender.send(pool.handles, 1))
        except InfrastructureError:
            assert pool.sender.connected == []
        met.append(gang.client)
    assert met[0] is not met[1] and met[1] is met[2]


def test_silence_in_which_weights_may_still_travel_is_no_sign_of_death(
    make_pool: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine's thread stands in NCCL for as long as its weights may take: 300 GB have 51 minutes."""
    limits: list[float] = []

    async def settle_next(stream: Any, *, deadline: float, what: str) -> Any:
        limits.append(deadline)
        return await anext(stream)

    monkeypatch.setattr(engine_pool, "settle_next", settle_next)
    for transfer in ("plasma", "nccl", "nccl"):
        pool = make_pool(Gang(), Sampling("a"), transfer=transfer)
        pool.sender.size = 300 * 10**9 if limits[1:] else 0
        asyncio.run(asyncio.wait_for(pool.sample(wanted("q")), 5.0))
    assert limits == [31.0, 151.0, 3091.0]


def test_an_engine_that_does_not_answer_is_not_waited_for_as_long_as_a_start(
    make_pool: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[float] = []

    async def settle(ref: Any, *, deadline: float, what: str) -> Any:
        limits.append(deadline)
        return await ref

    monkeypatch.setattr(engine_pool, "settle", settle)
    pool = make_pool(Gang(), Handle("a"), transfer="nccl")
    pool.sender.deadline = 1800.0
    asyncio.run(pool.update_weights(1))
    assert limits == [150.0]
