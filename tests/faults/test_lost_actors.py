"""What dies is replaced or ends the run with its code, and nothing of ours stays behind."""

import asyncio
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from entroray.engine.vllm_request import Request
from entroray.errors import InfrastructureError
from entroray.types import Draw, Prompt, Rollout
from entroray.workers import cluster
from entroray.workers.cluster import Share
from entroray.workers.engine_pool import EnginePool
from entroray.workers.roles import VerifierRole
from entroray.workers.verifier import Verifier
from entroray.workers.verifier_pool import VerifierPool
from tests.faults.record import Fault
from tests.ray.processes import (
    descendants,
    engines,
    kinds,
    left_over,
    printed_at_end,
    start,
    step_reached,
    steps,
    until,
)
from tests.ray.stack import Stack

BASE = [
    *("train", "experiment=quickstart", "objective=grpo", "rollout.groups_per_step=4"),
    "learner.lr_high=true",
    *("observe.report=false", "evaluate.final=false", "++data.settings.size=2000", "data.max_prompt=128"),
    "learner.ranks=1",
]


@pytest.mark.faults
@pytest.mark.fault("F01", "SIGKILL to an engine of a run with {replicas}")
@pytest.mark.parametrize("replicas", [1, 2])
def test_an_engine_that_dies_is_replaced_and_its_prompts_asked_again(
    fault: Fault, tmp_path: Path, model: str, replicas: int
) -> None:
    folder = tmp_path / "run"
    settings = [*BASE, f"generator.replicas={replicas}", "run.steps=12", f"run.dir={folder}"]
    process = start(*settings, f"model.path={model}")
    until(process, step_reached(folder, 2))
    victim = engines(process)[0]
    victim.kill()
    fault.fired(f"process {victim.pid} of the run, after step {steps(folder)[-1]}")
    until(process, lambda: "engine_lost" in kinds(folder))
    fault.saw("engine_lost")
    until(process, step_reached(folder, steps(folder)[-1] + 1))
    fault.goes_on("the next step")
    printed_at_end(process, 0)
    assert steps(folder) == list(range(1, 13))
    assert "engine_lost" in kinds(folder)
    assert replicas > 1 or "engine_joined" in kinds(folder)


@pytest.mark.fault("F02", "SIGKILL to the only engine left, generator.restarts=0")
def test_one_engine_dying_costs_no_step_and_the_last_ends_the_run_with_4_and_leaves_nothing(
    fault: Fault, tmp_path: Path, model: str
) -> None:
    folder, shared = tmp_path / "run", set(os.listdir("/dev/shm"))
    settings = [*BASE, "generator.replicas=2", "generator.restarts=0", "run.steps=1000", f"run.dir={folder}"]
    process = start(*settings, f"model.path={model}")
    until(process, step_reached(folder, 2))
    ours = descendants(process)
    engines(process)[0].kill()
    until(process, lambda: "engine_lost" in kinds(folder))
    until(process, step_reached(folder, steps(folder)[-1] + 3))
    (last,), began = engines(process), time.monotonic()
    last.kill()
    fault.fired(f"process {last.pid}, after the other was killed and survived")
    printed = printed_at_end(process, 4, 120)
    fault.saw("ends with 4, naming generator.restarts")
    assert time.monotonic() - began < 120
    assert "no generator is left" in printed and "generator.restarts" in printed
    assert steps(folder) == list(range(1, len(steps(folder)) + 1)) and kinds(folder).count("engine_lost") == 2
    assert left_over(ours, shared) == []
    fault.goes_on("no process and no shared memory is left", lost="what follows the last checkpoint")


LITTLE = Share(cpus=0.05, gpus=0.0, threads=1)


def pid(handle: Any) -> int:
    """Of an actor's process."""
    asked = handle.__ray_call__.remote(lambda actor: os.getpid())
    (found,) = cluster.wait([asked], deadline=60.0, what="its process")
    return found


SLOW = """
import time

def judge(response, prompt):
    time.sleep(0.3)
    return float(response == "right")
"""


@pytest.mark.fault("F07", "SIGKILL to one of two verifiers that judge")
def test_verdicts_of_a_verifier_that_is_killed_come_from_another_and_it_is_replaced(
    fault: Fault, stack: Stack, tmp_path: Path
) -> None:
    judge = tmp_path / "judge.py"
    judge.write_text(SLOW)
    spec, events = {"judges": {"": {"fn": "custom", "path": f"{judge}:judge"}}}, list[str]()
    spawn = lambda: cluster.spawn(Verifier, LITTLE, spec, slots=2, deadline=10.0)
    report = lambda kind, **fields: events.append(f"{kind} {fields['verifier']}")
    pool = VerifierPool(2, spawn, start_deadline=60.0, report=report)
    role, prompt = VerifierRole(pool, 60.0), Prompt("q", "?", (1,), "right")
    ids = np.zeros(1, np.int32)
    answers = [
        Rollout("q", ids, ids.astype(np.float32), ids, text, 1.0, 8) for text in ("right", "wrong") * 2
    ]

    async def judged() -> list[list[bool]]:
        await pool.start()
        calls = [asyncio.ensure_future(role.judge(prompt, answers)) for _ in range(4)]
        await asyncio.sleep(0.2)
        os.kill(victim, signal.SIGKILL)
        fault.fired(f"process {victim} had verdicts to give")
        found = [[v.correct for v in verdicts] for verdicts in await asyncio.gather(*calls)]
        fault.saw("verifier_lost; its verdicts come from the other")
        await asyncio.gather(*pool.joining)
        fault.goes_on("verifier_joined")
        return found

    victim = pid(pool.handles[0])
    try:
        assert stack.wait(judged(), 120.0) == [[True, False, True, False]] * 4
        assert events == ["verifier_lost verifier 0", "verifier_joined verifier 2"]
        assert not psutil.pid_exists(victim) or psutil.Process(victim).status() == psutil.STATUS_ZOMBIE
    finally:
        cluster.kill_actors(pool.handles)


@pytest.mark.fault("F01", "an engine and the one that replaces it die as they start")
def test_an_engine_that_dies_as_it_starts_is_left_out_and_the_others_serve(
    fault: Fault, stack: Stack
) -> None:
    m, events = stack.wait(stack.machine()), list[str]()

    class Stillborn:
        async def start(self) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

    stillborn = lambda: cluster.spawn(Stillborn, LITTLE)
    report = lambda kind, **fields: events.append(f"{kind} {fields['engine']}")

    def pool(*handles: Any) -> EnginePool:
        sender = m.engines.sender
        return EnginePool(handles, stillborn, sender, restarts=1, start_deadline=60.0, report=report)

    async def served() -> int:
        engines = pool(m.engines.handles[0], stillborn())
        await engines.start()
        drawn = await engines.sample(Request("q", (1, 2, 3), (5,), Draw(1.0, 4), deadline=60.0))
        while engines.replacing:
            await asyncio.wait(engines.replacing, timeout=60.0)
        assert len(engines.handles) == 1
        return len(drawn)

    assert stack.wait(served()) == 1
    assert events == ["engine_lost generator 1", "engine_lost generator 2"], "its replacement died too"
    fault.fired("both sent themselves SIGKILL in `start`")
    fault.saw("engine_lost, twice")
    fault.goes_on("the other serves; where none starts the run is refused")
    with pytest.raises(InfrastructureError, match="generator 0, starting: its process died"):
        stack.wait(pool(stillborn(), stillborn()).start())
    assert len(events) == 2, "where none comes, none is tried again"


@pytest.mark.faults
@pytest.mark.fault("F36", "SIGKILL to Ray's head (its GCS) under a run")
def test_a_run_without_its_head_ends_soon_and_can_be_gone_on_with(
    fault: Fault, tmp_path: Path, model: str
) -> None:
    folder, shared = tmp_path / "run", set(os.listdir("/dev/shm"))
    settings = [*BASE, "generator.replicas=1", "run.steps=1000", f"run.dir={folder}", "checkpoint.every=1"]
    process = start(*settings, f"model.path={model}")
    until(process, step_reached(folder, 2))
    ours = descendants(process)
    (head,) = [p for p in ours if "gcs_server" in p.name()]
    head.kill()
    fault.fired(f"process {head.pid} is dead")
    printed = printed_at_end(process, 4, 150)
    last = printed.strip().splitlines()[-1]
    assert "InfrastructureError" in last and "Ray's head is lost" in last and "run.resume=auto" in last, (
        printed[-3000:]
    )
    fault.saw("ends with 4: Ray's head is lost, and the command that goes on")
    assert left_over(ours, shared, 60.0) == []
    again = start(*settings, f"model.path={model}", "run.resume=auto")
    until(again, step_reached(folder, steps(folder)[-1] + 1), 150.0)
    fault.goes_on("the same command with run.resume=auto", lost="at most the step under way")
    again.terminate()
    printed_at_end(again, 143, 90)
    assert steps(folder) == list(range(1, len(steps(folder)) + 1))
