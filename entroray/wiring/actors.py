"""Builds the machines a run needs, introduces them to each other, and takes them down."""

import asyncio
import os
import time
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from entroray.config import TINY, Cluster, Config, GeneratorConfig, share_cards
from entroray.engine.adapter import ADAPTER, adapter_options
from entroray.engine.cpu_engine import PRIORITY
from entroray.engine.generator import Generator
from entroray.engine.vllm_request import PROCESSOR, QUEUE
from entroray.errors import PreflightError
from entroray.objective import Objective
from entroray.planning.deadlines import CHECKPOINT, Deadlines, floor_deadlines
from entroray.planning.placement import ENGINES, RANKS, VERIFIERS
from entroray.policy.microbatches import plan_microbatches, plan_on_card, plan_packed
from entroray.policy.safetensors_header import model_folder, weight_files
from entroray.roles import Learner
from entroray.wiring import sampler
from entroray.wiring.parts import Parts
from entroray.workers import cluster, nodes
from entroray.workers.checkpoint import Checkpoints
from entroray.workers.cluster import Gang, Share
from entroray.workers.cores import BESIDE, SharingLearner, Threads, divide_cores
from entroray.workers.deepspeed_backend import DeepSpeedBackend
from entroray.workers.engine_pool import EnginePool
from entroray.workers.heartbeat import watch
from entroray.workers.learner_rank import LearnerRank, LearnerSettings
from entroray.workers.nodes import Places
from entroray.workers.roles import GeneratorRole, LearnerRole, VerifierRole, rest
from entroray.workers.sync import WeightSync
from entroray.workers.verifier import Verifier
from entroray.workers.verifier_pool import VerifierPool
from entroray.workers.weight_sender import WeightSender


def resource_shares(config: Config) -> dict[str, tuple[int, Share]]:
    """How many actors of each role, and what each asks of the cluster."""
    cores = len(os.sched_getaffinity(0))  # a job of a scheduler may use fewer than the machine has
    c, g, n = config.cluster, config.generator, config.learner
    gpus = c.gpus_per_generator * g.tensor_parallel
    beside = (BESIDE,) if core_shares(config) else ()
    engine, rank = (cores, cores) if cpu_only(c) else (None, max(1, cores // _actors_per_node(config)))
    return {
        ENGINES: (g.replicas, Share(c.cpus.generator, gpus, g.threads or engine)),
        RANKS: (n.ranks, Share(c.cpus.learner, c.gpus_per_learner, n.threads or rank, beside)),
        VERIFIERS: (verifier_count(config), Share(c.cpus.verifier, 0.0, 1)),
    }


def _actors_per_node(config: Config) -> int:
    """As many as a node has cards, which is 8 at most where this one has none."""
    g = config.generator
    return torch.cuda.device_count() or min(8, g.replicas * g.tensor_parallel + config.learner.ranks)


def core_shares(config: Config) -> tuple[Threads, Threads] | None:
    """Threads of an engine and of a rank; None where they never share cores: without a lag, or on GPUs."""
    g, n = config.generator, config.learner
    if not (config.driver.max_lag and cpu_only(config.cluster)):
        return None
    cores = len(os.sched_getaffinity(0))
    return divide_cores(cores, (g.replicas, g.threads), (n.ranks, n.threads))


def cpu_only(c: Cluster) -> bool:
    """Whether no role asks for a GPU."""
    return c.gpus_per_generator == 0 and c.gpus_per_learner == 0


def verifier_count(config: Config) -> int:
    """As many as are set; else one, or on GPUs one for each engine."""
    return config.verifier.replicas or (1 if cpu_only(config.cluster) else config.generator.replicas)


def placement_lines(config: Config) -> list[str]:
    """Who will run where: in the cluster that was joined, else here, or on as many nodes as hold the run."""
    asked, pairs = nodes.needs(resource_shares(config)), share_cards(config.cluster)
    return nodes.describe_places(asked, pairs=pairs, assume=not cpu_only(config.cluster))


def run_deadlines(config: Config, answered: int | None = None) -> Deadlines:
    """How long is waited at most in a run with these settings: as they say, else at the floor rates.

    `answered` are responses to the evaluation sets, once those are read; before, those that settings say.
    """
    r, d, e = config.rollout, config.driver, config.evaluate
    if answered is None:
        answered = sum((s.prompts or 0) * (s.samples or e.samples) for s in e.sets.values())
    folder = None if config.model.path == TINY else model_folder(config.model.path)
    floor = floor_deadlines(
        longest_response(config)[0],
        config.data.max_prompt,
        r.groups_per_step * (r.group_size + r.early.extra),
        bool(e.every) * e.prompts * (e.samples + 1) + answered,
        engines=config.generator.replicas,
        ranks=config.learner.ranks,
        weights=float(sum(file.stat().st_size for file in weight_files(folder))) if folder else 0.0,
    )
    told = r.deadline, d.call_deadline, d.call_deadline, d.stall, d.call_deadline
    return Deadlines(*(own or each for own, each in zip(told, floor, strict=True)))


def generator_role(engine: EnginePool | Generator, config: Config) -> GeneratorRole:
    """One engine or a pool, with how long a response is waited for; a deadline that is set is both."""
    return GeneratorRole(engine, run_deadlines(config).response, config.rollout.deadline or QUEUE)


@dataclass
class Actors:
    """Everything that runs: pools, the gang, and the driver's view of them."""

    config: Config
    engines: EnginePool
    learner: Gang
    verifiers: VerifierPool
    sync: WeightSync
    facts: dict[str, Any]
    places: Places = field(default_factory=lambda: Places({}))
    watch: asyncio.Task[None] | None = None  # of heartbeats

    @property
    def within(self) -> float:
        """Seconds for weights to be read, sent or written."""
        return run_deadlines(self.config).start

    def generator_role(self) -> GeneratorRole:
        return generator_role(self.engines, self.config)

    def verifier_role(self) -> VerifierRole:
        return VerifierRole(self.verifiers, run_deadlines(self.config).call)

    def learner_role(self) -> Learner:
        resting = self.engines if self.config.generator.sleep else None
        budget, deadline = self.config.learner.token_budget, run_deadlines(self.config).call
        padded = plan_on_card if self.config.cluster.gpus_per_learner else plan_microbatches
        plan = plan_packed if self.facts.get("packed") else padded
        learner = LearnerRole(self.learner, budget, deadline, resting, plan)
        shares = core_shares(self.config) if cluster.on_one_node() else None
        return SharingLearner(learner, self.engines, *shares) if shares else learner

    def busy(self) -> dict[str, float]:
        """Seconds at work of every actor there is, since it was first asked for anything."""
        ranks = map(self.learner.member, range(len(self.learner.handles)))
        names = [*(e.name for e in self.engines.live), *(v.name for v in self.verifiers.members), *ranks]
        now = time.monotonic()
        return {name: cluster.WAITS.busy.seconds(name, now) for name in names}

    def checkpoints(self, run: Path) -> Checkpoints:
        """Where this run's checkpoints go."""
        size, within = CHECKPOINT * self.facts.get("trained", 0), run_deadlines(self.config).checkpoint
        return Checkpoints(run / "checkpoints", self.learner, self.config.checkpoint.keep, within, size)

    async def export(self, folder: str) -> None:
        """The policy in Hugging Face format; the tokenizer is the caller's to add."""
        await self.learner.all(lambda rank, h: h.export.remote(folder), deadline=self.within)

    async def reset(
        self, config: Config, model: str, objective: Objective, *, total_updates: int
    ) -> "Actors":
        """These actors as `build` would have made them for `config`, which must be the same to `lasting`.

        Nothing of the last run is left: weights, optimizer, schedule, random state, requests, prefix caches.
        """
        within = run_deadlines(config).start
        await self.engines.drain(run_deadlines(self.config).step)
        if config.generator.sleep:
            await rest(self.engines, within)
        settings = learner_settings(config, model, total_updates)
        await self.learner.all(lambda rank, h: h.reset.remote(settings, objective), deadline=within)
        self.engines.sender.generator = sender_settings(config)
        self.engines.sender.disconnect()
        sync = replace(self.sync, engines=self.engines, driver=config.driver, deadline=within, compared=False)
        return replace(self, config=config, sync=sync, facts=self.facts | await sync(0))

    async def replace_learner(self, resume: tuple[Path, int] | None) -> None:
        """Other ranks in the place of those there are, at the first weights or at those of `resume`
        (checkpoint, step), which are served everywhere when this returns; nothing is under way then."""
        self.learner.respawn()
        await self.engines.begin_anew(run_deadlines(self.config).step)
        if self.config.generator.sleep:
            await rest(self.engines, self.within)
        await self.learner.start(self.within)
        await self.load(resume)
        self.sync.compared = False
        await self.sync(resume[1] if resume else 0)

    async def load(self, resume: tuple[Path, int] | None) -> None:
        """Have the ranks go on from a checkpoint, if there is one."""
        if resume:
            folder, deadline = str(resume[0]), run_deadlines(self.config).checkpoint
            await self.learner.all(lambda rank, h: h.load.remote(folder), deadline=deadline)

    async def anchor(self, folder: str) -> None:
        """The present weights, kept in `folder`, become the reference; optimizer and schedule begin anew."""
        await self.export(folder)
        await self.learner.all(lambda rank, h: h.anchor.remote(folder), deadline=self.within)
        self.engines.sender.disconnect()

    async def stop(self) -> None:
        """Ranks leave their process group in order; Ray ends the rest."""
        await self._close()
        await self.learner.all(lambda rank, h: h.stop.remote(), deadline=60.0)

    async def _close(self) -> None:
        if self.watch:
            self.watch.cancel()
        await asyncio.gather(self.engines.close(), self.verifiers.close())

    async def end(self) -> None:
        """Every actor dies at once, whatever it is doing, and its place is free for another machine."""
        await self._close()
        cluster.kill_actors([*self.engines.all_handles, *self.learner.handles, *self.verifiers.handles])
        self.places.release()


def learner_settings(config: Config, model: str, total_updates: int) -> LearnerSettings:
    """The sections of the configuration that a learner rank starts from."""
    stored = replace(config.model, path=model)
    return LearnerSettings(config.learner, stored, config.generator.transfer, config.seed, total_updates)


def longest_response(config: Config) -> tuple[int, str]:
    """Most tokens of a response, in training or of an evaluation set, and the setting that says so."""
    own = {f"evaluate.sets.{name}.max_tokens": s.max_tokens for name, s in config.evaluate.sets.items()}
    limits = [(config.rollout.max_tokens, "rollout.max_tokens"), *((n or 0, at) for at, n in own.items())]
    return max(limits, key=lambda limit: limit[0])


def sequence_length(config: Config) -> int:
    """Most tokens a prompt and its response may have together."""
    return config.data.max_prompt + longest_response(config)[0]


def engine_options(config: Config) -> dict[str, Any]:
    """vLLM's options: ours, then the user's `generator.engine` over them."""
    # A prompt in chunks rewinds its sampling seed, which vLLM cannot do on CPU ("does not use offset").
    longest = sequence_length(config)
    whole = {"enable_chunked_prefill": False, "max_num_batched_tokens": max(4096, longest)}
    small = {"enforce_eager": True, "kv_cache_memory_bytes": 256 << 20, "ir_op_priority": PRIORITY}
    cpu = small | whole if cpu_only(config.cluster) else {}
    alone = config.generator.transfer == ADAPTER
    ours = {
        "tensor_parallel_size": config.generator.tensor_parallel,
        **(
            adapter_options(config.learner.lora.rank)
            if alone
            else {"weight_transfer_config": {"backend": config.generator.transfer}}
        ),
        "disable_log_stats": True,
        **({"enable_sleep_mode": True} if config.generator.sleep else {}),
        **({"async_scheduling": True} if config.generator.overlap else {}),
    }
    return ours | cpu | config.generator.engine | _head(config)


def _head(config: Config) -> dict[str, Any]:
    """Logits in FP32 where weights are not: the learner scores with those, so they must be sampled from."""
    if config.model.dtype == "float32":
        return {}
    return {"hf_overrides": {"head_dtype": "float32", **config.generator.engine.get("hf_overrides", {})}}


def sender_settings(config: Config) -> GeneratorConfig:
    """`generator`, with what `keep_kv=null` means.

    On GPUs with a lag thousands of long samples are under way, and to read them all anew after each sync
    takes longer than a step. Their tokens know their versions, and `mismatch` measures the rest.
    """
    kept, g = bool(config.driver.max_lag) and not cpu_only(config.cluster), config.generator
    return replace(g, keep_kv=kept if g.keep_kv is None else g.keep_kv)


def logits_processors(config: Config, parts: Parts) -> dict[str, Any]:
    """vLLM's option for a run that shapes, notes or cuts what it draws; without it, vLLM tracks less.

    Evaluation sets have their entropies noted as they are drawn: the learner would read every answer again,
    and put engines to sleep that share its card.
    """
    if sampler.masks(config):
        return {"return_sampling_mask": True}
    sets = any(sampler.set_draw(config, each).notes for each in config.evaluate.sets.values())
    noted = sets or sampler.notes_entropy(parts, config.rollout.second) or sampler.truncates(config.sampler)
    return noting(config.generator.engine) if noted else {}


def noting(engine: Mapping[str, Any]) -> dict[str, Any]:
    """What an engine needs to shape or to measure: our processor first, then the user's own."""
    return {"logits_processors": [PROCESSOR, *sampler.own_processors(engine)]}


async def start_actors(
    config: Config,
    model: str,
    parts: Parts,
    judge: Mapping[str, Any],
    probe: tuple[int, ...],
    *,
    total_updates: int,
    resume: tuple[Path, int] | None = None,
    report: Callable[..., None] = lambda kind, **fields: None,
) -> Actors:
    """Start every actor, sync the weights, and compare log-probs on the probe before anything is trained.

    The weights are the model's as version 0, or with `resume` (checkpoint, step) those of that step.
    `report(kind, **fields)` is called for engines and verifiers lost and joined.
    """
    asked = resource_shares(config)
    places = nodes.find_places(asked, pairs=share_cards(config.cluster))
    at = {role: places.of(role) for role in asked}
    share = lambda role: replace(asked[role][1], at=next(at[role]))
    of_ranks = [share(RANKS) for _ in range(config.learner.ranks)]
    settings = learner_settings(config, model, total_updates)
    limit, within = max(sequence_length(config), len(probe) + 1), run_deadlines(config).start
    options = engine_options(config) | logits_processors(config, parts)
    v = config.verifier
    limits = {"slots": v.slots, "deadline": config.reward.deadline, "memory_mb": v.memory_mb}

    def generator() -> Any:
        sizes = {"dtype": config.model.dtype, "max_length": limit, "seed": config.seed, "engine": options}
        return cluster.spawn(Generator, share(ENGINES), model, **sizes)

    verifier = lambda: cluster.spawn(Verifier, share(VERIFIERS), judge, **limits)
    spawn = lambda i: cluster.spawn(LearnerRank, of_ranks[i], i, settings, parts.objective, DeepSpeedBackend)
    async with AsyncExitStack() as undo:  # nothing of a start that fails holds cards any more
        undo.callback(places.release)
        learner = Gang("learner", [spawn(i) for i in range(config.learner.ranks)], spawn)
        g, sender = config.generator, WeightSender(learner, sender_settings(config), within)
        pooled: dict[str, Any] = {"start_deadline": within, "report": report}
        first = [generator() for _ in range(g.replicas)]
        engines = EnginePool(first, generator, sender, restarts=g.restarts, **pooled)
        verifiers = VerifierPool(asked[VERIFIERS][0], verifier, **pooled)
        sync = WeightSync(learner, engines, probe, config.driver, within, config.model.dtype)
        every = lambda: [*engines.watched(), *verifiers.watched(), *learner.watched(report)]
        looks = asyncio.create_task(watch(every))
        made = Actors(config, engines, learner, verifiers, sync, {}, places, looks)
        undo.pop_all()
        undo.push_async_callback(made.end)
        facts = await _introduce(made, resume)
        undo.pop_all()
    return replace(made, facts=facts)


async def _introduce(made: Actors, resume: tuple[Path, int] | None) -> dict[str, Any]:
    """Gang together, engines ready, transfer open, the first version served and proved; facts of them."""
    config, engines, learner, within = made.config, made.engines, made.learner, made.within
    if config.generator.sleep:  # vLLM measures the card as it starts: nobody else may fill or leave it
        await engines.start()
        await rest(engines, within)  # nor may it fill the card while a rank is built on it
    starts: list[Any] = [
        *map(asyncio.create_task, (learner.start(within), engines.start(), made.verifiers.start()))
    ]
    try:
        facts, *_ = await asyncio.gather(*starts)
    finally:  # of a failure: nobody waits for the others, which are killed
        _ = [each.cancel() for each in starts]
    if others := [each for each in facts if each.get("packed") != facts[0].get("packed")]:
        raise PreflightError(  # they have one plan of micro-batches
            f"learner.pack=auto: rows lie {facts[0]['rows']} and {others[0]['rows']}: set learner.pack=never"
        )
    await made.load(resume)
    each = await engines.call_all(lambda h: h.describe.remote(), deadline=within, what="describing itself")
    read = {"vocabularies": {name: e["vocabulary"] for name, e in each.items()}}
    return facts[0] | next(iter(each.values()), {}) | read | await made.sync(resume[1] if resume else 0)


def prepare_engines(config: Config) -> None:
    """Have vLLM imported for engines on this machine's CPU, before anything else of the run starts; once."""
    if cpu_only(config.cluster) and not config.cluster.address and not cluster.FORKED:
        cluster.fork_engines(resource_shares(config)[ENGINES][1].threads)


def check_gpus(c: Cluster) -> None:
    """PreflightError when a role asks for GPUs and this machine, alone, has none."""
    if not cpu_only(c) and not c.address and not torch.cuda.is_available():
        raise PreflightError(
            "cluster asks for GPUs but torch sees none on this machine: use cluster=cpu, or give "
            "cluster.address of a Ray cluster that has them"
        )


def join_cluster(config: Config) -> str:
    """Start or join Ray and check that it is, or soon becomes, large enough; returns the arithmetic."""
    check_gpus(config.cluster)
    cluster.start(config.cluster.address, cpu_only=cpu_only(config.cluster))
    wait = min(nodes.JOINING, config.driver.call_deadline or nodes.JOINING)
    return check_cluster(config, wait if config.cluster.address else 0.0)


def check_cluster(config: Config, within: float = 0.0) -> str:
    """The arithmetic of a cluster that was joined; PreflightError if it holds not every actor."""
    return nodes.await_resources(resource_shares(config), within, pairs=share_cards(config.cluster))
