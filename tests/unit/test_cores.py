"""Cores divided between engines and learner."""

import asyncio
import importlib.util
import os
import signal
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest

from entroray import cli
from entroray.wiring import actors, compose
from entroray.workers import cluster, cores
from entroray.workers.cores import BESIDE, SharingLearner, Threads, divide_cores


@pytest.mark.parametrize(
    ("number", "engines", "ranks", "engine", "rank"),
    [
        (2, (1, None), (1, None), Threads(2, 1), Threads(2, 1)),
        (3, (1, None), (1, None), Threads(3, 1), Threads(3, 2)),
        (16, (2, None), (1, None), Threads(8, 4), Threads(16, 8)),
        (16, (1, None), (4, None), Threads(16, 8), Threads(4, 2)),
        (8, (1, 2), (1, None), Threads(2, 2), Threads(8, 6)),
        (8, (3, None), (1, 5), Threads(2, 1), Threads(5, 5)),
        (1, (2, None), (2, None), Threads(1, 1), Threads(1, 1)),
        (2, (2, 1), (1, None), Threads(1, 1), Threads(2, 1)),
    ],
)
def test_cores_are_halved_and_threads_that_were_set_are_kept(
    number: int, engines: Any, ranks: Any, engine: Threads, rank: Threads
) -> None:
    assert divide_cores(number, engines, ranks) == (engine, rank)


@pytest.mark.parametrize(
    ("overrides", "shared"),
    [
        ([], False),
        (["driver=async"], True),
        (["driver=async", "cluster=gpu"], False),
    ],
)
def test_cores_are_shared_on_cpus_where_there_is_a_lag(overrides: list[str], shared: bool) -> None:
    config, _ = compose.load_config(overrides)
    assert (actors.core_shares(config) is not None) == shared
    assert actors.resource_shares(config)["learner ranks"][1].beside == ((BESIDE,) if shared else ())


class Told:
    """An actor that remembers the numbers of threads it was told."""

    def __init__(self) -> None:
        self.numbers: list[int] = []

    @property
    def use_threads(self) -> Any:
        call = SimpleNamespace(remote=self.numbers.append)
        return SimpleNamespace(remote=self.numbers.append, options=lambda concurrency_group: call)


def test_engines_give_cores_to_a_learner_at_work_and_it_takes_all_where_they_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cores, "LOOK", 0.001)
    engine, rank = Told(), Told()
    pool: Any = SimpleNamespace(all_handles=[engine], busy=True)

    class Working:
        gang = SimpleNamespace(handles=[rank])

        async def update(self, *_: Any) -> dict[str, float]:
            for pool.busy in (True, False, True):
                await asyncio.sleep(0.02)
            return {"update/loss": 1.0}

    learner: Any = Working()
    sharing = SharingLearner(learner, pool, Threads(4, 1), Threads(4, 3))
    assert asyncio.run(sharing.update()) == {"update/loss": 1.0}
    assert engine.numbers == [1, 4] and rank.numbers == [3, 4, 3, 4]


@pytest.mark.parametrize(("own", "policy"), [(None, "passive"), ("active", "active"), ("PASSIVE", "PASSIVE")])
def test_waiting_threads_sleep_in_command_and_actors_unless_the_user_said_otherwise(
    own: str | None, policy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        with patch.dict(os.environ, {"OMP_WAIT_POLICY": own} if own else {}):
            if own is None:
                os.environ.pop("OMP_WAIT_POLICY", None)
            cli.run(["no-such-command"])
            assert os.environ["OMP_WAIT_POLICY"] == policy
            assert again(cluster).CPU_ONLY["OMP_WAIT_POLICY"] == policy
    finally:
        signal.signal(signal.SIGINT, interrupt)


def again(module: Any) -> Any:
    """The module as another process would import it now."""
    spec: Any = importlib.util.spec_from_file_location("again", module.__file__)
    fresh = importlib.util.module_from_spec(spec)
    with patch.dict("sys.modules", {"again": fresh}):
        spec.loader.exec_module(fresh)
    return fresh
