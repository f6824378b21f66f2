"""F34 and F35: Ray's object store is full, and actors that grow until the kernel kills them."""

import asyncio
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray import cloudpickle

from entroray.engine.vllm_request import Request
from entroray.policy.tiny_model import build_tiny_model
from entroray.types import Draw
from entroray.wiring import actors, compose, dataset
from entroray.wiring.parts import build_parts
from entroray.workers import heartbeat
from tests.conftest import TINY
from tests.faults.record import Fault
from tests.faults.test_frozen import pid
from tests.ray.processes import descendants, left_over, printed_at_end, start, steps, until
from tests.ray.stack import ROOM, Stack

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # actors cannot import this file
pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]
STORE = 80 << 20
"""Bytes of Ray's object store, which takes no less than 75 MiB."""
SMALL = {"RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": str(STORE)}
FULL = {"RAY_local_fs_capacity_threshold": "0.0001"}
"""Of a disk that is used to more than 0.01 %, Ray takes no more."""
SETTINGS = [
    *("train", "experiment=quickstart", "objective=grpo", "rollout.groups_per_step=2", "run.steps=3"),
    *("learner.lr_high=true", "observe.report=false", "evaluate.final=false", "data.max_prompt=128"),
    *("++data.settings.size=2000", "generator.replicas=1", "rollout.max_tokens=16"),
]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model whose weights, 95 MB, are more than the store holds."""
    folder, sizes = tmp_path_factory.mktemp("large"), {"hidden_size": 512, "intermediate_size": 2048}
    build_tiny_model(folder, TINY | sizes | {"num_hidden_layers": 6}, seed=3)
    assert (folder / "model.safetensors").stat().st_size > STORE
    return str(folder)


def store_of(run: Any) -> str:
    """How Ray's raylet of a run was told to hold objects; "" before it is there."""
    shown = [" ".join(p.cmdline()) for p in descendants(run) if "raylet" in p.name()]
    found = re.search(r"--object_store_memory=(\d+)", shown[0]) if shown else None
    return found[1] if found else ""


@pytest.mark.fault("F34", "weights of 95 MB pass through an object store of 80 MB")
def test_what_the_object_store_cannot_hold_goes_through_the_disk(
    fault: Fault, tmp_path: Path, large: str
) -> None:
    process = start(*SETTINGS, f"run.dir={tmp_path}/run", f"model.path={large}", variables=SMALL)
    until(process, lambda: store_of(process) == str(STORE))
    fault.fired(f"raylet --object_store_memory={STORE}")
    printed_at_end(process, 0, 280.0)
    fault.saw("Ray puts them on its disk")
    assert steps(tmp_path / "run") == [1, 2, 3]
    fault.goes_on("three steps, four versions of the weights, ends with 0")


@pytest.mark.fault("F34", "the same, and the disk that Ray would spill to is full")
def test_a_full_object_store_with_a_full_disk_ends_the_run_with_4_and_says_who_filled_it(
    fault: Fault, tmp_path: Path, large: str
) -> None:
    folder, shared = tmp_path / "run", set(os.listdir("/dev/shm"))
    process = start(*SETTINGS, f"run.dir={folder}", f"model.path={large}", variables=SMALL | FULL)
    until(process, lambda: store_of(process) == str(STORE))
    fault.fired(f"raylet --object_store_memory={STORE}, its disk is full at 0.01 %")
    ours = descendants(process)
    printed = printed_at_end(process, 4, 200.0)
    fault.saw("ends with 4, naming LearnerRank and Ray's settings")
    last = printed.strip().splitlines()[-1]
    assert last.startswith("entroray train: InfrastructureError: Ray's object store (0.08 GB"), printed[
        -3000:
    ]
    assert "LearnerRank." in last and "--object-store-memory" in last
    assert left_over(ours, shared) == []
    fault.goes_on("no process and no shared memory is left", lost="what follows the last checkpoint")


@contextmanager
def memory_limit(number: int, more: int) -> Iterator[Callable[[], int]]:
    """The kernel kills a process that takes so many bytes more inside; gives how many it has killed."""
    old = Path("/sys/fs/cgroup/memory")
    group = (old if old.is_dir() else Path("/sys/fs/cgroup")) / f"entroray-{number}"
    limit, count = (
        ("memory.limit_in_bytes", "memory.oom_control") if old.is_dir() else ("memory.max", "memory.events")
    )
    try:
        group.mkdir()
        (group / limit).write_text(str(more))
        (group / "cgroup.procs").write_text(str(number))
    except OSError as error:
        pytest.skip(f"NOT TESTED: a memory limit of the kernel for one process: {error}")
    try:
        yield lambda: int(re.search(r"oom_kill (\d+)", (group / count).read_text())[1])  # type: ignore[index]
    finally:
        psutil.wait_procs([psutil.Process(number)] if psutil.pid_exists(number) else [], timeout=20)
        group.rmdir()


def grow(_: Any) -> None:
    """Take 50 MB more four times a second, in a thread of its own."""

    def take() -> None:
        held = []
        while True:
            held.append(bytearray(os.urandom(50_000_000)))
            time.sleep(0.25)

    threading.Thread(target=take, daemon=True).start()


@pytest.mark.fault("F35", "an engine takes 200 MB a second more, until the kernel kills it at 1 GB")
def test_an_actor_that_grew_and_was_killed_is_named_with_its_memory(
    fault: Fault, stack: Stack, model: str
) -> None:
    events, memory = list[str](), list[str]()

    def report(kind: str, **fields: Any) -> None:
        events.append(f"{kind} {fields['engine']}: {fields.get('error', '')}")

    async def run() -> None:
        config, _ = compose.load_config([*ROOM, f"model.path={model}", "generator.restarts=1"])
        parts, judge = build_parts(config), dataset.judge_spec(config)
        m = await actors.start_actors(config, model, parts, judge, (1, 2, 3), total_updates=1, report=report)
        request = Request("q", (1, 2, 3), (5,), Draw(1.0, 32), deadline=200.0)
        try:
            engine = m.engines.handles[0]
            victim = await asyncio.to_thread(pid, engine)
            await m.engines.sample(request)
            await asyncio.sleep(2 * heartbeat.INTERVAL)
            with memory_limit(victim, 1 << 30) as killed:
                engine.__ray_call__.remote(grow)
                async with asyncio.timeout(200.0):
                    while not events:
                        assert len(await m.engines.sample(request)) == 1
                assert killed() == 1
                fault.fired(f"the kernel has killed process {victim}, once")
            fault.saw(events[0][:110])
            memory.append(events[0])
            while m.engines.replacing:
                await asyncio.wait(m.engines.replacing, timeout=120.0)
            assert len(await m.engines.sample(request)) == 1
            fault.goes_on("engine_joined; its sample was drawn again by the engine in its place")
        finally:
            await m.end()

    stack.wait(run(), 280.0)
    assert [event.partition(":")[0] for event in events] == [
        "engine_lost generator 0",
        "engine_joined generator 1",
    ]
    found = re.search(r"generator 0 grew from (\d\.\d) to (\d\.\d) GB", memory[0])
    assert found and float(found[2]) > float(found[1]) + 0.4, memory
