"""The tiny model: built and warm-started on the task, cached by a hash of everything that made it."""

import asyncio
import fcntl
import hashlib
import itertools
import os
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from entroray import rows
from entroray.config import TINY, Config, Evaluate, Lora, Model, Part, WarmStartConfig, user_files
from entroray.data.demonstrations import NAMES, WorkedAnswer, find_demonstration
from entroray.data.text_rows import Row
from entroray.engine.adapter import ADAPTER
from entroray.errors import ConfigError, InfrastructureError, PreflightError
from entroray.home import home_folder
from entroray.objective import build_objective
from entroray.observe.console import Console
from entroray.policy.tokenizer import byte_tokenizer, load_tokenizer, with_template
from entroray.train.warm_start import demonstration_group, overshoot_remedy, sampled_accuracy, warm_start
from entroray.types import Group
from entroray.wiring import actors, compose, dataset, sampler, tool
from entroray.wiring.constraints import refuse_nobody
from entroray.wiring.parts import build_parts
from entroray.workers import cluster, orphans

FORMAT = 2
"""Raise when the recipe changes in a way its settings do not show."""
SEED = 0
"""Of first weights and order of answers."""
LEARNING_RATE = 2e-3
"""Of the supervised steps."""


def cached_folder(config: Config) -> Path:
    """Where the model of these settings lies, or would."""
    named = config.model.warm_start.cache or os.environ.get("ENTRORAY_CACHE")
    refuse_nobody("ENTRORAY_CACHE", named)
    root = Path(named).expanduser() if named else home_folder() / ".cache" / "entroray"
    recipe = asdict(config.model.warm_start) | {"cache": None}
    rendered = [config.data.template, config.sampler.temperature, config.rollout.max_tokens]
    data = {name: value for name, value in asdict(config.data).items() if name != "parts" or value}
    asked = [FORMAT, recipe, data, config.reward.judge or {}, rendered, *_besides(config)]
    content = compose.fingerprint(asked)
    key = hashlib.sha256(content.encode()).hexdigest()[:16]
    return root / "models" / f"{_name(config).replace('/', '-')}-{key}"


def is_missing(config: Config) -> bool:
    """Whether these settings start from the tiny model and the cache does not hold it yet."""
    return config.model.path == TINY and not cached_folder(config).is_dir()


def _name(config: Config) -> str:
    """Of the task, or of every part of the mixture."""
    return "-".join(config.data.parts) or config.data.task


def _besides(config: Config) -> list[dict[str, Any]]:
    """What else shapes prompts and responses, where it is set: what is not leaves the older names valid."""
    system = {"system": config.model.system} if config.model.system else {}
    r = config.rollout
    called = {"tool": asdict(r.tool), "turns": r.turns} if tool.uses_tool(config.rollout.tool) else {}
    found = system | called | _asked(config.model) | _trained(config) | _judged(config)
    return [found] if found else []


def _asked(m: Model) -> dict[str, Any]:
    """Text and variables of a chat template of the user's own."""
    template = {"chat_template": _content(m.template)} if m.template else {}
    return template | ({"template_args": m.template_args} if m.template_args else {})


def _content(path: str) -> str:
    """The text of a file; its path where there is none."""
    file = os.path.expanduser(path)
    return Path(file).read_text(encoding="utf-8", errors="replace") if os.path.isfile(file) else path


def _trained(config: Config) -> dict[str, Any]:
    """Settings of the run that the warm start shares, where they differ from their defaults."""
    usual = _shared(Config())
    return {name: value for name, value in _shared(config).items() if value != usual[name]}


def _shared(config: Config) -> dict[str, Any]:
    return {
        "dtype": config.model.dtype,
        "stop": list(config.sampler.stop),
        "betas": list(config.learner.betas),
        "weight_decay": config.learner.weight_decay,
        "deepspeed": dict(config.learner.deepspeed),
    }


def _judged(config: Config) -> dict[str, Any]:
    """What measures the band, where it is not `reward.judge` alone: parts, and texts of the user's files."""
    r, files = config.reward, user_files(config)
    files = {name: path for name, path in files.items() if name.startswith(("reward.", "data."))}
    texts = {"path" if name == "reward.path" else name: _function(path) for name, path in files.items()}
    return texts | ({"parts": r.parts, "correct": r.correct} if r.parts else {})


def _function(path: str) -> Any:
    """Name and text of `my_file.py:my_function`; the path where there is no file."""
    file, _, name = path.rpartition(":")
    return [name, _content(file)] if os.path.isfile(os.path.expanduser(file)) else path


def resolve_model(config: Config) -> str:
    """The model folder or hub id to start from; of the tiny model its place in the cache, made or not."""
    if config.model.path != TINY:
        folder = os.path.expanduser(config.model.path)
        return folder if os.path.isdir(folder) else config.model.path
    return str(cached_folder(config))


def run_tokenizer(config: Config) -> Any:
    """The tokenizer of the model of these settings, made or not."""
    template = config.model.template
    if is_missing(config):
        return with_template(byte_tokenizer(), template)
    return load_tokenizer(resolve_model(config), template)


async def make_model(config: Config, folder: Path) -> None:
    """Build, warm-start to the band or above, export to `folder`, which appears only when it is complete."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        how = os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW  # another user can lock what is only read
        lock = os.open(folder.parent / f".{folder.name}.lock", how, 0o644)
    except OSError as error:
        raise PreflightError(
            f"{folder.parent}, which is to keep the tiny model, cannot be written ({error.strerror}): set "
            "model.warm_start.cache or ENTRORAY_CACHE to a folder that can be written"
        ) from error
    async with _only_maker(folder, lock):
        if folder.is_dir():
            print(f"warm-started model, from the cache: {folder}", flush=True)
        else:
            await _make(config, folder)


async def _make(config: Config, folder: Path) -> None:
    from entroray.policy.tiny_model import build_tiny_model

    began, plan = time.monotonic(), config.model.warm_start
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        start, done = Path(scratch, "start"), Path(scratch, "done")
        parameters = build_tiny_model(start, plan.size, SEED)
        print(f"warm start of a {parameters / 1e6:.2f} M parameter model on {_name(config)}", flush=True)
        actors.join_cluster(config)
        try:
            reached, seconds = await _train(_supervised(config), str(start), done)
        finally:
            cluster.stop()
        for file in start.iterdir():
            if not Path(done, file.name).exists():
                shutil.copy(file, done)
        if not folder.is_dir():  # by another process, where files have no locks
            done.rename(folder)
    print(_ended(reached, time.monotonic() - began, seconds, plan))
    print(folder, flush=True)


@asynccontextmanager
async def _only_maker(folder: Path, lock: int) -> AsyncIterator[None]:
    """One process at a time makes `folder`; another waits until that one ends, however it ends."""
    try:
        for waited in itertools.count():
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not waited:
                    print(f"another process is making {folder}: waiting for it", flush=True)
                await asyncio.sleep(1)  # deadline: those of its maker, which the lock does not outlive
            except OSError as error:
                print(f"{folder}: {error.strerror}, so another process may make it too", flush=True)
                break
        yield
    finally:
        os.close(lock)


def _supervised(config: Config) -> Config:
    """The same machine with the warm start's own optimizer settings: one rank, one update a step."""
    learner = replace(
        config.learner,
        ranks=1,
        zero_stage=1,
        updates_per_rollout=1,
        lr=LEARNING_RATE,
        warmup_updates=20,
        reference=False,
        schedule="constant_with_warmup",
        max_grad_norm=1.0,
        lora=Lora(),
    )
    probe = replace(config.driver.probe, every=0)
    transfer = "plasma" if config.generator.transfer == ADAPTER else config.generator.transfer
    generator = replace(config.generator, replicas=1, transfer=transfer)
    driver = replace(config.driver, probe=probe)
    whole = replace(config.sampler, top_p=1.0, top_k=0)  # one model, however a run cuts its draws
    own = replace(config, learner=learner, driver=driver, generator=generator, sampler=whole, seed=SEED)
    return replace(own, evaluate=Evaluate())  # sets would have the engine note entropies


def _ended(reached: float, whole: float, steps: float, plan: WarmStartConfig) -> str:
    """What a warm start came to, in words: the accuracy, and the seconds of all of it and of its steps."""
    beyond = overshoot_remedy(reached, plan)
    said = f"sampled accuracy {reached:.2f} after {whole:.0f} s ({steps:.0f} s of steps)"
    return f"{said}, {beyond}" if beyond else said


async def _train(config: Config, start: str, done: Path) -> tuple[float, float]:
    plan, read = config.model.warm_start, dataset.load_dataset(config, start)
    objective = build_objective(rows.objective_row("supervised"))
    probe = dataset.probe_ids(read.tokenizer)
    parts = replace(build_parts(config), objective=objective)
    console = Console()
    with console.progress("model load", said=lambda: "; ".join(cluster.WAITS.lines(2))):
        m = await actors.start_actors(config, start, parts, read.judge, probe, total_updates=plan.max_steps)
    generator = tool.with_tool(config.rollout, read.tokenizer, m.generator_role(), m.verifier_role())
    draw = sampler.plain_draw(config.sampler, config.rollout)
    checks = read.split.training[: 2 * plan.rows_per_step]
    began = time.monotonic()
    with console.progress("warm start", plan.max_steps, said=f"until {plan.band[0]:g} are right") as move:
        reached = await warm_start(
            _demonstrations(config, read),
            m.learner_role(),
            m.sync,
            objective,
            lambda: sampled_accuracy(generator, m.verifier_role(), checks, draw, SEED),
            plan,
            partial(_report, move),
        )
    await m.export(str(done))
    await m.stop()
    return reached, time.monotonic() - began


def _demonstrations(config: Config, read: dataset.Dataset) -> Iterator[Group]:
    answers = {
        name: _answers(name, part) for name, part in dataset.tasks(config.data, config.model.system).items()
    }
    end, longest = read.tokenizer.eos_token_id, config.rollout.max_tokens
    for prompt in dataset.prompt_order(config.data, read.split.demonstrations, config.seed):
        ids, spans = tool.encode_answer(
            config.rollout.tool, read.tokenizer, answers[prompt.domain](prompt.entry)
        )
        yield demonstration_group(prompt, [*ids, end][:longest], spans)


def _answers(name: str, part: Part) -> Callable[[Row], str | WorkedAnswer]:
    if part.demonstration is None:
        key = f"data.parts.{name}.demonstration" if name else "data.demonstration"
        raise ConfigError(
            f"model.path={TINY} needs right answers to imitate and {key} is not set: "
            f"choose {', '.join(NAMES[:-1])} or {NAMES[-1]}, or give model.path a trained model"
        )
    return find_demonstration(part.demonstration)


def _report(move: Callable[..., None], step: int, loss: float, reached: float) -> None:
    move(completed=step)
    print(f"  step {step:4d}  loss {loss:.3f} nats/token  sampled accuracy {reached:.2f}", flush=True)


def ensure_model(config: Config, overrides: list[str], config_dir: str | None = None) -> dict[str, Any]:
    """Run the warm start in a process of its own when the cache lacks it; what it took, for the manifest."""
    import subprocess

    if not is_missing(config):
        return {}
    began = time.monotonic()
    extra = [f"--config-dir={config_dir}"] if config_dir else []
    command = [sys.executable, "-m", "entroray", "warm-start", *overrides, *extra]
    orphans.end_with_parent()  # else it outlives a driver that is killed
    try:
        done = subprocess.run(command, check=False, timeout=7200)
    except subprocess.TimeoutExpired as error:
        raise InfrastructureError(
            "the warm start took more than two hours: lower model.warm_start.max_steps, or give model.path a "
            "trained model"
        ) from error
    if done.returncode < 0:
        raise InfrastructureError(
            f"the warm start was killed by signal {-done.returncode}: if memory ran out, lower "
            "model.warm_start.rows_per_step or generator.engine.kv_cache_memory_bytes"
        )
    if done.returncode:
        raise SystemExit(done.returncode)
    return {"warm_start_seconds": round(time.monotonic() - began, 1)}
