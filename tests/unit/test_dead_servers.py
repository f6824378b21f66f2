"""A judge's server that has died: what a queue costs, and how it is found to be back."""

import asyncio
import time
from typing import Any

import pytest
from aiohttp import web

from entroray.reward import served as served_judges
from entroray.reward.verdicts import failed
from entroray.types import Status, Verdict
from tests.served import answering, served


def test_a_server_that_dies_costs_a_long_queue_one_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(served_judges, "PROBE", 0.2)
    seen: list[Any] = []
    began = time.monotonic()
    verdicts = served(
        answering(web.Response(status=503), seen=seen), *["42"] * 256, patience=0.3, concurrency=8
    )
    assert time.monotonic() - began < 3.0, "not 32 deadlines of 0.3 s, one after the other"
    assert {verdict.status for verdict in verdicts} == {Status.INFRA_FAILED}
    assert all("/judge answers 503" in verdict.detail for verdict in verdicts)
    assert sum("down: asked every 0.2 s" in verdict.detail for verdict in verdicts) > 200


def test_a_probe_finds_a_server_that_is_back(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    server = served_judges.Server(concurrency=1)
    lost, found = failed("no answer", Status.INFRA_FAILED), Verdict(1.0, True)

    async def use(*answers: Verdict) -> list[str]:
        left = iter(answers)

        async def once(probe: bool) -> Verdict:
            asked.append(probe)
            return next(left)

        return [str((await server.ask(once)).status) for _ in range(4)]

    assert asyncio.run(use(lost, lost)) == ["infra_failed"] * 4
    assert asked == [False, True], "the first probe is at once, the next ones 30 s later"
    server.next_probe = time.monotonic()
    assert asyncio.run(use(found, found, found, found)) == ["ok"] * 4
    assert asked[2:] == [True, False, False, False]
