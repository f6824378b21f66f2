"""What a verifier's event loop does while a fork server starts, and where nobody looks at its processes."""

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import pytest

from entroray.errors import InfrastructureError
from entroray.train.pulse import Turns
from entroray.workers import verifier
from entroray.workers.verifier import Verifier


class Slow:
    """A fork server that takes 0.2 s to start, and is not well the first time."""

    started = 0

    def __init__(self, *_: Any):
        type(self).started += 1
        if self.started > 1:
            time.sleep(0.2)
        self.pid, self.healthy, self.closed = 0, self.started > 1, False

    async def fork(self) -> Any:
        return SimpleNamespace(pid=1)

    def close(self) -> None:
        self.closed = True


def test_the_loop_turns_while_a_fork_server_is_started_in_place_of_another(monkeypatch: Any) -> None:
    monkeypatch.setattr(verifier, "_ForkServer", server := type("Once", (Slow,), {}))

    async def run() -> int:
        judges, turns = Verifier({"judges": {}}), 0
        first, fork = judges._server, asyncio.ensure_future(judges._fork())
        while not fork.done():
            await asyncio.sleep(0.01)
            turns += 1
        assert first.closed and server.started == 2 and (await fork).pid == 1  # type: ignore[attr-defined]
        return turns

    assert asyncio.run(run()) >= 5


def test_a_verifier_that_is_closed_as_a_fork_server_starts_leaves_none(monkeypatch: Any) -> None:
    monkeypatch.setattr(verifier, "_ForkServer", type("Once", (Slow,), {}))

    async def run() -> None:
        judges = Verifier({"judges": {}})
        fork = asyncio.ensure_future(judges._fork())
        await asyncio.sleep(0.05)
        judges.close()
        with pytest.raises(InfrastructureError, match="closed"):
            await fork
        assert judges._server.closed  # type: ignore[attr-defined]

    asyncio.run(run())


def test_where_looking_at_judge_processes_fails_the_heartbeat_says_so(monkeypatch: Any) -> None:
    def fails(pid: int) -> None:
        raise PermissionError("no such right")

    monkeypatch.setattr(verifier, "_ForkServer", type("Once", (Slow,), {"started": 1}))
    monkeypatch.setattr(verifier, "TURNS", turns := Turns())
    monkeypatch.setattr(verifier, "LOOK", 0.0)
    monkeypatch.setattr(verifier, "_beat_of", fails)

    async def run() -> None:
        judges = Verifier({"judges": {}}, slots=1)
        await judges.warm_up()
        await asyncio.sleep(0.05)

    asyncio.run(run())
    assert "no such right" in turns.failure
