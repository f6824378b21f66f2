"""What this folder shares: one engine and ranks, from the first weights for everyone; one finished run."""

import asyncio
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from entroray import cli
from entroray.cli import train
from entroray.config import Config
from entroray.engine.vllm_request import has_begun
from entroray.objective import Objective, build_objective
from entroray.wiring import actors, compose, dataset
from entroray.wiring.parts import build_parts
from entroray.wiring.run_directory import RunDirectory
from entroray.workers import cluster
from entroray.workers.cluster import Gang
from entroray.workers.deepspeed_backend import DeepSpeedBackend
from entroray.workers.engine_pool import EnginePool
from entroray.workers.learner_rank import LearnerRank
from entroray.workers.verifier import Verifier
from entroray.workers.verifier_pool import VerifierPool

SHARES = [f"cluster.cpus.{role}=0.1" for role in ("generator", "learner", "verifier")]
"""Little of the node, so that a module's own actors find room beside these."""
ROOM = [
    "learner.lr_high=true",
    *("experiment=quickstart", "sampler=by_entropy", "data.max_prompt=384", "rollout.max_tokens=128"),
    *("generator.replicas=1", "generator.threads=1", "learner.threads=1", *SHARES),
]
"""An engine that reads 512 tokens and can shape what it draws."""


def entroray(*arguments: str, expect: int = 0) -> str:
    """What `entroray <arguments>` prints, in a process of its own that ends with the code `expect`."""
    command = [sys.executable, "-m", "entroray", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=580, env=os.environ, check=False)
    assert done.returncode == expect, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def entroray_here(*arguments: str, expect: int = 0) -> str:
    """As `entroray`, in this process: for a command that ends before it starts Ray."""
    printed = io.StringIO()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with patch.dict(os.environ), redirect_stdout(printed), redirect_stderr(printed):
            code = cli.run(list(arguments))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert code == expect, printed.getvalue()[-3000:]
    return printed.getvalue()


def lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file; none if there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def metrics(folder: Path) -> list[dict[str, Any]]:
    """What a run journalled, one object a step."""
    return lines(folder / "metrics.jsonl")


async def drawing(engine: Any) -> None:
    """Until the engine has drawn a token of a request that it has not answered."""

    def begun(engine: Any) -> bool:
        return any(has_begun(engine.engine, name) for name in [*engine.owner])

    while not await cluster.settle(engine.__ray_call__.remote(begun), deadline=60.0, what="engine"):
        await asyncio.sleep(0.01)


@dataclass(frozen=True)
class FinishedRun:
    """A run that nobody may write to: its folder, its settings, what it printed."""

    folder: Path
    overrides: tuple[str, ...]
    printed: str
    listened: frozenset[tuple[str, Any]]
    """Names of its processes, and the addresses where they took connections."""
    logs: Path
    """Ray's own, of this run alone."""

    @property
    def first_model(self) -> str:
        """The folder of the warm-started model it began with."""
        return str(json.loads((self.folder / "manifest.json").read_text())["model"])


class Stack:
    """An engine, gangs by their size and verifiers by their judge, started when first asked for."""

    def __init__(self, model: str) -> None:
        self.model, self.loop = model, asyncio.new_event_loop()
        self._machine: actors.Actors | None = None
        self.gangs: dict[int, Gang] = {}
        self.judges: dict[str, VerifierPool] = {}

    def wait(self, work: Awaitable[Any], seconds: float = 500.0) -> Any:
        """The value of `work`, on the one event loop of the session."""
        return self.loop.run_until_complete(asyncio.wait_for(work, seconds))

    async def machine(self) -> actors.Actors:
        """The engine and the rank, whatever weights they hold."""
        if self._machine is None:
            config, _ = compose.load_config([*ROOM, f"model.path={self.model}"])
            parts, judge = build_parts(config), dataset.judge_spec(config)
            self._machine = await actors.start_actors(
                config, self.model, parts, judge, (1, 2, 3), total_updates=1
            )
        return self._machine

    async def gang(self, ranks: int) -> Gang:
        """A learner of so many ranks that has a DeepSpeed engine, to be reset before use."""
        if ranks == 1:
            return (await self.machine()).learner
        if ranks not in self.gangs:
            self.gangs[ranks] = await self.another_gang(ranks)
        return self.gangs[ranks]

    async def another_gang(self, ranks: int) -> Gang:
        """A learner of so many ranks that nobody else has."""
        config, _ = compose.load_config([*ROOM, f"learner.ranks={ranks}"])
        settings = actors.learner_settings(config, self.model, 10)
        objective = build_objective("grpo")
        share = actors.resource_shares(config)["learner ranks"][1]
        handles = [
            cluster.spawn(LearnerRank, share, rank, settings, objective, DeepSpeedBackend)
            for rank in range(ranks)
        ]
        host, port = await cluster.settle(handles[0].address.remote(), deadline=120.0, what="rank 0")
        gang = Gang("learner", handles)
        await gang.all(lambda rank, h: h.start.remote(host, port, 120.0), deadline=180.0)
        return gang

    async def _verifiers(self, config: Config, judge: Mapping[str, Any]) -> VerifierPool:
        key = compose.fingerprint([judge, config.reward.deadline])
        if key not in self.judges:
            share = actors.resource_shares((await self.machine()).config)["verifiers"][1]
            limits = {"slots": config.verifier.slots, "memory_mb": config.verifier.memory_mb}
            limits["deadline"] = config.reward.deadline
            spawn = lambda: cluster.spawn(Verifier, share, judge, **limits)
            self.judges[key] = VerifierPool(1, spawn, start_deadline=120.0, report=_silent)
            await self.judges[key].start()
        return self.judges[key]

    async def actors(
        self, config: Config, objective: Objective, judge: Mapping[str, Any], updates: int = 1000
    ) -> actors.Actors:
        """The shared engine and rank with `config` in effect, at version 0 of the weights of `model.path`."""
        m = await self.machine()
        pool = EnginePool(
            m.engines.handles, _nobody, m.engines.sender, restarts=0, start_deadline=1.0, report=_silent
        )
        fresh = replace(m, engines=pool, verifiers=await self._verifiers(config, judge))
        return await fresh.reset(config, config.model.path, objective, total_updates=updates)

    async def engine(self) -> Any:
        """The shared engine alone, serving the random model."""
        config, _ = compose.load_config([*ROOM, f"model.path={self.model}"])
        m = await self.actors(config, build_objective(config.objective), dataset.judge_spec(config))
        return m.engines.handles[0]

    async def drive(self, folder: Path, *overrides: str) -> list[dict[str, Any]]:
        """The metrics of a run of every step, in this process, as `entroray train` drives it."""
        config, _ = compose.load_config([*overrides, f"run.dir={folder}"])
        parts, data = build_parts(config), dataset.load_dataset(config, config.model.path)
        updates = config.run.steps * config.learner.updates_per_rollout
        m = await self.actors(config, parts.objective, data.judge, updates)
        folder.mkdir(parents=True, exist_ok=True)
        journal, _, health = train.open_journal(config, parts, folder, data.tokenizer, io.StringIO())
        try:
            await train.drive(config, parts, data, m, journal, health, RunDirectory(folder))
        finally:
            journal.close()
            for number in (signal.SIGINT, signal.SIGTERM):
                self.loop.remove_signal_handler(number)
        return metrics(folder)

    def end(self) -> None:
        """Every actor dies; Ray ends with the session."""
        if self._machine is not None:
            self.wait(self._machine.end())
        cluster.kill_actors([h for gang in self.gangs.values() for h in gang.handles])
        cluster.kill_actors([h for pool in self.judges.values() for h in pool.handles])
        self.loop.close()


def _nobody() -> None:
    raise AssertionError("the shared engine is not replaced: a test that kills one has its own")


def _silent(kind: str, **fields: Any) -> None:
    """Nobody reads what a pool reports here."""
