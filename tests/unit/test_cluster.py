"""The edge to Ray: what it loses is a typed error, and nothing waits for what is gone."""

import asyncio
import threading
import time
from concurrent.futures import Future
from typing import Any

import pytest
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    NodeDiedError,
    ObjectFetchTimedOutError,
    ObjectLostError,
    ObjectStoreFullError,
    OutOfDiskError,
    OwnerDiedError,
    RayTaskError,
    WorkerCrashedError,
)

from entroray.errors import InfrastructureError, PreflightError
from entroray.planning.placement import ENGINES, RANKS, VERIFIERS
from entroray.workers import cluster, nodes


class Ref:
    """What an actor's call returns, once it has failed."""

    def __init__(self, error: Exception):
        self.error = error

    def future(self) -> Future:
        failed: Future = Future()
        failed.set_exception(self.error)
        return failed


@pytest.mark.parametrize(
    "error",
    [
        ActorDiedError(),
        ActorUnavailableError("gone", None),
        NodeDiedError("gone"),
        WorkerCrashedError(),
        ObjectLostError("ab", None, ""),
        OwnerDiedError("ab", None, ""),
        ObjectFetchTimedOutError("ab", None, ""),
    ],
    ids=lambda error: type(error).__name__,
)
def test_whatever_ray_loses_is_an_infrastructure_error(error: Exception) -> None:
    with pytest.raises(InfrastructureError, match=r"^generator 3, sampling: "):
        asyncio.run(cluster.settle(Ref(error), deadline=5.0, what="generator 3, sampling"))


def test_killing_an_actor_whose_node_is_gone_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, answered, returned = threading.Event(), threading.Event(), threading.Event()

    def kill(handle: Any) -> None:
        begun.set()
        answered.wait(2.0)
        returned.set()

    monkeypatch.setattr(cluster.ray, "kill", kill)
    cluster.kill_actors(["a"])
    assert begun.wait(5.0) and not returned.is_set(), "the call to Ray is still under way"
    answered.set()


NODE = {"Alive": True, "Resources": {"CPU": 2.0}, "NodeID": "n", "NodeManagerHostname": "h"}
NODE |= {"NodeManagerAddress": "10.0.0.1"}


def test_a_run_waits_for_nodes_that_join_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    joins = iter([1, 1, 1, 2])
    monkeypatch.setattr(cluster.ray, "nodes", lambda: [NODE] * next(joins))
    monkeypatch.setattr(cluster.time, "sleep", lambda seconds: None)
    shares = dict.fromkeys((ENGINES, RANKS, VERIFIERS), (1, cluster.Share(1.0, 0.0, None)))
    assert "= 3 of 4; GPU: 0 = 0 of 0" in nodes.await_resources(shares, 60.0)
    said = capsys.readouterr().out
    assert said.count("waiting at most 60 s for nodes to join") == 1 and "= 3 of 2" in said


def test_nodes_that_do_not_join_in_time_are_missed_and_a_machine_alone_waits_for_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cluster.ray, "nodes", lambda: [NODE])
    shares = dict.fromkeys((ENGINES, RANKS, VERIFIERS), (1, cluster.Share(1.0, 0.0, None)))
    for within in (0.0, 0.05):
        began = time.monotonic()
        with pytest.raises(PreflightError, match=r"= 3 of 2.*join more or larger nodes"):
            nodes.await_resources(shares, within)
        assert within <= time.monotonic() - began < within + 1.0


@pytest.mark.parametrize(
    ("error", "who"),
    [
        (OutOfDiskError("Local disk is full"), "the driver"),
        (
            RayTaskError(
                "sync", "ray::LearnerRank.sync() (pid=1)", ObjectStoreFullError("")
            ).as_instanceof_cause(),
            "LearnerRank.sync",
        ),
    ],
)
def test_an_object_store_without_room_is_said_with_its_size_who_filled_it_and_what_gives_room(
    monkeypatch: pytest.MonkeyPatch, error: Exception, who: str
) -> None:
    monkeypatch.setattr(nodes.ray, "cluster_resources", lambda: {"object_store_memory": 8e7})
    with (
        pytest.raises(InfrastructureError, match=f"0.08 GB .* {who} put .*--object-store-memory"),
        nodes.object_store(),
    ):
        raise error
