"""Engines whose learner is lost while they are too."""

import asyncio
from typing import Any

import pytest

from entroray.errors import LearnerLostError
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
