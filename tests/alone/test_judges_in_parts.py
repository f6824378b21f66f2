"""A reward in several parts across processes: judge processes, servers, a user's file, a run, its trial."""

import asyncio
import json
import math
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray

from entroray.cli import doctor, judge_trial
from entroray.errors import ConfigError, InfrastructureError, PreflightError
from entroray.types import Prompt, Status, Verdict
from entroray.workers.verifier import Verifier
from tests.alone.test_verifier import rollout
from tests.composed import configured
from tests.ray.stack import Stack

PROMPT = Prompt("0" * 16, "?", (1,), "8")
FORM = {"fn": "format", "pattern": r"(a|aa)+|\d+", "weight": 0.5}
MINE = "def short(response, prompt):\n    return response.tokens / 8 if response != '?' else None\n"


class Server(BaseHTTPRequestHandler):
    """Answers 0.25, after a second if the response is slow."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        time.sleep(1.0 if asked["response"] == "slow" else 0.0)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"reward": 0.25, "parts": {"style": 0.75}}')

    def log_message(self, *_: Any) -> None:
        """Nobody reads it."""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/judge"
    server.shutdown()
    server.server_close()
    thread.join(timeout=5.0)


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("judge") / "mine.py"
    file.write_text(MINE)
    return f"{file}:short"


def parts(url: str, mine: str) -> dict[str, Any]:
    """What a verifier is given: text, a form, a server and a file, of which the first says what is right."""
    return {
        "answer": {"fn": "text"},
        "form": FORM,
        "server": {"fn": "remote", "url": url, "weight": 2.0},
        "mine": {"fn": "custom", "path": mine, "setting": "reward.parts.mine.path", "weight": -1},
    }


def test_parts_are_judged_where_each_belongs_at_the_same_time_and_summed(url: str, mine: str) -> None:
    judges = {"": {"parts": parts(url, mine), "correct": "answer"}}
    texts = [
        rollout("8"),
        rollout("9"),
        rollout("?"),
        rollout("a" * 40 + "b"),
        rollout("8", Status.TRUNCATED),
    ]

    async def use() -> tuple[list[Verdict], list[Verdict], float]:
        verifier = Verifier({"judges": judges}, slots=2, deadline=1.0)
        await verifier.warm_up()
        try:
            verdicts, began = await verifier.judge(PROMPT, texts), time.monotonic()
            slow = await verifier.judge(PROMPT, [rollout("slow")] * 10)
            seconds = time.monotonic() - began
            judging = asyncio.create_task(verifier.judge(PROMPT, [rollout("slow")]))
            await asyncio.sleep(0.3)
            verifier.close()
            with pytest.raises(InfrastructureError, match="closed"):
                await judging
            return verdicts, slow, seconds
        finally:
            verifier.close()

    (right, wrong, bad, endless, cut), slow, seconds = asyncio.run(asyncio.wait_for(use(), 60.0))
    found = {"answer": 1.0, "form": 1.0, "server": 0.25, "server.style": 0.75, "mine": 0.0}
    assert right == Verdict(2.0, True, "8", found, detail=right.detail)
    assert (wrong.reward, wrong.correct, wrong.status) == (1.0, False, Status.OK)
    assert bad.status is Status.DATA_FAILED and math.isnan(bad.reward)
    assert "reward.parts.mine: reward.parts.mine.path=" in bad.detail and "None" in bad.detail
    assert endless.status is Status.TIMEOUT and "reward.parts.form: " in endless.detail
    assert (cut.status, cut.reward, cut.correct) == (Status.TRUNCATED, 2.0, True)
    assert all(v.reward == 0.5 for v in slow) and seconds < 5.0, "ten answers that take a second each"


def test_a_key_that_a_node_lacks_is_a_config_error_of_the_warm_up(
    local_ray: None, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEY_OF_THE_DRIVER", "x")  # after the nodes were started
    spec = {"judges": {"": {"fn": "remote", "url": url, "key_env": "KEY_OF_THE_DRIVER"}}}
    actor = ray.remote(num_cpus=0.1)(Verifier).remote(spec)
    with pytest.raises(ConfigError, match=r"reward\.judge\.key_env=KEY_OF_THE_DRIVER"):
        ray.get(actor.warm_up.remote(), timeout=60)
    ray.kill(actor)


SMALL = (
    "data.max_prompt=32",
    "++data.settings.size=50",
    "model.warm_start.cache=/nowhere",
    "reward.judge={}",
)


def in_parts(url: str, mine: str) -> str:
    told = f"answer: {{fn: text}}, server: {{fn: remote, url: {url!r}, weight: 2}}, mine: {{path: {mine!r}}}"
    return f"reward.parts={{{told}}}"


def test_parts_are_tried_before_anything_starts(url: str, mine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge_trial, "PATIENCE", 0.5)
    said = doctor.judge(configured(*SMALL, in_parts(url, mine), "reward.correct=answer"))
    assert f"2 x server (remote at {url})" in said and "right by answer gives" in said
    assert "server.style 0.75" in said and "mine 20)" in said, "32 words of five bytes are 160 tokens"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    gone = f"http://127.0.0.1:{port}/judge"
    began = time.monotonic()
    with pytest.raises(PreflightError, match=rf"{gone} cannot be reached"):
        doctor.judge(configured(*SMALL, in_parts(gone, mine), "reward.correct=answer"))
    assert time.monotonic() - began < 20.0


def test_a_run_journals_every_part(stack: Stack, tmp_path: Path, url: str, mine: str) -> None:
    told = ["data=chain_sum", "reward.judge={}", in_parts(url, mine), "reward.correct=answer", "run.steps=1"]
    small = [
        "learner.lr=1e-6",
        "rollout.group_size=2",
        "rollout.groups_per_step=2",
        "++data.settings.size=50",
    ]
    (row,) = stack.wait(
        stack.drive(tmp_path / "run", *told, *small, f"model.path={stack.model}", "objective=grpo")
    )
    assert row["reward/part_server"] == 0.25 and row["reward/part_server.style"] == 0.75
    whole = row["reward/part_answer"] + 2 * row["reward/part_server"] + row["reward/part_mine"]
    assert row["reward/mean"] == pytest.approx(whole)
    records = pq.read_table(tmp_path / "run" / "tokens" / "step-000001.parquet").to_pylist()
    assert json.loads(records[0]["parts"])["server"] == 0.25
