"""What is written leaves the event loop alone, and is on the disk when and as it was before."""

import asyncio
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from entroray.errors import InfrastructureError
from entroray.objective import build_objective
from entroray.observe.journal import Journal, read_metrics
from entroray.rollout.selection import Selection
from entroray.rows import objective_row
from entroray.train.driver import Roles
from entroray.train.threads import in_thread
from entroray.workers import checkpoint
from entroray.workers.checkpoint import Checkpoints, committed, newest
from tests.toy import ToyWorld, driver


def world() -> ToyWorld:
    return ToyWorld(build_objective(objective_row("grpo")))


def test_what_a_thread_raises_is_raised_where_it_is_awaited() -> None:
    def fail() -> None:
        raise InfrastructureError("disk gone")

    with pytest.raises(InfrastructureError, match="disk gone"):
        asyncio.run(in_thread(fail))
    assert asyncio.run(in_thread(lambda: 3)) == 3


def test_a_step_is_written_in_a_thread_while_the_loop_goes_on_and_before_the_next_begins() -> None:
    w, seen, turned, let_go = world(), list[object](), list[int](), threading.Event()
    write = w.step

    def slow(step: int, *given: object) -> None:
        seen.append((step, threading.current_thread() is threading.main_thread(), w.version))
        assert let_go.wait(5.0), "the loop stood still"
        let_go.clear()
        write(step, *given)

    async def turn() -> None:
        while True:
            if len(seen) > len(turned):
                turned.append(len(seen))
                let_go.set()
            await asyncio.sleep(0.001)

    async def run() -> None:
        beside = asyncio.ensure_future(turn())
        await driver(w).train(3)
        beside.cancel()

    w.step = slow  # type: ignore[method-assign]
    asyncio.run(run())
    assert seen == [(1, False, 1), (2, False, 2), (3, False, 3)]
    assert [s["step"] for s in w.steps] == [1, 2, 3]


def test_a_disk_that_refuses_a_step_ends_the_run_typed() -> None:
    w = world()

    def refuse(*_: object) -> None:
        raise InfrastructureError("metrics.jsonl cannot be written")

    w.step = refuse  # type: ignore[method-assign]
    with pytest.raises(InfrastructureError, match=r"metrics\.jsonl"):
        asyncio.run(driver(w).train(2))


def test_a_run_told_to_stop_while_a_step_is_written_has_its_line_and_its_checkpoint() -> None:
    w, saved, loop = world(), list[tuple[int, int]](), list[asyncio.AbstractEventLoop]()
    d, write = driver(w), w.step

    def stopping(step: int, *given: object) -> None:
        loop[0].call_soon_threadsafe(d.stop)
        time.sleep(0.05)
        write(step, *given)

    async def after(step: int, metrics: object) -> None:
        await asyncio.sleep(0.01)
        saved.append((step, len(w.steps)))

    async def run() -> None:
        loop.append(asyncio.get_running_loop())
        await d.train(5, after)

    w.step = stopping  # type: ignore[method-assign]
    asyncio.run(run())
    assert saved == [(1, 1)] and d.committed["version"] == 1


@pytest.mark.parametrize("phase", ["evaluate", "checkpoint", "journal"])
def test_a_stall_is_noticed_before_the_first_step_while_writing_and_in_a_checkpoint(phase: str) -> None:
    w, never = world(), threading.Event()
    d = driver(w, stall=1.0 if phase == "journal" else 20.0)
    soon = replace(d.pace, stall=0.1)

    async def hang(*_: object) -> dict[str, float]:
        await asyncio.sleep(5.0)
        return {}

    if phase == "evaluate":
        d.roles, d.pace = Roles(w, w, w, w, w, evaluate=hang), soon  # type: ignore[arg-type]
    if phase == "checkpoint":
        w.step = lambda *_: setattr(d, "pace", soon)  # type: ignore[method-assign]
    if phase == "journal":
        w.step = lambda *_: never.wait(5.0)  # type: ignore[method-assign,assignment]
    with pytest.raises(InfrastructureError, match=rf"driver\.stall.*`{phase}`"):
        asyncio.run(d.train(2, hang if phase == "checkpoint" else None))  # type: ignore[arg-type]
    never.set()


def test_seconds_of_a_step_hold_the_evaluation_the_journal_and_the_checkpoint_before_it() -> None:
    w = world()

    async def evaluate(step: int, last: bool) -> dict[str, float]:
        await asyncio.sleep(0.02)
        return {}

    async def after(step: int, metrics: object) -> None:
        await asyncio.sleep(0.03)

    d = driver(w)
    d.roles = Roles(w, w, w, w, w, evaluate=evaluate)  # type: ignore[arg-type]
    asyncio.run(d.train(2, after))
    first, second = w.steps
    assert first["seconds/evaluate"] >= 0.039 and "seconds/checkpoint" not in first
    assert second["seconds/checkpoint"] >= 0.029 and second["seconds/journal"] > 0
    phases = sum(v for k, v in second.items() if k.startswith("seconds/")) - second["seconds/step"]
    assert 0.048 <= phases <= second["seconds/step"]


class Remembered:
    """What is remembered of prompts, and how often it was written down."""

    def __init__(self) -> None:
        self.asked = 0

    def observe(self, group: object) -> None: ...

    def state(self) -> dict[str, int]:
        self.asked += 1
        return {}

    def restore(self, state: object) -> None: ...


def test_what_is_remembered_of_prompts_is_made_where_a_checkpoint_is_saved() -> None:
    of_prompts = Remembered()
    d = driver(world(), selection=Selection({"pass rates": of_prompts}))
    asyncio.run(d.train(4))
    assert of_prompts.asked == 0
    assert d.committed["observers"] == {"pass rates": {}} and d.committed["version"] == 4
    assert of_prompts.asked == 2


def test_a_journal_is_closed_after_the_step_that_a_thread_is_writing(tmp_path: Path) -> None:
    began, book = threading.Event(), Journal(tmp_path, tokens_every=0)

    class Slow:
        def log(self, step: int, metrics: object) -> None:
            began.set()
            time.sleep(0.05)
            book.event("late", step=step)

        def close(self) -> None: ...

    book.trackers.append(Slow())  # type: ignore[arg-type]
    writer = threading.Thread(target=book.step, args=(1, {"a": 1.0}, [], None))
    writer.start()
    began.wait(5.0)
    book.close()
    writer.join(5.0)
    assert [m["step"] for m in read_metrics(tmp_path / "metrics.jsonl")] == [1]
    assert [e["kind"] for e in read_metrics(tmp_path / "events.jsonl")] == ["late"]


class Gang:
    """Ranks that write one file."""

    async def all(self, call: object, deadline: float) -> list[object]:
        return [call(0, SimpleNamespace(save=SimpleNamespace(remote=self.save)))]  # type: ignore[operator]

    def save(self, folder: str) -> dict[str, object]:
        Path(folder, "weights").write_bytes(bytes(1000))
        return {}


def test_a_checkpoint_is_hashed_in_a_thread_and_valid(tmp_path: Path, monkeypatch) -> None:
    threads, fingerprint = list[bool](), checkpoint._fingerprint

    def seen(file: Path) -> object:
        threads.append(threading.current_thread() is threading.main_thread())
        return fingerprint(file)

    monkeypatch.setattr(checkpoint, "_fingerprint", seen)
    saves = Checkpoints(tmp_path, Gang(), keep=1, deadline=1.0)  # type: ignore[arg-type]
    asyncio.run(saves.save(3, {"version": 3}))
    assert threads and not any(threads)
    assert newest(tmp_path) == (tmp_path / "step-000003", [])


def test_a_checkpoint_that_is_given_up_is_none_and_the_next_is_whole(tmp_path: Path, monkeypatch) -> None:
    """As `driver.stall` gives one up: its thread goes on, and is not swept away under its hands."""
    begun, go_on, seal = threading.Event(), threading.Event(), checkpoint.commit

    def slow(*given: Any) -> Path:
        begun.set()
        go_on.wait(5.0)
        return seal(*given)

    saves = Checkpoints(tmp_path, Gang(), keep=2, deadline=1.0)  # type: ignore[arg-type]

    async def run() -> None:
        monkeypatch.setattr(checkpoint, "commit", slow)
        given_up = asyncio.ensure_future(saves.save(3, {"version": 3}))
        while not begun.is_set():
            await asyncio.sleep(0.001)
        given_up.cancel()
        with pytest.raises(asyncio.CancelledError):
            await given_up
        assert committed(tmp_path) == [] and (tmp_path / ".step-000003.part" / "weights").is_file()
        go_on.set()
        monkeypatch.setattr(checkpoint, "commit", seal)
        await saves.save(4, {"version": 4})

    asyncio.run(run())
    assert newest(tmp_path)[0] == tmp_path / "step-000004"


def test_pieces_of_a_batch_hold_the_rows_asked_for() -> None:
    """Rows of 2, 0 and 1 tokens, in the order 2, 0 and then 1 alone."""
    from entroray.ops import token_places

    places = token_places(np.array([2, 0, 1]), [np.array([2, 0]), np.array([], np.int64), np.array([1])])
    assert [p.tolist() for p in places] == [[2, 0, 1], [], []]
