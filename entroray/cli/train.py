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

from omegaconf import DictConfig, OmegaConf

from entroray.cli import (
    bootstrap,
    calls,
    choices,
    driving,
    knobs,
    machine,
    material,
    memory,
    plans,
    preflight,
    rundir,
    sampling,
    settings,
)
from entroray.cli.objectives import advised, schedule, told
from entroray.config import Config
from entroray.errors import ConfigError, InfrastructureError, Stopped
from entroray.loop.driver import Driver, Roles
from entroray.loop.evaluate import heldout
from entroray.loop.limits import Stagnation
from entroray.objective import Objective, check_group_size, combinations
from entroray.objective import build as build_objective
from entroray.observe.console import Console, summary
from entroray.observe.journal import Journal, read
from entroray.observe.outlook import Outlook, last_word, moved
from entroray.policy.tokenizer import fingerprint
from entroray.workers import cluster


def main(arguments: list[str]) -> int:
    """`train [--cfg job] [--multirun] [--config-dir DIR] overrides`."""
    multirun = [a for a in arguments if a in ("-m", "--multirun")]
    rest = [a for a in arguments if a not in multirun]
    if multirun:
        return _multirun(rest)
    overrides, config_dir, show = _flags(rest)
    config, tree = settings.load(overrides, config_dir)
    if show:
        print(OmegaConf.to_yaml(tree, resolve=True), end="")
        return 0
    objective = objective_of(config)
    if config.run.dry:
        print(_dry(config, objective))
        return 0
    take_signals()
    preflight.refuse(config)
    facts = bootstrap.ensure(config, rest)
    asyncio.run(_train(config, tree, objective, rundir.open_run(config, tree), facts))
    return 0


def objective_of(config: Config) -> Objective:
    """The objective as configured; ConfigError where it cannot be trained with these settings."""
    objective = build_objective(config.objective, config.objective_packages)
    check_group_size(objective, config.rollout.group_size)
    combinations.refuse(objective, schedule(config))
    return objective


def _flags(arguments: list[str]) -> tuple[list[str], str | None, bool]:
    """(overrides, --config-dir, whether --cfg job was given); ConfigError for any other flag or value."""
    overrides, config_dir, show = [], None, False
    rest = iter(arguments)
    for argument in rest:
        flag, joined, value = argument.partition("=")
        if not flag.startswith("-"):
            overrides.append(argument)
            continue
        value = value if joined else next(rest, "")
        if flag in ("--cfg", "-c") and value == "job":
            show = True
        elif flag in ("--config-dir", "-cd") and value:
            config_dir = value
        else:
            raise ConfigError(
                f"train does not take {flag} {value}".rstrip() + ": it takes --cfg job, --config-dir FOLDER, "
                "--multirun, and settings as key=value"
            )
    return overrides, config_dir, show


def _multirun(arguments: list[str]) -> int:
    """Every combination, one after the other, each in a process of its own; the first failure's code."""
    overrides, config_dir, show = _flags(arguments)
    if show:
        raise ConfigError("--cfg job prints the settings of one run: leave out --multirun, or --cfg job")
    extra = ["--config-dir", config_dir] if config_dir else []
    worst = 0
    for number, combination in enumerate(settings.expand(overrides)):
        print(f"--- run {number}: {' '.join(combination)}", flush=True)
        command = [sys.executable, "-m", "entroray", "train", *combination, *extra]
        done = subprocess.run(command, check=False)  # deadline: its own driver.stall and call_deadline
        worst = worst or done.returncode
    return worst


def _dry(config: Config, objective: Objective) -> str:
    """What would run: the equation, each role's share, memory by role."""
    lines = [objective.describe(), *told(config, objective), ""]
    lines += [f"prompts: {line}" for line in material.told(config)]
    lines += [f"tool: {calls.describe(config)}"] if calls.asked(config) else []
    lines += [f"control: {c.describe()}" for c in knobs.control_of(config).controllers]
    for role, (count, share) in machine.shares(config).items():
        lines.append(f"{role}: {count} x {share.cpus:g} CPU, {share.gpus:g} GPU, {share.threads} threads")
    return "\n".join([*lines, *memory.lines(config, objective)])


def _terminated(number: int, _: Any) -> None:
    """While no driver can be stopped, SIGTERM is an exception like Ctrl-C: what was started is ended."""
    raise Stopped(number, "ended by SIGTERM outside of training")


async def _train(
    config: Config, tree: DictConfig, objective: Objective, run: rundir.RunDir, facts: dict[str, Any]
) -> None:
    began, folder = time.monotonic(), run.folder
    model = bootstrap.resolve(config)
    read_in = material.load(config, model)
    facts |= {"seed": config.seed, "model": model, "tokenizer": fingerprint(read_in.tokenizer)}
    facts |= {"resources": machine.join(config)}
    trained = time.monotonic()
    try:
        first = run.state.get("version", 0) + 1
        journal, console = open_journal(config, folder, read_in.tokenizer, first_step=first)
        probe = tuple(read_in.tokenizer.encode(config.driver.probe.text, add_special_tokens=False))
        updates = config.run.steps * config.learner.updates_per_rollout
        m = await machine.build(
            config,
            model,
            objective,
            read_in.judge,
            probe,
            total_updates=updates,
            resume=run.resume,
            report=journal.event,
        )
        journal.cut(first - 1)  # all of it where a run without a checkpoint is started over
        facts |= m.facts | {"start_seconds": round(time.monotonic() - began, 1)}
        rundir.describe(folder, tree, facts)
        console.header("entroray", _header(config, objective, read_in, folder, facts))
        trained = time.monotonic()
        await drive(config, objective, read_in, m, journal, run)
        journal.event("trained", seconds=round(time.monotonic() - trained, 1), steps=config.run.steps)
        await m.export(str(folder / "model"))
        read_in.tokenizer.save_pretrained(folder / "model")
        await m.stop()
        journal.close()
    except InfrastructureError as error:
        raise type(error)(f"{error}. Log: {folder}/events.jsonl") from error
    finally:
        cluster.stop()
    _finish(config, folder, model, time.monotonic() - trained)


def open_journal(
    config: Config, folder: Path, tokenizer: Any, file: TextIO | None = None, first_step: int = 1
) -> tuple[Journal, Console]:
    """The journal of a run in `folder`, and the console it reports to: the terminal, or `file`.

    What trackers hold of `first_step` and beyond, from before a resumption, is hidden.
    """
    console = Console(file=file)
    trackers: list[Any] = [console]
    if config.observe.tensorboard:
        from entroray.observe.trackers import TensorBoard

        trackers.append(TensorBoard(folder / "tensorboard", first_step=first_step))
    words = {i: tokenizer.decode([i]) for i in range(len(tokenizer))}
    every = config.observe.tokens.every
    journal = Journal(folder, tokens_every=every, trackers=trackers, vocabulary=words)
    journal.trackers.append(
        Outlook(journal.event, console.say, read(folder / "metrics.jsonl"), advised(config))
    )
    return journal, console


def _header(
    config: Config, objective: Objective, read_in: material.Material, folder: Path, facts: dict[str, Any]
) -> list[str]:
    r, s, split = config.rollout, config.sampler, read_in.split
    stops = [repr(x) for x in (read_in.tokenizer.eos_token, *calls.stops(config))]
    called = [f"tool       {calls.describe(config)}"] if calls.asked(config) else []
    return [
        *objective.describe().splitlines(),
        *told(config, objective),
        "",
        f"sampling   {r.groups_per_step} prompts x {r.group_size} rollouts a step, temperature "
        f"{s.temperature:g}, top-p {s.top_p:g}, at most {r.max_tokens} tokens, stop at {', '.join(stops)}",
        f"sampler    {sampling.describe(s)}",
        f"groups     {plans.describe(r)}",
        f"choice     {choices.describe(r)}",
        *called,
        f"schedule   {config.run.steps} steps, {config.learner.updates_per_rollout} updates a step, "
        f"lag at most {config.driver.max_lag} ({config.driver.stale})",
        *(f"control    {c.describe()}" for c in knobs.control_of(config).controllers),
        f"model      {facts['model']} ({facts['parameters'] / 1e6:.2f} M parameters, {config.model.dtype})",
        *(f"prompts    {line}" for line in material.told(config)),
        f"data       {len(split.training)} training, {len(split.heldout)} held out; {read_in.dropped}",
        f"machine    {facts['resources']}; ready in {facts['start_seconds']:.0f} s, "
        f"probe error {facts['sync/probe_error']:.1e} nats",
        f"run        {folder}",
    ]


async def drive(
    config: Config,
    objective: Objective,
    read_in: material.Material,
    m: machine.Machine,
    journal: Journal,
    run: rundir.RunDir,
) -> None:
    """Every step of a run, from its beginning or its checkpoint; a signal saves one and raises Stopped."""
    heat = sampling.heat(config)
    drawn = sampling.shaped(config, config.sampler.temperature, read_in.tokenizer)
    generator, verifier = m.generator_role(drawn, heat), m.verifier_role()
    roles = Roles(
        calls.conversing(config, read_in.tokenizer, generator, verifier, journal.event),
        verifier,
        m.learner_role(objective),
        m.sync,
        journal,
        evaluate=_evaluation(config, read_in, m),
        waits=cluster.WAITS.lines,
    )
    journal.event("start", objective=config.objective, pace=asdict(driving.pace(config)), state=run.state)
    driver = driving.driver(config, objective, read_in, roles, heat)
    journal.event("control", controllers=[c.describe() for c in driver.control.controllers])
    if run.checkpoint:
        driver.restore(run.state)
    outlook = _outlook(journal, run.state)
    saves = m.checkpoints(run.folder)
    stagnation = Stagnation(config.learner.reset_after, **run.state.get("stagnation", {}))

    async def save(accuracy: float | None = None) -> Path:
        told = {"best": stagnation.best, "since": stagnation.since}
        state = {**driver.committed, "stagnation": told, "outlook": outlook.state()}
        return await saves.save(driver.version, state, accuracy)

    async def after(step: int, metrics: Mapping[str, float]) -> None:
        if stagnation.note(metrics.get("eval/greedy")):
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


def _outlook(journal: Journal, state: Mapping[str, Any]) -> Outlook:
    """What reads the run into words, going on from a checkpoint's `state`."""
    found = next(t for t in journal.trackers if isinstance(t, Outlook))
    found.restore(state.get("outlook", {}))
    return found


def _evaluation(
    config: Config, read_in: material.Material, m: machine.Machine
) -> Callable[[int], Awaitable[dict[str, float]]]:
    """Held-out accuracy on the training engines, every `evaluate.every` steps."""
    e = config.evaluate
    prompts = read_in.split.heldout[: e.prompts]

    async def evaluate(step: int) -> dict[str, float]:
        if not e.every or step % e.every:
            return {}
        temperature, judge = config.sampler.temperature, m.verifier_role()
        drawn = lambda t: m.generator_role(sampling.plain(config, t))
        at = lambda t: calls.conversing(config, read_in.tokenizer, drawn(t), judge)
        found = await heldout(at, judge, prompts, temperature=temperature, samples=e.samples)
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


def _finish(config: Config, folder: Path, model: str, seconds: float) -> None:
    take_signals()  # the event loop took them with it
    metrics = read(folder / "metrics.jsonl")
    words = [last_word(metrics, advised(config)), *moved(knobs.control_of(config).controllers, metrics)]
    print("\n".join([summary(metrics), "", *words]))
    print(f"\n{metrics[-1]['step'] if metrics else 0} steps in {seconds:.0f} s")
    if config.evaluate.final:
        _compare(config, folder, model)
    if config.observe.report:
        from entroray.observe.report import write

        print(f"report     {write(folder)}")
    print(f"model      {folder / 'model'}\nrun        {folder}", flush=True)


def _compare(config: Config, folder: Path, model: str) -> None:
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
