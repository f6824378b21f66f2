"""`entroray train`: configuration -> machines -> driver -> model, journal and report."""

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from omegaconf import OmegaConf

from entroray.binding import function_name
from entroray.cli import flags, judge_trial
from entroray.cli.flags import CONFIG_DIR, Flag
from entroray.config import Config, Evaluate
from entroray.errors import ConfigError, InfrastructureError, Stopped
from entroray.evaluation.evaluate import heldout_accuracy
from entroray.observe.console import Console, summary
from entroray.observe.health_tracker import HealthTracker, health_lines, moved_settings
from entroray.observe.journal import Journal, read_metrics
from entroray.observe.trackers import TrackedRun
from entroray.policy.tokenizer import fingerprint
from entroray.roles import Generator, Verifier
from entroray.train.driver import Driver, Roles
from entroray.train.failure_limits import Stagnation
from entroray.types import Draw
from entroray.wiring import (
    actors,
    compose,
    controllers,
    dataset,
    memory,
    preflight,
    rollout_plan,
    run_directory,
    sampler,
    selection,
    tool,
    warm_start,
)
from entroray.wiring.driver import build_driver, loop_settings
from entroray.wiring.objective import advised_settings, check_objective, remark_lines
from entroray.wiring.parts import Parts, build_parts
from entroray.workers import cluster

FLAGS = (Flag("cfg", "job", short="-c"), CONFIG_DIR, Flag("multirun", short="-m"))


def main(arguments: list[str]) -> int:
    """`train [--cfg job] [--multirun] [--config-dir FOLDER] overrides`."""
    given, overrides = flags.parse_flags("train", arguments, FLAGS)
    config_dir = given.get("config-dir")
    if "multirun" in given:
        return _multirun(overrides, config_dir, show="cfg" in given)
    config, tree = compose.load_config(overrides, config_dir)
    if "cfg" in given:
        print(OmegaConf.to_yaml(tree, resolve=True), end="")
        return 0
    parts = build_parts(config)
    check_objective(config, parts)
    if config.run.dry:
        print(_dry(config, parts))
        return 0
    take_signals()
    preflight.refuse_wrong(config)
    missing = warm_start.is_missing(config)
    read_in = dataset.read_dataset(config, warm_start.run_tokenizer(config))
    if judge_trial.is_own(read_in):
        print("\n".join(judge_trial.try_judges(config, read_in)), flush=True)
    facts = warm_start.ensure_model(config, overrides, config_dir)
    model = warm_start.resolve_model(config)
    read_in = dataset.load_dataset(config, model) if missing else read_in
    facts |= {"seed": config.seed, "model": model, "tokenizer": fingerprint(read_in.tokenizer)}
    run = run_directory.open_run(config.run, tree)
    asyncio.run(_train(config, parts, read_in, run, facts, OmegaConf.to_yaml(tree, resolve=True)))
    return 0


def _multirun(overrides: list[str], config_dir: str | None, *, show: bool) -> int:
    """Every combination, one after the other, each in a process of its own; the first failure's code."""
    if show:
        raise ConfigError("--cfg job prints the settings of one run: leave out --multirun, or --cfg job")
    extra = [f"--config-dir={config_dir}"] if config_dir else []
    worst = 0
    for number, combination in enumerate(compose.expand_sweep(overrides)):
        print(f"--- run {number}: {' '.join(combination)}", flush=True)
        command = [sys.executable, "-m", "entroray", "train", *combination, *extra]
        done = subprocess.run(command, check=False)  # deadline: its own driver.stall and call_deadline
        worst = worst or done.returncode
    return worst


def _dry(config: Config, parts: Parts) -> str:
    """What would run: the equation, each role's share, memory by role."""
    lines = [parts.objective.describe(), *remark_lines(config, parts), ""]
    described = dataset.describe_tasks(config.data, config.model.system, config.reward)
    lines += [f"prompts: {line}" for line in described]
    lines += [f"tool: {tool.describe_tool(config.rollout)}"] if tool.uses_tool(config.rollout.tool) else []
    lines += [f"control: {line}" for line in controllers.describe_controllers(parts, config.driver.max_lag)]
    for role, (count, share) in actors.resource_shares(config).items():
        lines.append(f"{role}: {count} x {share.cpus:g} CPU, {share.gpus:g} GPU, {share.threads} threads")
    return "\n".join([*lines, *memory.memory_lines(config, parts.objective)])


def _terminated(number: int, _: Any) -> None:
    """While no driver can be stopped, SIGTERM is an exception like Ctrl-C: what was started is ended."""
    raise Stopped(number, "ended by SIGTERM outside of training")


async def _train(
    config: Config,
    parts: Parts,
    read_in: dataset.Dataset,
    run: run_directory.RunDirectory,
    facts: dict[str, Any],
    settings: str,
) -> None:
    began, folder, model = time.monotonic(), run.folder, facts["model"]
    facts |= {"resources": actors.join_cluster(config)}
    trained = time.monotonic()
    try:
        first = run.state.get("version", 0) + 1
        journal, console, health = open_journal(config, parts, folder, read_in.tokenizer, first_step=first)
        probe = dataset.probe_ids(read_in.tokenizer)
        updates = config.run.steps * config.learner.updates_per_rollout
        m = await actors.start_actors(
            config,
            model,
            parts,
            read_in.judge,
            probe,
            total_updates=updates,
            resume=run.resume,
            report=journal.event,
        )
        journal.cut(first - 1)  # all of it where a run without a checkpoint is started over
        facts |= m.facts | {"start_seconds": round(time.monotonic() - began, 1)}
        run_directory.write_manifest(folder, settings, facts)
        console.header("entroray", _header(config, parts, read_in, folder, facts))
        trained = time.monotonic()
        await drive(config, parts, read_in, m, journal, health, run)
        journal.event("trained", seconds=round(time.monotonic() - trained, 1), steps=config.run.steps)
        await m.export(str(folder / "model"))
        read_in.tokenizer.save_pretrained(folder / "model")
        await m.stop()
        journal.close()
    except InfrastructureError as error:
        raise type(error)(f"{error}. Log: {folder}/events.jsonl") from error
    finally:
        cluster.stop()
    _finish(config, parts, folder, model, time.monotonic() - trained)


def open_journal(
    config: Config,
    parts: Parts,
    folder: Path,
    tokenizer: Any,
    file: TextIO | None = None,
    first_step: int = 1,
) -> tuple[Journal, Console, HealthTracker]:
    """The journal of a run in `folder`, its console (the terminal, or `file`) and what tracks its health.

    What trackers hold of `first_step` and beyond, from before a resumption, is hidden.
    """
    console = Console(file=file)
    words = {i: tokenizer.decode([i]) for i in range(len(tokenizer))}
    every = config.observe.tokens.every
    journal = Journal(folder, tokens_every=every, trackers=[console], vocabulary=words)
    run = TrackedRun(folder, config.run.name, asdict(config), first_step)
    for open_tracker in parts.trackers:
        try:
            journal.trackers.append(open_tracker(run))
        except (Exception, SystemExit) as error:  # boundary: a copy of the metrics must not end the run
            name = function_name(open_tracker)
            journal.event("tracker_lost", tracker=name, step=first_step - 1, reason=repr(error))
            console.say(f"observe.trackers: {name} cannot be opened: {error!r}; the run goes on without")
    history = read_metrics(folder / "metrics.jsonl")
    health = HealthTracker(journal.event, console.say, history, advised_settings(config, parts.controllers))
    journal.trackers.append(health)
    return journal, console, health


def _header(
    config: Config, parts: Parts, read_in: dataset.Dataset, folder: Path, facts: dict[str, Any]
) -> list[str]:
    r, s, split, lag = config.rollout, config.sampler, read_in.split, config.driver.max_lag
    stops = [repr(x) for x in (read_in.tokenizer.eos_token, *tool.stop_strings(s.stop, r.tool))]
    called = [f"tool       {tool.describe_tool(r)}"] if tool.uses_tool(r.tool) else []
    prompts = dataset.describe_tasks(config.data, config.model.system, config.reward)
    updates = _updates(config.learner.updates_per_rollout, parts)
    return [
        *parts.objective.describe().splitlines(),
        *remark_lines(config, parts),
        "",
        f"sampling   {r.groups_per_step} prompts x {r.group_size} rollouts a step, temperature "
        f"{s.temperature:g}, top-p {s.top_p:g}, at most {r.max_tokens} tokens, stop at {', '.join(stops)}",
        f"sampler    {sampler.describe_sampler(parts.rule, s.insert)}",
        f"groups     {rollout_plan.describe_plan(parts.plan)}",
        f"choice     {selection.describe_selection(r)}",
        *called,
        f"schedule   {config.run.steps} steps, {updates} updates a step, lag at most {lag} "
        f"({config.driver.stale})",
        *(f"control    {line}" for line in controllers.describe_controllers(parts, lag)),
        f"model      {facts['model']} ({facts['parameters'] / 1e6:.2f} M parameters, {config.model.dtype})",
        *(f"prompts    {line}" for line in prompts),
        f"data       {len(split.training)} training, {len(split.heldout)} held out; {read_in.dropped}",
        f"machine    {facts['resources']}; ready in {facts['start_seconds']:.0f} s, "
        f"probe error {facts['sync/probe_error']:.1e} nats",
        f"run        {folder}",
    ]


def _updates(own: int, parts: Parts) -> str:
    fewest, most = controllers.updates_range(own, parts.controllers)
    return f"{fewest}" if fewest == most else f"{fewest} to {most}"


async def drive(
    config: Config,
    parts: Parts,
    read_in: dataset.Dataset,
    m: actors.Actors,
    journal: Journal,
    health: HealthTracker,
    run: run_directory.RunDirectory,
) -> None:
    """Every step of a run, from its beginning or its checkpoint; a signal saves one and raises Stopped."""
    verifier = m.verifier_role()
    generator = tool.with_tool(config.rollout, read_in.tokenizer, m.generator_role(), verifier, journal.event)
    roles = Roles(
        generator,
        verifier,
        m.learner_role(),
        m.sync,
        journal,
        evaluate=_evaluation(
            config.evaluate,
            sampler.plain_draw(config.sampler, config.rollout),
            read_in,
            generator,
            verifier,
        ),
        waits=cluster.WAITS.lines,
    )
    journal.event("start", objective=config.objective, pace=asdict(loop_settings(config)), state=run.state)
    draw = sampler.training_draw(config.sampler, config.rollout, parts, read_in.tokenizer)
    driver = build_driver(config, parts, read_in, roles, draw)
    described = controllers.describe_controllers(parts, config.driver.max_lag)
    journal.event("control", controllers=described)
    if run.checkpoint:
        driver.restore(run.state)
        health.restore(run.state["health"])
    saves = m.checkpoints(run.folder)
    stagnation = Stagnation(config.learner.reset_after, **run.state.get("stagnation", {}))

    async def save(accuracy: float | None = None) -> Path:
        stagnated = {"best": stagnation.best, "since": stagnation.since}
        state = {**driver.committed, "stagnation": stagnated, "health": health.state()}
        return await saves.save(driver.version, state, accuracy)

    async def after(step: int, metrics: Mapping[str, float]) -> None:
        if stagnation.observe(metrics.get("eval/greedy")):
            await m.anchor(str(run.folder / "anchors" / f"step-{step:06d}"))
            journal.event("reference_reset", step=step, best=stagnation.best)
        if config.checkpoint.every and step % config.checkpoint.every == 0:
            saved = await save(metrics.get("eval/greedy"))
            journal.event("checkpoint", step=step, folder=str(saved))

    caught = _stop_on_signals(driver)
    await driver.train(config.run.steps, after)
    if caught:
        saved = await save()
        journal.event("stopped", signal=caught[0], step=driver.version, folder=str(saved))
        raise Stopped(
            caught[0],
            f"stopped by {signal.Signals(caught[0]).name} after step {driver.version}, saved in {saved}. "
            f"Go on with the same command and run.resume=auto run.dir={run.folder}",
        )


def _evaluation(
    e: Evaluate, draw: Draw, read_in: dataset.Dataset, generator: Generator, verifier: Verifier
) -> Callable[[int], Awaitable[dict[str, float]]]:
    """Held-out accuracy on the training engines, every `evaluate.every` steps."""
    prompts = read_in.split.heldout[: e.prompts]

    async def evaluate(step: int) -> dict[str, float]:
        if not e.every or step % e.every:
            return {}
        found = await heldout_accuracy(generator, verifier, prompts, draw, e.samples)
        return {f"eval/{name}": value for name, value in found.items()}

    return evaluate


def take_signals() -> None:
    """SIGTERM is an exception like Ctrl-C."""
    signal.signal(signal.SIGTERM, _terminated)


def _stop_on_signals(driver: Driver) -> list[int]:
    """Ctrl-C and SIGTERM ask the driver to stop, once; a second one ends the process as it always did."""
    caught: list[int] = []
    loop = asyncio.get_running_loop()

    def stop(number: int) -> None:
        caught.append(number)
        print(f"\n{signal.Signals(number).name}: saving a checkpoint", file=sys.stderr, flush=True)
        for each in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(each)
        driver.stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop, number)
    return caught


def _finish(config: Config, parts: Parts, folder: Path, model: str, seconds: float) -> None:
    take_signals()  # the event loop took them with it
    metrics = read_metrics(folder / "metrics.jsonl")
    words = [
        *health_lines(metrics, advised_settings(config, parts.controllers)),
        *moved_settings(parts.controllers, metrics),
    ]
    print("\n".join([summary(metrics), "", *words]))
    print(f"\n{metrics[-1]['step'] if metrics else 0} steps in {seconds:.0f} s")
    if config.evaluate.final:
        _compare(folder, model)
    if config.observe.report:
        from entroray.observe.report import write_report

        print(f"report     {write_report(folder)}")
    print(f"model      {folder / 'model'}\nrun        {folder}", flush=True)


def _compare(folder: Path, model: str) -> None:
    """Held-out accuracy of the first and the last weights, each read from its folder by a new process."""
    for name, path in (("before", model), ("after", str(folder / "model"))):
        out = folder / f"eval-{name}.json"
        command = [sys.executable, "-m", "entroray", "eval", f"--config={folder}/config.yaml"]
        command += [f"--out={out}", f"model.path={path}"]
        done = subprocess.run(command, check=False, timeout=1800, capture_output=True, text=True)
        if done.returncode:
            raise InfrastructureError(f"the evaluation of {path} ended with {done.stderr[-800:]}")
        e = json.loads(out.read_text())
        best = f"pass@{e['samples']}"
        print(
            f"{name:10s} held-out greedy accuracy {e['greedy']:.3f}, sampled {e['pass@1']:.3f}, "
            f"{best} {e[best]:.3f} ({e['prompts']} prompts)"
        )
