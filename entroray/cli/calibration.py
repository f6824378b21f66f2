"""Short measurements of this machine's engines, learner, verifiers and driver, for `entroray plan`."""

import asyncio
import io
import os
import signal
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

from entroray.cli import train
from entroray.config import Config, Evaluate
from entroray.observe.journal import read_metrics
from entroray.planning.rates import Step, Wave, on_shared_cores, rates
from entroray.planning.simulate import Rates, Shape
from entroray.seeds import seeds
from entroray.types import Rollout
from entroray.wiring import actors, dataset, sampler
from entroray.wiring.parts import Parts
from entroray.wiring.run_directory import RunDirectory
from entroray.workers import cluster

SEATS = 256
"""vLLM's own `max_num_seqs` where nothing is set."""


def shape_of(config: Config) -> Shape:
    """What there is of each role, and what a step is made of."""
    r, n = config.rollout, config.learner
    return Shape(
        engines=config.generator.replicas,
        seats=int(config.generator.engine.get("max_num_seqs", SEATS)),
        ranks=n.ranks,
        updates=n.updates_per_rollout,
        groups=r.groups_per_step,
        group_size=r.group_size,
        max_lag=config.driver.max_lag,
        verifiers=config.verifier.replicas,
    )


@dataclass(frozen=True)
class Calibration:
    """Rates, and what the measurements after took over those before."""

    rates: Rates
    drift: float


@dataclass
class Bench:
    """Actors of a run that is none: their weights are thrown away."""

    config: Config
    parts: Parts
    read_in: dataset.Dataset
    model: str
    machine: actors.Actors
    lengths: list[int]

    async def calibrate(self, steps: int = 3) -> Calibration:
        """Waves and steps at lag 0, steps at lag 1 where cores are shared, and the first again."""
        await self.wave(self.config.rollout.groups_per_step)  # what is compiled and cached comes first
        before = await self._alone(steps)
        shared = actors.cpu_only(self.config.cluster) and not self.config.cluster.address
        lagged = await self.steps(self._with(lag=1), steps + 3) if shared else []
        after = await self._alone(steps)
        waves, measured = before[0] + after[0], before[1] + after[1]
        prompt = fmean(len(p.token_ids) for p in self.read_in.split.training[:256])
        found = rates(waves, measured, self.lengths, prompt)
        if shared:
            used = fmean([before[2], after[2]]), fmean([before[3], after[3]])
            took, cores = median(s.seconds for s in lagged[2:]), len(os.sched_getaffinity(0))
            found = on_shared_cores(found, shape_of(self.config), cores, *used, took)
        took_each = [
            median(s.seconds for s in x[1] if s.shape == measured[-1].shape) for x in (before, after)
        ]
        return Calibration(found, took_each[1] / took_each[0])

    async def _alone(self, steps: int) -> tuple[list[Wave], list[Step], float, float]:
        """Waves and steps at lag 0, and the cores that an engine and a rank keep busy."""
        groups = self.config.rollout.groups_per_step
        sizes = sorted({1, max(1, groups // 4), groups})
        engines, learner = self.machine.engines.handles, self.machine.learner.handles
        spent, began = await _processor_seconds(engines), time.monotonic()
        waves = [await self.wave(size) for size in sizes]
        share = (await _processor_seconds(engines) - spent) / (time.monotonic() - began) / len(engines)
        few = await self.steps(self._with(groups=max(self._fewest(), groups // 4)), steps)
        spent = await _processor_seconds(learner)
        many = await self.steps(self._with(), steps)
        worked = sum(s.phases("score", "update", "rescore", "probe", "sync") for s in many)
        used = (await _processor_seconds(learner) - spent) / worked / len(learner)
        cores = len(os.sched_getaffinity(0))
        return waves, [*few[1:], *many[1:]], min(share, cores), min(used, cores)

    def _fewest(self) -> int:
        return self.config.learner.updates_per_rollout

    def _with(self, lag: int = 0, groups: int = 0) -> Config:
        c = self.config
        of = replace(c.rollout, groups_per_step=groups or c.rollout.groups_per_step)
        return replace(c, rollout=of, driver=replace(c.driver, max_lag=lag))

    async def wave(self, groups: int) -> Wave:
        """So many groups asked for at once."""
        c, prompts = self.config, self.read_in.split.training
        draw = sampler.training_draw(c.sampler, c.rollout, self.parts, self.read_in.tokenizer)
        generator, size = self.machine.generator_role(), c.rollout.group_size
        asked = [
            (prompts[i % len(prompts)], seeds(c.seed, len(self.lengths) + i, 0, size)) for i in range(groups)
        ]
        began = time.monotonic()
        answers = await asyncio.gather(*(generator.sample(p, s, draw) for p, s in asked))
        seconds = time.monotonic() - began
        drawn: list[Rollout] = [rollout for group in answers for rollout in group]
        lengths = [rollout.length for rollout in drawn]
        self.lengths += lengths
        engines = min(groups, len(self.machine.engines.handles))
        return Wave(seconds, max(lengths), sum(lengths) / engines, len(lengths) / engines)

    async def steps(self, config: Config, count: int) -> list[Step]:
        """`count` steps of a run of `config`, by the true driver."""
        config = replace(config, run=replace(config.run, steps=count, tokens=0), evaluate=Evaluate())
        config = replace(config, checkpoint=replace(config.checkpoint, every=0))
        updates = count * config.learner.updates_per_rollout
        self.machine = await self.machine.reset(
            config, self.model, self.parts.objective, total_updates=updates
        )
        with tempfile.TemporaryDirectory() as name:
            folder, quiet = Path(name), replace(self.parts, trackers=())
            journal, _, health = train.open_journal(
                config, quiet, folder, self.read_in.tokenizer, io.StringIO()
            )
            with journal:
                await train.drive(
                    config, quiet, self.read_in, self.machine, journal, health, RunDirectory(folder)
                )
            for number in (signal.SIGINT, signal.SIGTERM):
                asyncio.get_running_loop().remove_signal_handler(number)
            return [Step(shape_of(config), line) for line in read_metrics(folder / "metrics.jsonl")]


async def open_bench(config: Config, parts: Parts, read_in: dataset.Dataset, model: str) -> Bench:
    """Actors as `entroray train` starts them."""
    probe = dataset.probe_ids(read_in.tokenizer)
    machine = await actors.start_actors(config, model, parts, read_in.judge, probe, total_updates=1)
    return Bench(config, parts, read_in, model, machine, [])


async def _processor_seconds(handles: Sequence[Any]) -> float:
    """Processor time of these actors so far, all threads."""
    asked = [h.__ray_call__.remote(_process_time) for h in handles]
    return sum(
        [await cluster.settle(ref, deadline=60.0, what="an actor, asked for its time") for ref in asked]
    )


def _process_time(_: Any) -> float:
    return time.process_time()
