"""Engines whose learner is lost while they are too."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from entroray.errors import InfrastructureError, LearnerLostError
from tests.unit.test_engines import DEAD, Gang, Handle, make_pool, names, wanted

__all__ = ["make_pool"]


def test_requests_that_wait_for_an_engine_do_not_hold_up_the_next_attempt(make_pool: Any) -> None:
    """The only engine died, and its learner too: another serves once the new learner sends weights."""

    async def run() -> None:
        pool = make_pool(Gang(), Handle("a"), spares=[Handle("b")])
        pool.first_awaited = True
        pool.drop(pool.live[0], DEAD)
        asked = asyncio.ensure_future(pool.sample(wanted("p")))
        await asyncio.sleep(0.01)
        asked.cancel()
        await asyncio.wait_for(pool.begin_anew(5.0), 1.0)
        await pool.update_weights(0)
        assert names(pool) == "b"
        await pool.close()

    asyncio.run(run())


def test_a_replacement_that_finds_the_learner_lost_tells_whoever_waits_for_it(make_pool: Any) -> None:
    async def run() -> None:
        lost = LearnerLostError("learner rank 0: its process died")
        pool = make_pool(Gang(lambda n, names: lost if n == 1 else None), Handle("a"), spares=[Handle("b")])
        pool.drop(pool.live[0], DEAD)
        with pytest.raises(LearnerLostError, match="rank 0"):
            await asyncio.wait_for(pool.sample(wanted("p")), 1.0)
        await pool.begin_anew(1.0)
        await pool.update_weights(0)
        assert names(pool) == "b" and pool.learner_lost is None
        await pool.close()

    asyncio.run(run())


class Busy(Handle):
    """An engine that is at work on what it was asked until that is given up."""

    def __init__(self, name: str):
        super().__init__(name)
        self.given_up, self.ended = asyncio.Event(), list[str]()

    @property
    def sample_all(self) -> Any:
        async def stream(requests: list[Any]) -> Any:
            await self.given_up.wait()
            self.ended += [r.prompt_id for r in requests]
            yield {index: [] for index in range(len(requests))}

        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=stream))

    @property
    def abort(self) -> Any:
        async def abort() -> None:
            self.given_up.set()

        return SimpleNamespace(remote=abort)


@pytest.mark.parametrize("transfer", ["plasma", "nccl"])
def test_samples_of_the_attempt_before_are_given_up_and_not_waited_for(make_pool: Any, transfer: str) -> None:
    """A rank died as it packed: no engine is paused, and nobody takes what they draw."""
    lost = LearnerLostError("learner rank 0: its process died")

    async def run() -> None:
        pool = make_pool(
            Gang(lambda n, names: lost if n == 1 else None), busy := Busy("a"), transfer=transfer
        )
        asked = asyncio.ensure_future(pool.sample(wanted("p")))
        await asyncio.sleep(0.01)
        with pytest.raises(LearnerLostError):
            await pool.update_weights(1)
        await asyncio.wait([asked], timeout=1.0)
        await asyncio.wait_for(pool.begin_anew(600.0), 2.0)
        assert busy.ended == ["p"] and not pool.tasks and pool.live[0].in_flight == 0
        await pool.close()

    asyncio.run(run())


def test_samples_that_engines_do_not_give_up_end_the_run_after_a_deadline(make_pool: Any) -> None:
    class Deaf(Busy):
        abort = Handle("deaf").abort

    async def run() -> None:
        pool = make_pool(Gang(), Deaf("a"))
        asked = asyncio.ensure_future(pool.sample(wanted("p")))
        await asyncio.sleep(0.01)
        with pytest.raises(InfrastructureError, match="still under way"):
            await pool.drain(0.0)
        asked.cancel()
        await pool.close()

    asyncio.run(run())


def test_a_replacement_that_finds_the_learner_lost_leaves_nobody_waiting_for_the_engines_it_paused(
    make_pool: Any,
) -> None:
    lost = LearnerLostError("learner rank 0: its process died")

    async def run() -> None:
        fails = Gang(lambda n, names: lost if n == 1 else None)
        pool = make_pool(fails, Busy("a"), Handle("b"), spares=[Handle("c")], transfer="ipc")
        asked = asyncio.ensure_future(pool.sample(wanted("p")))
        await asyncio.sleep(0.01)
        pool.drop(pool.live[1], DEAD)
        with pytest.raises(LearnerLostError, match="rank 0"):
            await asyncio.wait_for(asked, 1.0)
        with pytest.raises(LearnerLostError, match="rank 0"):
            await asyncio.wait_for(pool.sample(wanted("q")), 1.0)
        await pool.begin_anew(1.0)
        await pool.update_weights(0)
        assert names(pool) == "ac" and pool.learner_lost is None
        await pool.close()

    asyncio.run(run())


def test_what_is_sent_as_the_learner_is_replaced_fails_with_the_one_before(make_pool: Any) -> None:
    """Its loss is not that of the next one, and the engine that waited for weights serves under that."""

    async def run() -> None:
        gang, sending, killed = Gang(), asyncio.Event(), asyncio.Event()
        pool = make_pool(gang, Handle("a"), spares=[Handle("b")])
        send = pool.sender.send

        async def slow(handles: Any, version: Any) -> bool:
            sending.set()
            await killed.wait()
            raise LearnerLostError("learner rank 0: its process died")

        pool.sender.send = slow
        pool.drop(pool.live[0], DEAD)
        await asyncio.wait_for(sending.wait(), 1.0)
        anew = asyncio.ensure_future(pool.begin_anew(1.0))
        await asyncio.sleep(0.01)
        killed.set()
        await asyncio.wait_for(anew, 1.0)
        pool.sender.send = send
        await asyncio.sleep(0.01)
        assert pool.learner_lost is None
        await pool.update_weights(0)
        assert names(pool) == "b"
        await pool.close()

    asyncio.run(run())
