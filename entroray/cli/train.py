"""`entroray train`: configuration -> machines -> driver -> model, journal and report."""

import asyncio
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from omegaconf import OmegaConf

from entroray.binding import function_name
from entroray.cli import flags, judge_trial, multirun, signals
from entroray.cli.flags import CONFIG_DIR, Flag
from entroray.config import Config
from entroray.errors import ConfigError, EntrorayError, InfrastructureError, Stopped, writing
from entroray.evaluation.evaluate import heldout_accuracy, heldout_prompts
from entroray.evaluation.sets import measure_sets
from entroray.observe.console import Console, summary
from entroray.observe.health_tracker import HealthTracker, health_lines, moved_settings
from entroray.observe.journal import REMEDY, Journal, read_metrics
from entroray.observe.tracker_thread import TrackerThread
from entroray.observe.trackers import TrackedRun
from entroray.policy.tokenizer import end_ids, fingerprint, token_name
from entroray.roles import Generator, Verifier
from entroray.rollout.ledger import Evaluated, Ledger
from entroray.train.driver import Roles
from entroray.train.failure_limits import Stagnation
from entroray.train.trace import Trace, trace_path
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
from entroray.wiring.driver import build_driver, loop_settings, train_balanced
from entroray.wiring.objective import advised_settings, check_objective, remark_lines
from entroray.wiring.overrides import quote
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
    if said := run_directory.finished(config.run):
        print(said)
        return 0
    signals.take_sigterm()
    try:
        return _run(config, parts, tree, overrides, config_dir)
    finally:
        cluster.stop_forking()


def _run(config: Config, parts: Parts, tree: Any, overrides: list[str], config_dir: str | None) -> int:
    """Check, read, make the model if it is not there, train: so ordered that little is done in vain."""
    if not warm_start.is_missing(config):
        actors.prepare_engines(config)
    preflight.refuse_wrong(config)
    resumed = run_directory.resume_run(config.run, tree)
    read_in = dataset.read_dataset(config, warm_start.run_tokenizer(config))
    dataset.check_heldout(config, parts, read_in)
    if read_in.sets or judge_trial.is_own(read_in):
        print("\n".join(judge_trial.try_judges(config, read_in)), flush=True)
    lines = dataset.set_lines(config, read_in)
    facts = warm_start.ensure_model(config, overrides, config_dir)
    actors.prepare_engines(config)
    model = warm_start.resolve_model(config)
    read_in = replace(read_in, tokenizer=warm_start.run_tokenizer(config))  # as its files have it now
    facts |= {"seed": config.seed, "model": model, "tokenizer": fingerprint(read_in.tokenizer)}
    facts |= {"evaluation_sets": lines} if lines else {}
    if resumed:
        run_directory.check_same_data(resumed, dataset.identity(config, read_in))
    run = resumed or run_directory.new_run(config.run)
    settings = OmegaConf.to_yaml(tree, resolve=True)
    try:
        seconds = asyncio.run(_train(config, parts, read_in, run, facts, settings))
    except asyncio.CancelledError as error:
        raise Stopped(signal.SIGTERM, signals.OUTSIDE) from error
    _finish(config, parts, run.folder, model, seconds)
    return 0


def _multirun(overrides: list[str], config_dir: str | None, *, show: bool) -> int:
    if show:
        raise ConfigError("--cfg job prints the settings of one run: leave out --multirun, or --cfg job")
    return multirun.train_each(overrides, config_dir)


def _dry(config: Config, parts: Parts) -> str:
    """What would run: the equation, each role's share, memory by role."""
    lines = [parts.objective.describe(), *remark_lines(config, parts), ""]
    described = dataset.describe_tasks(config.data, config.model.system, config.reward)
    lines += [f"prompts: {line}" for line in described]
    lines += [f"evaluated: {name}: {each.task}" for name, each in config.evaluate.sets.items()]
    lines += [f"tool: {tool.describe_tool(config.rollout)}"] if tool.uses_tool(config.rollout.tool) else []
    lines += [f"control: {line}" for line in controllers.describe_controllers(parts, config.driver.max_lag)]
    for role, (count, share) in actors.resource_shares(config).items():
        lines.append(
            f"{role}: {count} x {share.cpus:g} CPU, {share.gpus:g} GPU, {share.threads or 'its own'} threads"
        )
    lines += [f"placed: {line}" for line in actors.placement_lines(config)]
    lines.append(f"deadlines: {preflight.deadlines(config)}")
    return "\n".join([*lines, *memory.memory_lines(config, parts.objective, memory.smallest_card())])


async def _train(
    config: Config,
    parts: Parts,
    read_in: dataset.Dataset,
    run: run_directory.RunDirectory,
    facts: dict[str, Any],
    settings: str,
) -> float:
    """Train and export; the seconds that it took. Journal and trackers are closed however it ends."""
    began, folder, model = time.monotonic(), run.folder, facts["model"]
    signals.cancel_on_sigterm()
    facts |= {"resources": actors.join_cluster(config)}
    try:
        memory.check_cluster(config, parts.objective)
        facts |= {"placed": actors.placement_lines(config)}
        print("\n".join(f"placed     {line}" for line in facts["placed"]), flush=True)
        first = run.state.get("version", 0) + 1
        journal, console, health = open_journal(config, parts, folder, read_in.tokenizer, first_step=first)
        cluster.WAITS.trace = Trace(trace_path(folder, first) if config.run.trace else None, journal.event)
        with journal, cluster.WAITS.trace:
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
            journal.check()
            console.header("entroray", _header(config, parts, read_in, folder, facts))
            trained = time.monotonic()
            await drive(config, parts, read_in, m, journal, health, run)
            signals.cancel_on_sigterm()
            journal.event("trained", seconds=round(time.monotonic() - trained, 1), steps=config.run.steps)
            await export_model(m, read_in.tokenizer, folder)
            await m.stop()
    except InfrastructureError as error:
        raise type(error)(f"{error}. Log: {folder}/events.jsonl") from error
    finally:
        cluster.stop()
    return time.monotonic() - trained


async def export_model(m: actors.Actors, tokenizer: Any, run: Path) -> None:
    """Weights and tokenizer in `run`/model, which appears when it is whole; else InfrastructureError."""
    final, partial = run / "model", run / ".model.part"
    with writing(final, REMEDY):
        try:
            shutil.rmtree(partial, ignore_errors=True)
            await m.export(str(partial))
            tokenizer.save_pretrained(partial)
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def open_journal(
    config: Config,
    parts: Parts,
    folder: Path,
    tokenizer: Any,
    file: TextIO | None = None,
    first_step: int = 1,
) -> tuple[Journal, Console, HealthTracker]:
    """The journal of a run in `folder`, its console (the terminal, or `file`) and what tracks its health.

    What trackers hold of `first_step` and beyond, from before a resumption, is outdated.
    """
    console = Console(file=file)
    words = {i: tokenizer.decode([i]) for i in range(len(tokenizer))}
    o = config.observe.tokens
    journal = Journal(folder, tokens_every=o.every, tokens_half=o.half, trackers=[console], vocabulary=words)
    history = read_metrics(folder / "metrics.jsonl")
    name = f"{config.run.name}/{folder.name}"
    run = TrackedRun(folder, name, asdict(config), first_step, history)
    health = HealthTracker(journal.event, console.say, history, advised_settings(config, parts.controllers))
    journal.trackers.append(health)
    journal.say, journal.summarize = console.say, health.summarize
    journal.copies += [TrackerThread(function_name(each), partial(each, run)) for each in parts.trackers]
    return journal, console, health


def _header(
    config: Config, parts: Parts, read_in: dataset.Dataset, folder: Path, facts: dict[str, Any]
) -> list[str]:
    r, s, split, lag = config.rollout, config.sampler, read_in.split, config.driver.max_lag
    ends = [token_name(read_in.tokenizer, i) for i in end_ids(read_in.tokenizer, facts["model"])]
    stops = ", ".join(map(repr, dict.fromkeys([*ends, *tool.stop_strings(s.stop, r.tool)]))) or "nothing"
    called = [f"tool       {tool.describe_tool(r)}"] if tool.uses_tool(r.tool) else []
    prompts = dataset.describe_tasks(config.data, config.model.system, config.reward)
    updates = _updates(config.learner.updates_per_rollout, parts)
    return [
        *parts.objective.describe().splitlines(),
        *remark_lines(config, parts),
        "",
        f"sampling   {r.groups_per_step} prompts x {r.group_size} rollouts a step, temperature "
        f"{s.temperature:g}, top-p {s.top_p:g}, at most {r.max_tokens} tokens, stop at {stops}",
        f"sampler    {sampler.describe_sampler(parts.rule, s.insert)}{sampler.describe_sets(config)}",
        f"groups     {rollout_plan.describe_plan(parts.plan)}",
        f"choice     {selection.describe_selection(r)}",
        *called,
        f"schedule   {config.run.steps} steps, {updates} updates a step, lag at most {lag} "
        f"({config.driver.stale})",
        *(f"control    {line}" for line in controllers.describe_controllers(parts, lag)),
        f"model      {facts['model']} ({facts['parameters'] / 1e6:.2f} M parameters, {config.model.dtype})",
        *(f"trained    {line}" for line in memory.lora_lines(config, facts.get("trained", 0))),
        *([f"rows       {facts['rows']}"] if facts.get("rows", "padded") != "padded" else []),
        *(["engine     vLLM's runner V2"] if facts.get("runner") == "V2" else []),
        *(f"prompts    {line}" for line in prompts),
        f"data       {len(split.training)} training, {len(split.heldout)} held out; {read_in.dropped}",
        *(f"evaluated  {line}" for line in facts.get("evaluation_sets", ())),
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
    verifier, ledger = m.verifier_role(), Ledger()
    generator = tool.with_tool(config.rollout, read_in.tokenizer, m.generator_role(), verifier, journal.event)
    evaluate = _evaluation(config, read_in, Evaluated(generator, ledger), verifier, health.say)
    watched: dict[str, Any] = {"waits": cluster.WAITS.lines, "busy": m.busy, "trace": cluster.WAITS.trace}
    watched |= {"evaluate": evaluate, "ledger": ledger}
    roles = Roles(generator, verifier, m.learner_role(), m.sync, journal, **watched)
    began = {"settings": asdict(config), "identity": dataset.identity(config, read_in)}
    state = {name: value for name, value in run.state.items() if name not in began}
    pace = asdict(loop_settings(config, read_in.sets))
    journal.event("start", objective=config.objective, pace=pace, state=state, changed=run.changed)
    draw = sampler.training_draw(config.sampler, config.rollout, parts, read_in.tokenizer)
    driver = build_driver(config, parts, read_in, roles, draw)
    journal.event("control", controllers=controllers.describe_controllers(parts, config.driver.max_lag))
    if run.checkpoint:
        driver.restore(run.state)
        health.restore(run.state["health"])
    saves = m.checkpoints(run.folder)
    stagnation = Stagnation(config.learner.reset_after, **run.state.get("stagnation", {}))

    async def save(accuracy: float | None = None) -> Path:
        stagnated = {"best": stagnation.best, "since": stagnation.since}
        moved = {**began, "stagnation": stagnated, "health": health.state()}
        state = await asyncio.to_thread(lambda: driver.committed | moved)
        return await saves.save(driver.version, state, accuracy)

    async def after(step: int, metrics: Mapping[str, float]) -> None:
        if stagnation.observe(metrics.get("eval/greedy")):
            kept = run.folder / "anchors" / f"step-{step:06d}"
            with writing(kept, REMEDY):
                await m.anchor(str(kept))
            journal.event("reference_reset", step=step, best=stagnation.best)
        if config.checkpoint.every and step % config.checkpoint.every == 0:
            saved = await save(metrics.get("eval/greedy"))
            journal.event("checkpoint", step=step, folder=str(saved))

    caught = signals.stop_on_signals(driver)
    await train_balanced(driver, config.run.steps, after, save, health.say)
    if caught:
        saved = await driver.within_stall(save())
        journal.event("stopped", signal=caught[0], step=driver.version, folder=str(saved))
        raise Stopped(
            caught[0],
            f"stopped by {signal.Signals(caught[0]).name} after step {driver.version}, saved in {saved}. "
            f"Go on with the same command and run.resume=auto run.dir={run.folder}",
        )


def _evaluation(
    config: Config,
    read_in: dataset.Dataset,
    generator: Generator,
    verifier: Verifier,
    say: Callable[[str], None],
) -> Callable[[int, bool], Awaitable[dict[str, float]]]:
    """On the training engines, every `evaluate.every` steps: held-out accuracy, and the evaluation sets.

    The sets also before the first step and after the last. PreflightError if nothing is held out, and there
    are no sets.
    """
    e, sets, draw = config.evaluate, read_in.sets, sampler.plain_draw(config.sampler, config.rollout)
    heldout = e.every and (read_in.split.heldout or not sets)
    asked = f"evaluate.every={e.every}"
    prompts = heldout_prompts(read_in.split.heldout, e.prompts, asked) if heldout else ()

    async def evaluate(step: int, last: bool) -> dict[str, float]:
        due, found = bool(e.every) and step % e.every == 0, dict[str, float]()
        if due and prompts:
            found |= await heldout_accuracy(generator, verifier, prompts, draw, e.samples)
        if due or last or step == 0:
            found |= await measure_sets(sets, generator, verifier, lambda line: say(f"step {step}: {line}"))
        return {f"eval/{name}": value for name, value in found.items()}

    return evaluate


def _finish(config: Config, parts: Parts, folder: Path, model: str, seconds: float) -> None:
    signals.take_sigterm()  # the event loop took its own with it
    metrics = read_metrics(folder / "metrics.jsonl")
    advised = advised_settings(config, parts.controllers)
    words = lambda: [*health_lines(metrics, advised), *moved_settings(parts.controllers, metrics)]
    print(_comment("summary", lambda: summary(metrics)) + "\n")
    print(_comment("health", lambda: "\n".join(words())))
    print(f"\n{metrics[-1]['step'] if metrics else 0} steps in {seconds:.0f} s")
    print(f"model      {folder / 'model'}\nrun        {folder}", flush=True)
    if config.observe.report:
        from entroray.observe.report import write_report

        print(_comment("report", lambda: f"report     {write_report(folder)}"), flush=True)
    if config.evaluate.final:
        _compare(folder, model)


def _comment(name: str, make: Callable[[], str]) -> str:
    """What `make` says of a run that is done, or why it says nothing."""
    try:
        return make()
    except EntrorayError:
        raise
    except Exception as error:  # boundary: the model is trained and exported, whatever is said about it
        return f"{name}: cannot be made: {error!r}"


def _compare(folder: Path, model: str) -> None:
    """Held-out accuracy of the first and the last weights, each read from its folder by a new process."""
    for name, path in (("before", model), ("after", str(folder / "model"))):
        out = folder / f"eval-{name}.json"
        command = [sys.executable, "-m", "entroray", "eval", f"--config={folder}/config.yaml"]
        command += [f"--out={out}", f"model.path={quote(path)}", "--heldout"]
        try:
            done = subprocess.run(command, check=False, timeout=1800, capture_output=True, text=True)
        except subprocess.TimeoutExpired as error:
            raise InfrastructureError(
                f"the evaluation of {path} took more than 1800 s: lower evaluate.prompts or evaluate.samples"
            ) from error
        if done.returncode:
            raise InfrastructureError(f"the evaluation of {path} ended with {done.stderr[-800:]}")
        e = json.loads(out.read_text())
        best = f"pass@{e['samples']}"
        print(
            f"{name:10s} held-out greedy accuracy {e['greedy']:.3f}, sampled {e['pass@1']:.3f}, "
            f"{best} {e[best]:.3f} ({e['prompts']} prompts)"
        )
