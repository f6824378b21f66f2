"""Threads of real actors: how they wait, and that their number changes while they work."""

import os
import sys
import time
from typing import Any

import ray

from entroray.engine.generator import Request
from entroray.types import Draw
from entroray.workers import cluster
from entroray.workers.cluster import Share
from entroray.workers.cores import BESIDE
from tests.ray.stack import Stack


def ask(stack: Stack, work: Any) -> Any:
    return stack.wait(cluster.settle(work, deadline=100.0, what="actor"))


def test_threads_of_every_actor_wait_asleep_from_its_beginning(stack: Stack) -> None:
    machine = stack.wait(stack.machine())
    handles = [*machine.engines.handles, *machine.learner.handles, *machine.verifiers.handles]
    for handle in handles:
        found = ask(stack, handle.__ray_call__.remote(lambda actor: os.environ.get("OMP_WAIT_POLICY")))
        assert found == cluster.CPU_ONLY["OMP_WAIT_POLICY"] == "passive"


def test_an_engine_steps_with_as_many_threads_as_it_is_told_and_its_samples_are_worth(stack: Stack) -> None:
    def threads_in_use(engine: Any) -> int:
        from concurrent.futures import Future

        import torch

        answer: Future[int] = Future()
        engine.inbox.put((lambda future: future.set_result(torch.get_num_threads()), answer))
        return answer.result(timeout=30.0)

    engine = stack.wait(stack.engine())
    many = Request("q", (1, 2, 3), tuple(range(1024)), Draw(1.0, 3), 60.0)
    few = Request("q", (1, 2, 3), (0,), Draw(1.0, 3), 60.0)
    try:
        ask(stack, engine.use_threads.remote(2))
        for request, number in ((many, 2), (few, 1), (many, 2)):
            ask(stack, engine.sample.remote(request))
            assert ask(stack, engine.__ray_call__.remote(threads_in_use)) == number
    finally:
        ask(stack, engine.use_threads.remote(1))


class Slow:
    """An actor at work that is told something meanwhile."""

    number = 0

    def work(self, seconds: float) -> int:
        end = time.monotonic() + seconds
        while self.number == 0 and time.monotonic() < end:
            time.sleep(0.01)
        return self.number

    def use_threads(self, number: int) -> None:
        self.number = number


def test_a_rank_hears_of_its_threads_while_another_method_runs(stack: Stack) -> None:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this file
    actor = cluster.spawn(Slow, Share(0.1, 0.0, 1, (BESIDE,)))
    try:
        working = actor.work.remote(30.0)
        actor.use_threads.options(concurrency_group=BESIDE).remote(3)
        assert ask(stack, working) == 3
    finally:
        cluster.kill_actors([actor])


def test_an_engine_on_a_cpu_normalises_by_one_kernel(stack: Stack) -> None:
    def priority(engine: Any) -> list[str]:
        from vllm import ir

        return [*ir.ops.rms_norm.get_priority(), *ir.ops.fused_add_rms_norm.get_priority()]

    engine = stack.wait(stack.engine())
    assert ask(stack, engine.__ray_call__.remote(priority)) == ["entroray", "native"] * 2


def test_an_engine_on_a_cpu_normalises_any_width(stack: Stack) -> None:
    """vLLM's kernel refuses a width of 50: what it refuses is left to torch."""

    def differences(engine: Any) -> list[float]:
        import torch
        from vllm import ir

        rows = {width: torch.linspace(-1, 2, 3 * width).view(3, width) for width in (48, 50, 12, 7)}
        pairs = [
            (ir.ops.rms_norm(x, torch.ones(width), 1e-6), torch.nn.functional.rms_norm(x, (width,), eps=1e-6))
            for width, x in rows.items()
        ]
        return [float((ours - exact).abs().max()) for ours, exact in pairs]

    engine = stack.wait(stack.engine())
    assert max(ask(stack, engine.__ray_call__.remote(differences))) < 1e-6
