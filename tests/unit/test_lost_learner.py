"""A learner that is lost, a signal in every phase, and when a run saves."""

import asyncio
from collections import Counter
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from entroray.cli.saving import Saving, last_save
from entroray.config import Checkpoint, Config, Run
from entroray.engine.served_version import check_attempt, stamp_version, version_of
from entroray.errors import DataError, InfrastructureError, LearnerLostError, SyncError
from entroray.objective import build_objective
from entroray.observe.journal import Journal
from entroray.rollout.ledger import DROPPED, ISSUED, ROLLED_BACK
from entroray.rows import objective_row
from entroray.workers import cluster
from entroray.workers.cluster import Gang
from tests.toy import ToyWorld, driver, trained


def world() -> ToyWorld:
    return ToyWorld(build_objective(objective_row("grpo")))


class Call:
    """What a rank's method returns: an error, or never anything."""

    def __init__(self, error: Exception | None):
        self.error = error

    def future(self) -> Future:
        ended: Future = Future()
        if self.error:
            ended.set_exception(self.error)
        return ended


def raised_inside(error: Exception) -> RayTaskError:
    return RayTaskError("update", "its traceback", error)


GLOO = raised_inside(RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer"))


@pytest.mark.parametrize(
    ("errors", "named"),
    [
        ([None, ActorDiedError()], "learner rank 1: its process died"),
        ([GLOO, ActorDiedError()], "learner rank 1: its process died"),
        ([GLOO, None], "Connection closed by peer"),
        ([None, None], "learner rank 0 gave no answer"),
    ],
    ids=["dead", "dead and its peer first", "a collective", "silent"],
)
def test_a_rank_that_dies_or_is_silent_is_the_loss_of_the_learner(
    errors: list[Exception | None], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "NAMED", 0.05)
    gang = Gang("learner", errors)
    with pytest.raises(LearnerLostError, match=named):
        asyncio.run(gang.all(lambda rank, error: Call(error), deadline=0.05 if errors == [None] * 2 else 5.0))


@pytest.mark.parametrize(("error", "named"), [(ActorDiedError(), "its process died"), (None, "no answer")])
def test_a_rank_that_dies_before_the_others_have_met_it_is_the_loss_of_the_learner(
    error: Exception | None, named: str
) -> None:
    handle = SimpleNamespace(address=SimpleNamespace(remote=lambda: Call(error)))
    with pytest.raises(LearnerLostError, match=named):
        asyncio.run(Gang("learner", [handle, None]).start(0.01))


def test_a_verdict_on_a_rank_that_was_replaced_kills_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    killed, told = list[Any](), list[str]()
    monkeypatch.setattr(cluster, "kill_actors", killed.extend)
    gang = Gang("learner", ["old"], lambda rank: "new")
    (watched,) = gang.watched(lambda kind, **fields: told.append(kind))
    gang.respawn()
    watched.lose(InfrastructureError("frozen: no sign of life for 20 s"))
    assert (killed, gang.lost, told) == (["old"], {}, [])
    (watched,) = gang.watched(lambda kind, **fields: told.append(kind))
    watched.lose(InfrastructureError("frozen: no sign of life for 20 s"))
    assert killed == ["old", "new"] and list(gang.lost) == [0] and told == ["rank_lost"]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (raised_inside(ValueError("a bug")), RayTaskError),
        (raised_inside(InfrastructureError("generator 0: its process died")), InfrastructureError),
        (raised_inside(DataError("none")), DataError),
    ],
)
def test_what_a_living_rank_raises_is_no_loss(error: Exception, kind: type) -> None:
    with pytest.raises(kind) as found:
        asyncio.run(Gang("learner", [error]).all(lambda rank, error: Call(error), deadline=5.0))
    assert not isinstance(found.value, LearnerLostError)


def test_a_version_of_one_attempt_is_not_that_of_another_and_an_ended_attempt_is_refused() -> None:
    assert stamp_version(0, 7) == 7 != stamp_version(1, 7)
    assert version_of(stamp_version(1, 7)) == version_of("7") == 7
    check_attempt("7", stamp_version(1, 3))
    check_attempt(str(stamp_version(1, 3)), stamp_version(1, 3))
    with pytest.raises(SyncError, match="attempt 0 of the run"):
        check_attempt(str(stamp_version(1, 3)), stamp_version(0, 8))


def test_a_driver_says_what_was_issued_when_the_learner_is_lost_and_goes_on_as_from_a_file() -> None:
    """Steps 1 and 2 are committed, 3 is undone; one driver after the other, as after a stop."""
    whole = world()
    trained(driver(whole), 4)
    w = world()
    update, updates = w.update, Counter[str]()

    async def lost(*given: Any) -> dict[str, float]:
        updates["calls"] += 1
        if updates["calls"] == 3:
            raise LearnerLostError("learner rank 0: its process died")
        return await update(*given)

    w.update = lost  # type: ignore[method-assign]
    d, states, held = driver(w), dict[int, dict](), dict[int, Any]()

    async def after(step: int, metrics: object) -> None:
        states[step] = d.state()
        held[step] = w.logits.detach().clone(), w.rng.get_state()

    with pytest.raises(LearnerLostError):
        asyncio.run(d.train(4, after))
    issued = d.ledger.of(ISSUED)
    assert issued[1] == 12 and states[2]["stream"]["serial"] == 8
    d.ledger.restore(states[2]["stream"]["ledger"])
    undone = d.ledger.of(DROPPED + ROLLED_BACK)
    assert undone[1] == 4 and undone[3] > 0 and (d.ledger.of(ISSUED)[1:] == issued[1:]).all()
    w.logits.data = held[2][0]
    w.rng.set_state(held[2][1])
    asyncio.run(w(2))
    trained(driver(w), 4, states[2])
    assert w.trained == whole.trained and [s["step"] for s in w.steps] == [1, 2, 3, 4]
    assert (w.logits == whole.logits).all()


@pytest.mark.parametrize("stopped_at", [0, 2])
def test_a_signal_gives_an_evaluation_up_and_the_next_start_makes_it(stopped_at: int) -> None:
    w, asked = world(), list[int]()
    d = driver(w)

    async def endless(step: int, last: bool) -> dict[str, float]:
        if step == stopped_at:
            asyncio.get_running_loop().call_later(0.05, d.stop)
            await asyncio.sleep(60.0)
        return {"eval/greedy": 0.5}

    d.roles = replace(d.roles, evaluate=endless)
    asyncio.run(asyncio.wait_for(d.train(4), 10.0))
    assert d.committed["version"] == stopped_at == len(w.steps) and d.committed["owed"]
    assert all("eval/greedy" in row for row in w.steps[:-1]) and "eval/greedy" not in [*w.steps, {}][-1]

    async def quick(step: int, last: bool) -> dict[str, float]:
        asked.append(step)
        return {"eval/greedy": 0.5}

    seen = list[int]()

    async def after(step: int, metrics: Any) -> None:
        seen.append(step)

    again = driver(w)
    again.roles = replace(again.roles, evaluate=quick)

    async def go_on() -> None:
        again.restore(d.committed)
        await again.train(stopped_at + 1, after)

    asyncio.run(go_on())
    assert asked == [stopped_at, stopped_at + 1] and w.events[-1] == "evaluation"
    assert seen == ([1] if stopped_at == 0 else [2, 3]), "who counts evaluations is told of it"
    assert not again.committed["owed"]


def test_a_signal_while_weights_are_updated_ends_the_step_without_its_evaluation() -> None:
    w, evaluated = world(), list[int]()
    d, update = driver(w), w.update

    async def stopping(*given: Any) -> dict[str, float]:
        d.stop()
        return await update(*given)

    async def evaluate(step: int, last: bool) -> dict[str, float]:
        evaluated.append(step)
        return {}

    w.update, d.roles = stopping, replace(d.roles, evaluate=evaluate)  # type: ignore[method-assign]
    asyncio.run(d.train(4))
    assert [s["step"] for s in w.steps] == [1] and evaluated == [0]
    assert d.committed["version"] == 1 and d.committed["owed"]


class Saves:
    """Checkpoints that take `seconds` of a clock that stands."""

    def __init__(self, clock: list[float], seconds: float):
        self.clock, self.seconds, self.steps = clock, seconds, list[int]()

    async def save(self, step: int, state: object, accuracy: float | None) -> Path:
        self.clock[0] += self.seconds
        self.steps.append(step)
        return Path(f"step-{step:06d}")


def saving(
    folder: Path, monkeypatch: pytest.MonkeyPatch, said: list[str], seconds: float, **of: float
) -> tuple[Saving, Saves, list[float]]:
    clock = [100.0]
    monkeypatch.setattr("entroray.cli.saving.time", SimpleNamespace(monotonic=lambda: clock[0]))
    book = Journal(folder, tokens_every=0)
    book.say = said.append
    config = Config(run=Run(grace=25.0), checkpoint=Checkpoint(**of))  # type: ignore[arg-type]
    saves = Saves(clock, seconds)
    return Saving(config, saves, book, dict), saves, clock  # type: ignore[arg-type]


def test_a_run_saves_after_ten_minutes_or_after_so_many_steps(tmp_path: Path, monkeypatch) -> None:
    by_time, saves, clock = saving(tmp_path / "a", monkeypatch, [], 5.0)
    assert not by_time.due(1)
    clock[0] += 599
    assert not by_time.due(2)
    clock[0] += 1
    assert by_time.due(3)
    asyncio.run(by_time.save(3))
    assert not by_time.due(4) and saves.steps == [3]
    asyncio.run(by_time.save(3, kind="stopped", signal=15))
    assert saves.steps == [3], "what is saved is not written twice"
    by_steps, _, clock = saving(tmp_path / "b", monkeypatch, [], 5.0, every=2, every_minutes=0.0)
    clock[0] += 1e6
    assert [by_steps.due(step) for step in (1, 2, 3, 4)] == [False, True, False, True]


def test_a_save_longer_than_a_signal_leaves_is_said_once_and_at_the_next_start(tmp_path, monkeypatch) -> None:
    said = list[str]()
    slow, _, _ = saving(tmp_path, monkeypatch, said, 40.0)
    for step in (1, 2):
        asyncio.run(slow.save(step))
    assert len(said) == 1 and "40 s" in said[0] and "run.grace=25" in said[0]
    assert last_save(tmp_path) == 40.0
    saving(tmp_path, monkeypatch, again := list[str](), 1.0)
    assert again == said
