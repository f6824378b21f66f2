"""The edge to Ray: what it loses is a typed error, and nothing waits for what is gone."""

import asyncio
import threading
from concurrent.futures import Future
from typing import Any

import pytest
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    NodeDiedError,
    ObjectFetchTimedOutError,
    ObjectLostError,
    OwnerDiedError,
    WorkerCrashedError,
)

from entroray.errors import InfrastructureError
from entroray.workers import cluster


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
