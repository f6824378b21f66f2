"""Short measurements of this machine's engines, learner, verifiers and driver, for `entroray plan`."""

import asyncio
import io
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from entroray.cli import signals, train
from entroray.config import Checkpoint, Config, Evaluate
from entroray.observe.journal import read_metrics
from entroray.planning.rates import LEARNER, Step, Wave, on_shared_cores, rates
from entroray.planning.simulate import Rates, Shape
from entroray.seeds import seeds
from entroray.wiring import actors, dataset, sampler
from entroray.wiring.parts import Parts
from entroray.wiring.run_directory import RunDirectory
from entroray.workers import cluster

SEATS = 256
"""vLLM's own `max_num_seqs` where nothing is set."""


def shape_of(config: Config) -> Shape:
    """What there is of each role, and what a step is made of."""
    r, n, g = config.rollout, config.learner, config.generator
    seats, lag = int(g.engine.get("max_num_seqs", SEATS)), config.driver.max_lag
    sizes = (n.ranks, n.updates_per_rollout, r.groups_per_step, r.group_size)
    return Shape(g.replicas, seats, *sizes, lag, actors.verifier_count(config))


@dataclass(frozen=True)
class Alone:
    """Measured while no two roles were at work; `*_cores` are those that an engine and a rank keep busy."""

    waves: list[Wave]
    steps: list[Step]
    engine_cores: float
    learner_cores: float


@dataclass
class Bench:
    """Actors of a run that is none: their weights are thrown away."""

    config: Config
    parts: Parts
    read_in: dataset.Dataset
    model: str
    machine: actors.Actors
    lengths: list[int] = field(default_factory=list)

    async def calibrate(self, steps: int = 3) -> tuple[Rates, float]:
        """Rates, with steps at lag 1 where cores are shared; and what steps after took of those before."""
        c, cores = self.config, len(os.sched_getaffinity(0))
        await self.wave(c.rollout.groups_per_step)  # what is compiled and cached comes first
        before = await self._alone(steps)
        shared = actors.cpu_only(c.cluster) and not c.cluster.address
        sizes = (self._few(), c.rollout.groups_per_step) if shared else ()
        lagged = [s for n in sizes for s in (await self.steps(_changed(c, 1, n), steps + 3))[2:]]
        after = await self._alone(steps)
        prompt = fmean(len(p.token_ids) for p in self.read_in.split.training[:SEATS])
        found = rates(before.waves + after.waves, before.steps + after.steps, self.lengths, prompt)
        if shared:
            used = [fmean([getattr(x, f"{r}_cores") for x in (before, after)]) for r in ("engine", "learner")]
            engine, learner = (min(cores, x) for x in used)
            found = on_shared_cores(found, shape_of(c), cores, engine, learner, lagged)
        return found, sum(s.seconds for s in after.steps) / sum(s.seconds for s in before.steps)

    async def _alone(self, steps: int) -> Alone:
        c, engines, ranks = self.config, self.machine.engines.handles, self.machine.learner.handles
        groups = c.rollout.groups_per_step
        spent, began = await _processor_seconds(engines), time.monotonic()
        waves = [await self.wave(size) for size in sorted({1, max(1, groups // 4), groups})]
        share = (await _processor_seconds(engines) - spent) / (time.monotonic() - began) / len(engines)
        few = await self.steps(_changed(c, 0, self._few()), steps)
        spent = await _processor_seconds(ranks)
        many = await self.steps(_changed(c, 0, groups), steps)
        worked = sum(s.phases("sync", *LEARNER) for s in many)
        used = (await _processor_seconds(ranks) - spent) / worked / len(ranks)
        return Alone(waves, [*few[1:], *many[1:]], share, used)

    def _few(self) -> int:
        """Groups of a smaller step."""
        return max(self.config.learner.updates_per_rollout, self.config.rollout.groups_per_step // 4)

    async def wave(self, groups: int) -> Wave:
        """So many groups asked for at once."""
        c, prompts, size = self.config, self.read_in.split.training, self.config.rollout.group_size
        draw = sampler.training_draw(c.sampler, c.rollout, self.parts, self.read_in.tokenizer)
        role, first = self.machine.generator_role(), len(self.lengths)
        asked = [(prompts[i % len(prompts)], seeds(c.seed, first + i, 0, size)) for i in range(groups)]
        began = time.monotonic()
        drawn = await asyncio.gather(*(role.sample(prompt, drawn, draw) for prompt, drawn in asked))
        seconds, lengths = time.monotonic() - began, [r.length for group in drawn for r in group]
        self.lengths += lengths
        engines = min(groups, len(self.machine.engines.handles))
        return Wave(seconds, max(lengths), sum(lengths) / engines, len(lengths) / engines)

    async def steps(self, config: Config, count: int) -> list[Step]:
        """`count` steps of a run of `config`, by the true driver."""
        run, checkpoint = replace(config.run, steps=count, tokens=0), Checkpoint(every_minutes=0.0)
        config = replace(config, run=run, checkpoint=checkpoint, evaluate=Evaluate())
        updates, parts = count * config.learner.updates_per_rollout, replace(self.parts, trackers=())
        self.machine = await self.machine.reset(config, self.model, parts.objective, total_updates=updates)
        with tempfile.TemporaryDirectory() as name:
            folder, words = Path(name), self.read_in.tokenizer
            journal, _, health = train.open_journal(config, parts, folder, words, io.StringIO())
            with journal:
                run_in = RunDirectory(folder)
                await train.drive(config, parts, self.read_in, self.machine, journal, health, run_in)
            signals.cancel_on_sigterm()
            return [Step(shape_of(config), line) for line in read_metrics(folder / "metrics.jsonl")]


def _changed(config: Config, lag: int, groups: int) -> Config:
    of = replace(config.rollout, groups_per_step=groups)
    return replace(config, rollout=of, driver=replace(config.driver, max_lag=lag))


async def open_bench(config: Config, parts: Parts, read_in: dataset.Dataset, model: str) -> Bench:
    """Actors as `entroray train` starts them where there is a lag, which also run without."""
    probe, lag = dataset.probe_ids(read_in.tokenizer), max(1, config.driver.max_lag)
    started = _changed(config, lag, config.rollout.groups_per_step)
    machine = await actors.start_actors(started, model, parts, read_in.judge, probe, total_updates=1)
    return Bench(config, parts, read_in, model, machine)


async def _processor_seconds(handles: Sequence[Any]) -> float:
    """Processor time of these actors so far, all threads."""
    asked = [h.__ray_call__.remote(_process_time) for h in handles]
    return sum(
        [await cluster.settle(ref, deadline=60.0, what="an actor, asked for its time") for ref in asked]
    )


def _process_time(_: Any) -> float:
    return time.process_time()
