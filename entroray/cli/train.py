"""`entroray train`: configuration -> machines -> driver -> model, journal and report."""

import asyncio
import shutil
import signal
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from entroray.cli import flags, judge_trial, multirun, signals
from entroray.cli.finish import finish_run
from entroray.cli.flags import CONFIG_DIR, Flag
from entroray.cli.journalling import open_journal, track_run
from entroray.cli.saving import Saving
from entroray.config import Config
from entroray.errors import ConfigError, InfrastructureError, LearnerLostError, Stopped, writing
from entroray.evaluation.evaluate import CountingVerifier, heldout_accuracy, heldout_prompts
from entroray.evaluation.sets import measure_sets
from entroray.observe.console import Console
from entroray.observe.health_tracker import HealthTracker
from entroray.observe.journal import REMEDY, Journal, no_progress
from entroray.policy.tokenizer import check_vocabularies, end_ids, fingerprint, token_name
from entroray.roles import Generator, Verifier
from entroray.rollout.ledger import DROPPED, ROLLED_BACK, UNITS, Evaluated, Ledger
from entroray.train.driver import Roles
from entroray.train.failure_limits import Stagnation
from entroray.train.threads import in_thread
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
from entroray.wiring.objective import check_objective, remark_lines
from entroray.wiring.parts import Parts, build_parts
from entroray.workers import checkpoint, cluster, heartbeat, nodes

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
    finish_run(config, parts, run.folder, model, seconds)
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
        with journal, cluster.WAITS.trace, nodes.object_store():
            probe = dataset.probe_ids(read_in.tokenizer)
            updates = config.run.steps * config.learner.updates_per_rollout
            start = actors.start_actors(
                config,
                model,
                parts,
                read_in.judge,
                probe,
                total_updates=updates,
                resume=run.resume,
                report=journal.report,
            )
            with console.progress("model load", said=lambda: "; ".join(cluster.WAITS.lines(2))):
                m = await start
            check_vocabularies(read_in.tokenizer, m.facts.pop("vocabularies"), model)
            journal.cut(first - 1)  # all of it where a run without a checkpoint is started over
            facts |= m.facts | {"start_seconds": round(time.monotonic() - began, 1)}
            run_directory.write_manifest(folder, settings, facts)
            journal.check()
            console.header("entroray", _header(config, parts, read_in, folder, facts))
            trained = time.monotonic()
            through = _drive_through(config, parts, read_in, m, journal, console, health, run)
            with console.progress("training", config.run.steps, first - 1) as console.training:
                await heartbeat.alongside(m.watch, through)
            await m.stop()
    except InfrastructureError as error:
        raise type(error)(f"{error}. Log: {folder}/events.jsonl") from error
    finally:
        cluster.stop()
    return time.monotonic() - trained


async def _drive_through(
    config: Config,
    parts: Parts,
    read_in: dataset.Dataset,
    m: actors.Actors,
    journal: Journal,
    console: Console,
    health: HealthTracker,
    run: run_directory.RunDirectory,
) -> None:
    """Every step and the export; where the learner is lost, from the last checkpoint on once more."""
    left, ledger, lost, began = config.learner.restarts, Ledger(), None, time.monotonic()
    while True:
        try:
            if lost:
                run = await _go_back(m, journal, run, ledger)
                health = track_run(config, parts, journal, console, run.state.get("version", 0) + 1, lost)
                lost = None
            await drive(config, parts, read_in, m, journal, health, run, ledger)
            signals.cancel_on_sigterm()
            journal.event("trained", seconds=round(time.monotonic() - began, 1), steps=config.run.steps)
            return await export_model(m, read_in.tokenizer, run.folder)
        except asyncio.CancelledError as error:
            if not lost:
                raise
            kept = checkpoint.committed(run.folder / "checkpoints")
            how = f"as the run went back to {kept[-1] if kept else 'its beginning'}"
            raise _stopped(signal.SIGTERM if error.args else signal.SIGINT, how, run.folder) from error
        except LearnerLostError as error:
            signals.cancel_on_sigterm()
            signals.cancel_on_sigint()
            journal.event("learner_lost", error=str(error), restarts_left=max(0, left - 1))
            if not left:
                raise LearnerLostError(
                    f"{error}; learner.restarts={config.learner.restarts} is used up: go on from the last "
                    f"checkpoint with the same command and run.resume=auto run.dir={run.folder}"
                ) from error
            lost, left = error, left - 1


async def _go_back(
    m: actors.Actors, journal: Journal, run: run_directory.RunDirectory, ledger: Ledger
) -> run_directory.RunDirectory:
    """The run at its last checkpoint, or its beginning; other ranks hold its weights, and engines serve them.

    `ledger` is of the whole run until now, and counts as rolled back what was issued since.
    """
    found, passed_over = await in_thread(lambda: checkpoint.newest(run.folder / "checkpoints"))
    if not found:
        run_directory.check_beginning(run.folder, passed_over)
    state = checkpoint.driver_state(found) if found else {}
    step, before = state.get("version", 0), ledger.of(DROPPED + ROLLED_BACK)
    ledger.restore(state["stream"]["ledger"] if found else Ledger().state())
    undone = zip(UNITS, (ledger.of(DROPPED + ROLLED_BACK) - before).tolist(), strict=True)
    journal.cut(step)
    attempt = m.engines.sender.attempt + 1
    told = {"step": step, "attempt": attempt, "checkpoint": str(found or "")}
    journal.event("rolled_back", **told, **{unit: n for unit, n in undone if unit != "prompts"})
    where = f"after step {step} from {found}" if found else "from step 0, for there is no checkpoint yet"
    journal.say(f"a rank of the learner is lost: all start anew, and the run goes on {where}")
    back = replace(run, checkpoint=found, state=state, changed={})
    await m.replace_learner(back.resume)
    return back


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
    ledger: Ledger | None = None,
) -> None:
    """Every step of a run, from its beginning or its checkpoint; a signal saves one and raises Stopped.

    `ledger` is that of the attempts before, whose learner was lost.
    """
    ledger = ledger or Ledger()
    verifier = m.verifier_role()
    generator = tool.with_tool(config.rollout, read_in.tokenizer, m.generator_role(), verifier, journal.event)
    counted = Evaluated(generator, ledger)
    evaluate = _evaluation(config, read_in, counted, verifier, health.say, journal.progress)
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
    stagnation = Stagnation(config.learner.reset_after, **run.state.get("stagnation", {}))

    def committed() -> Mapping[str, Any]:
        stagnated = {"best": stagnation.best, "since": stagnation.since}
        return driver.committed | {**began, "stagnation": stagnated, "health": health.state()}

    saving = Saving(config, m.checkpoints(run.folder), journal, committed)

    async def after(step: int, metrics: Mapping[str, float]) -> None:
        if stagnation.observe(metrics.get("eval/greedy")):
            kept = run.folder / "anchors" / f"step-{step:06d}"
            with writing(kept, REMEDY):
                await m.anchor(str(kept))
            journal.event("reference_reset", step=step, best=stagnation.best)
        if saving.due(step):
            await saving.save(step, metrics.get("eval/greedy"))

    caught = signals.stop_on_signals(driver)
    save = lambda: saving.save(driver.version)
    try:
        await train_balanced(driver, config.run.steps, after, save, health.say)
        if caught:
            saved = await driver.within_stall(saving.save(driver.version, kind="stopped", signal=caught[0]))
            raise _stopped(caught[0], f"after step {driver.version}, saved in {saved}", run.folder)
    except LearnerLostError as error:
        if caught:
            raise _stopped(caught[0], f"and not saved, for {error}", run.folder) from error
        raise


def _stopped(number: int, how: str, folder: Path) -> Stopped:
    going_on = f"Go on with the same command and run.resume=auto run.dir={folder}"
    return Stopped(number, f"stopped by {signal.Signals(number).name} {how}. {going_on}")


def _evaluation(
    config: Config,
    read_in: dataset.Dataset,
    generator: Generator,
    verifier: Verifier,
    say: Callable[[str], None],
    progress: Callable[..., Any] = no_progress,
) -> Callable[[int, bool], Awaitable[dict[str, float]]]:
    """On the training engines, every `evaluate.every` steps: held-out accuracy, and the evaluation sets.

    The sets also before the first step and after the last. PreflightError: nothing held out, and no sets.
    """
    e, sets, draw = config.evaluate, read_in.sets, sampler.plain_draw(config.sampler, config.rollout)
    heldout = e.every and (read_in.split.heldout or not sets)
    asked = f"evaluate.every={e.every}"
    prompts = heldout_prompts(read_in.split.heldout, e.prompts, asked) if heldout else ()

    async def evaluate(step: int, last: bool) -> dict[str, float]:
        due, found = bool(e.every) and step % e.every == 0, dict[str, float]()
        asked = sets if due or last or step == 0 else {}
        judged = 2 * len(prompts) * due + sum(len(one.prompts) for one in asked.values())
        if not judged:
            return {}
        with progress("evaluation", judged) as move:
            counted = CountingVerifier(verifier, lambda: move(advance=1))
            if due and prompts:
                found |= await heldout_accuracy(generator, counted, prompts, draw, e.samples)
            found |= await measure_sets(asked, generator, counted, lambda line: say(f"step {step}: {line}"))
        return {f"eval/{name}": value for name, value in found.items()}

    return evaluate
