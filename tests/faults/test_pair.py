"""F01, F03, F29, F31 and F32: a pair of engines and a learner, and what is done to them one after another."""

import asyncio
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import psutil
import pytest
import ray

from entroray import rows
from entroray.engine.vllm_request import Request
from entroray.errors import InfrastructureError, SyncError
from entroray.objective import build_objective
from entroray.policy.tokenizer import load_tokenizer
from entroray.types import Draw, Rollout, Status
from entroray.wiring import actors, compose, dataset
from entroray.wiring.parts import build_parts
from entroray.workers import cluster
from tests.faults.record import Fault
from tests.faults.test_frozen import killer_of_the_thread
from tests.faults.test_lost_actors import pid
from tests.ray import test_sync
from tests.ray.stack import SHARES
from tests.ray.test_sync import LONG, Saboteur, learner_logprobs, train_a_little

pytestmark = pytest.mark.faults
SETTINGS = [
    *("data.max_prompt=384", "rollout.max_tokens=64", "learner.lr=0.01", "reward.deadline=30"),
    *("generator.replicas=2", "generator.restarts=8", "generator.threads=1", "learner.threads=1", *SHARES),
]


@dataclass
class Pair:
    """Two engines that serve, and what is done with them."""

    loop: asyncio.AbstractEventLoop
    actors: Any
    events: list[str]
    version: int = 0

    def wait(self, work: Any, seconds: float = 200.0) -> Any:
        return self.loop.run_until_complete(asyncio.wait_for(work, seconds))

    def ask(self, ref: Any) -> Any:
        return self.wait(cluster.settle(ref, deadline=60.0, what="an actor"))

    @property
    def pids(self) -> list[int]:
        return [pid(handle) for handle in self.actors.engines.handles]

    async def samples(self, count: int, **changes: Any) -> list[Rollout]:
        """Of `count` prompts, four each, by whichever engine."""
        request = Request("", LONG, (1, 2, 3, 4), Draw(1.0, 48), deadline=120.0)
        asked = [replace(request, prompt_id=f"p{time.time()}{i}", **changes) for i in range(count)]
        found = await asyncio.gather(*map(self.actors.engines.sample, asked))
        return [rollout for rollouts in found for rollout in rollouts]

    async def healed(self) -> None:
        """Return once two engines serve again."""
        while self.actors.engines.replacing:
            await asyncio.wait(self.actors.engines.replacing, timeout=120.0)
        assert len(self.actors.engines.handles) == 2

    def sync(self) -> None:
        self.version += 1
        self.wait(self.actors.sync(self.version))

    def agrees(self) -> float:
        return float(self.wait(self.actors.sync.compare()))

    def sabotage(self, how: str) -> None:
        self.ask(self.actors.learner.handles[0].sabotage.remote(how))


@pytest.fixture(scope="module")
def pair(local_ray: None, model: str) -> Iterator[Pair]:
    ray.cloudpickle.register_pickle_by_value(test_sync)  # workers cannot import that file
    config = compose.load_config(SETTINGS)[0]
    loop, events = asyncio.new_event_loop(), list[str]()
    parts = replace(build_parts(config), objective=build_objective(rows.objective_row("supervised")))
    probe = tuple(load_tokenizer(model).encode("a fixed probe text, 123"))
    report = lambda kind, **fields: events.append(kind)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(actors, "LearnerRank", Saboteur)
        made = actors.start_actors(
            config, model, parts, dataset.judge_spec(config), probe, total_updates=100, report=report
        )
        shared = Pair(loop, loop.run_until_complete(made), events)
    yield shared
    loop.run_until_complete(shared.actors.end())
    loop.close()


def gone(number: int) -> bool:
    return not psutil.pid_exists(number) or psutil.Process(number).status() == psutil.STATUS_ZOMBIE


async def lost(fault: Fault, pair: Pair, asked: asyncio.Future[list[Rollout]]) -> list[Rollout]:
    """What was asked for, once the loss of an engine is told."""
    while not pair.events:
        await asyncio.sleep(0.02)
    fault.saw("engine_lost")
    return await asked


def drawn_by_the_other(fault: Fault, pair: Pair, victim: int, drawn: list[Rollout]) -> None:
    """All samples are there, the victim is gone, and another with the learner's weights is in its place."""
    assert len(drawn) == 128 and all(r.status.usable for r in drawn) and gone(victim)
    pair.wait(pair.healed())
    assert pair.events == ["engine_lost", "engine_joined"] and pair.agrees() < 1e-4
    fault.goes_on("engine_joined, with the learner's weights; all 128 samples drawn by the other")


@pytest.mark.fault("F01", "SIGKILL to one of two engines that are {state}")
@pytest.mark.parametrize("state", ["serving", "idle"])
def test_the_samples_of_a_dead_engine_come_from_the_other(fault: Fault, pair: Pair, state: str) -> None:
    pair.events.clear()
    victim = pair.pids[0]

    async def served() -> list[Rollout]:
        if state == "idle":
            os.kill(victim, signal.SIGKILL)
            fault.fired(f"process {victim} got it, nothing was asked of it")
        asked = asyncio.ensure_future(pair.samples(32))
        await asyncio.sleep(0.1)
        if state == "serving":
            assert all(engine.in_flight for engine in pair.actors.engines.live)
            os.kill(victim, signal.SIGKILL)
            fault.fired(f"process {victim} got it with samples in flight")
        return await lost(fault, pair, asked)

    drawn_by_the_other(fault, pair, victim, pair.wait(served()))


@pytest.mark.fault("F03", "the thread of one of two engines that serve ends; its actor lives on")
def test_the_samples_of_an_engine_whose_thread_died_come_from_the_other(fault: Fault, pair: Pair) -> None:
    pair.events.clear()
    victim = pair.pids[0]

    async def served() -> list[Rollout]:
        asked = asyncio.ensure_future(pair.samples(32))
        await asyncio.sleep(0.1)
        assert all(engine.in_flight for engine in pair.actors.engines.live) and not gone(victim)
        pair.actors.engines.handles[0].__ray_call__.remote(killer_of_the_thread())
        fault.fired(f"the thread of process {victim} was told to end, with samples in flight")
        return await lost(fault, pair, asked)

    drawn_by_the_other(fault, pair, victim, pair.wait(served()))


@contextmanager
def slowed(number: int, told: list[int]) -> Iterator[None]:
    """A process that gets one tenth of its time; `told` counts its stops."""
    over = threading.Event()

    def toggle() -> None:
        while not over.is_set():
            os.kill(number, signal.SIGSTOP)
            told[0] += 1
            over.wait(0.18)
            os.kill(number, signal.SIGCONT)
            time.sleep(0.02)

    thread = threading.Thread(target=toggle)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(timeout=10)


@pytest.mark.fault("F29", "one of two engines runs at a tenth of its speed (stopped and continued)")
def test_an_engine_ten_times_slower_is_waited_for(fault: Fault, pair: Pair) -> None:
    pair.events.clear()
    before, stops = pair.pids, [0]
    fault.inject()
    with slowed(before[1], stops):
        drawn = pair.wait(pair.samples(16))
    fault.fired(f"process {before[1]} was stopped {stops[0]} times")
    assert stops[0] > 2 and len(drawn) == 64 and all(r.status.usable for r in drawn)
    assert not pair.events and pair.pids == before
    fault.saw("it is waited for: no engine is lost")
    fault.goes_on("all 64 samples, by the same two processes")


@pytest.mark.fault("F29", "samples that have had their deadline")
def test_a_generation_without_end_is_a_timeout(fault: Fault, pair: Pair) -> None:
    late = pair.wait(pair.samples(1, deadline=0.0))
    fault.fired("a deadline of 0 s")
    assert {r.status for r in late} == {Status.TIMEOUT}
    fault.saw("timeout, never scored")
    assert all(r.status.usable for r in pair.wait(pair.samples(1)))
    fault.goes_on("the next samples are whole", lost="its samples, asked again by the driver")


@pytest.mark.fault("F31", "the receiver dies: an engine is stopped, then killed in the middle of a sync")
def test_a_sync_that_loses_an_engine_is_made_again_without_it(fault: Fault, pair: Pair) -> None:
    pair.events.clear()
    train_a_little(pair.loop, pair.actors, seed=4)
    victim = pair.pids[1]
    pair.version += 1

    async def synced() -> None:
        os.kill(victim, signal.SIGSTOP)
        syncing = asyncio.ensure_future(pair.actors.sync(pair.version))
        await asyncio.sleep(1.0)
        assert not syncing.done()
        os.kill(victim, signal.SIGKILL)
        fault.fired(f"process {victim} died while the sync waited for it")
        await syncing

    pair.wait(synced())
    assert pair.events[0] == "engine_lost"
    fault.saw("engine_lost; the other serves the new version")
    drawn = pair.wait(pair.samples(2))
    assert {int(v) for r in drawn for v in r.versions} == {pair.version}
    pair.wait(pair.healed())
    assert pair.agrees() < 1e-4
    fault.goes_on("both engines have the new weights, no sample is of a mixture")


@pytest.mark.fault("F31", "the sender stops after the weights are loaded, before they are committed")
def test_a_sync_that_its_sender_leaves_is_made_again_whole(fault: Fault, pair: Pair) -> None:
    train_a_little(pair.loop, pair.actors, seed=5)
    pair.sabotage("cut")
    with pytest.raises(InfrastructureError, match="cut short"):
        pair.wait(pair.actors.sync(pair.version + 1))
    fault.fired("the learner raised between loading and committing")
    fault.saw("InfrastructureError, engines wait")
    pair.sync()
    assert pair.agrees() < 1e-4
    after = pair.wait(pair.samples(2))
    assert {int(v) for r in after for v in r.versions} == {pair.version}
    fault.goes_on("the sync made again is whole")


@pytest.mark.fault("F32", "a prompt of 300 tokens is in the prefix cache when the weights change")
def test_no_cached_prefix_outlives_its_weights(fault: Fault, pair: Pair) -> None:
    pair.wait(pair.samples(2))
    train_a_little(pair.loop, pair.actors, seed=6)
    apart = lambda r: np.abs(r.logprobs - learner_logprobs(pair.loop, pair.actors, r.token_ids)).max()
    stale = max(apart(r) for r in pair.wait(pair.samples(2))[::4])
    assert stale > 0.05
    fault.fired(f"before the sync engines are {stale:.2f} nats from the learner")
    pair.sync()
    fresh = max(apart(r) for r in pair.wait(pair.samples(2))[::4])
    assert fresh < 1e-3
    fault.saw("caches are emptied in every sync")
    fault.goes_on(f"{fresh:.0e} nats apart")


@pytest.mark.fault("F32", "a sync sends {what}")
@pytest.mark.parametrize(
    ("how", "what", "says"),
    [
        ("layer", "all but one matrix", r"layers\.1\.mlp\.up_proj"),
        ("skip", "nothing", r"0 of 2 generators took version"),
    ],
)
def test_a_sync_that_lies_is_refused(fault: Fault, pair: Pair, how: str, what: str, says: str) -> None:
    """The last of this file: the learner goes on lying."""
    pair.sabotage(how)
    fault.fired("the learner was told so")
    with pytest.raises(SyncError, match=says) as refused:
        pair.wait(pair.actors.sync(pair.version + 1))
    assert refused.value.exit_code == 4
    fault.saw(f"SyncError: {says.replace(chr(92), '')}")
    fault.goes_on("ends with 4 at once", lost="what follows the last checkpoint")
