"""The shared engine: a queue longer than a request's deadline, and requests that it refuses."""

import asyncio
import time
from dataclasses import replace
from typing import Any

import pytest
from ray.exceptions import RayTaskError

from entroray.types import Draw, Rollout, Status
from entroray.workers import cluster
from tests.ray.stack import Stack
from tests.ray.test_special_tokens import ask, draws, engine, request

__all__ = ["engine"]  # a fixture

DEADLINE = 4.0
"""Of a sequence that takes a tenth of a second: a machine may stand still for three seconds."""
AT_ONCE = 256


def test_a_queue_longer_than_the_deadline_is_served_to_its_end(stack: Stack, engine: Any) -> None:
    """256 sequences run at once: the last begin long after a deadline that each keeps by far."""
    draw = Draw(1.0, 8, min_tokens=8)
    draws(stack, engine, draw, *range(AT_ONCE))
    began = time.monotonic()
    draws(stack, engine, draw, *range(AT_ONCE))
    waves = 3 * DEADLINE / (time.monotonic() - began)

    async def group(number: int) -> list[Rollout]:
        asked = request(draw, *range(64), prompt_id=f"{number}", deadline=DEADLINE)
        return await cluster.settle(engine.sample.remote(asked), deadline=100.0, what="engine")

    async def queue() -> list[list[Rollout]]:
        return await asyncio.gather(*map(group, range(round(waves * AT_ONCE / 64))))

    began = time.monotonic()
    rollouts = [r for members in stack.wait(queue()) for r in members]
    assert time.monotonic() - began > DEADLINE, "all within one deadline: this shows nothing"
    assert {r.status for r in rollouts} == {Status.TRUNCATED} and {r.length for r in rollouts} == {8}


def test_a_request_that_vllm_refuses_leaves_nothing_behind(stack: Stack, engine: Any) -> None:
    fine = request(Draw(1.0, 8), 0, 1, deadline=0.5)
    for refused in (
        replace(fine, token_ids=(1,) * 5000),
        replace(fine, token_ids=()),
        replace(fine, after=(1,) * 8),
        replace(fine, draw=replace(fine.draw, top_tokens=500)),
        replace(fine, draw=replace(fine.draw, stop=("",))),
    ):
        with pytest.raises(RayTaskError):
            ask(stack, engine.sample.remote(refused))
        stream = engine.sample_all.options(num_returns="streaming").remote([fine, refused, fine])
        with pytest.raises(RayTaskError):
            stack.wait(cluster.settle_next(stream, deadline=60.0, what="engine"))
        assert ask(stack, engine.__ray_call__.remote(lambda e: len(e.waiting) + len(e.owner))) == 0
    time.sleep(0.8)  # beyond the deadline of what was refused
    assert all(r.status.usable for r in ask(stack, engine.sample.remote(replace(fine, deadline=60.0))))
