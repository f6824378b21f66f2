"""Part h: `entroray train` itself, engine and learner on one card by turns: python -m tests.gpu.part_h

The quickstart's warm-started model is in a piece, which pieces.sh makes; the models of 1.5B are
random, and a judge that such a model can please stands for the task's own.
"""

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from entroray.errors import ConfigError
from tests.gpu import record, shapes
from tests.gpu.record import ROOT, Asked, Check, NotThereError, Step, holds, measured, there

CACHE = ROOT / "tests/gpu/unpacked/cache"
WITHIN, DRY_WITHIN = 140.0, 220.0
"""Seconds of one training, which ends before the part does; on the CPU it runs beside all parts."""
GRAPHS = "generator.engine.compilation_config={mode: 0, cudagraph_mode: FULL_DECODE_ONLY}"
"""Without torch's compiler, which would take the minute that the run has."""
QUICK = (
    *("experiment=quickstart", "cluster=one_gpu", "generator.replicas=1", "run.steps=15"),
    *("checkpoint.every=10", "evaluate.final=false", "evaluate.every=15", "observe.tokens.every=5"),
    "+generator.engine.enforce_eager=true",
)
LARGE = (
    *("experiment=quickstart", "cluster=one_gpu", "generator.replicas=1", "objective=grpo", "run.steps=2"),
    *("evaluate.final=false", f"reward.path={ROOT}/tests/gpu/reward.py:parity", "learner.lr=1e-5"),
    *("rollout.groups_per_step=4", "rollout.max_tokens=2048", "learner.updates_per_rollout=1"),
    f"+{GRAPHS}",
)
SMALL = (
    *("experiment=quickstart", "generator.replicas=1", "objective=grpo", "run.steps=2"),
    *("evaluate.final=false", f"reward.path={ROOT}/tests/gpu/reward.py:parity", "learner.lr=1e-5"),
    *("rollout.groups_per_step=4", "rollout.group_size=4", "rollout.max_tokens=16", "checkpoint.every=2"),
    *("++data.settings.size=600", "learner.threads=1", "observe.tokens.every=1"),
)
"""On the CPU, in place of both."""
LORA = ("learner=lora",)
TOP_P = ("sampler.top_k=200", "sampler.top_p=0.95")
HELD: dict[str, Any] = {}


@cache
def folder(asked: Asked) -> Path:
    HELD["temporary"] = tempfile.TemporaryDirectory()
    return Path(HELD["temporary"].name)


@cache
def random_model(asked: Asked) -> str:
    size = "served" if asked.dry else "1.5B"
    made = shapes.served_folder(size, folder(asked) / "random", weights=True, device=asked.device)
    if asked.card:  # the run has the whole card
        import torch

        torch.cuda.empty_cache()
    return f"model.path={made}"


def run(label: str, overrides: Sequence[str], asked: Asked) -> Iterator[Check]:
    """One training to its end: what it journalled is finite, and all its files are there."""
    for package in ("ray", "hydra", "vllm", "deepspeed"):
        there(package)
    place = folder(asked) / label.replace(" ", "-")
    code, seconds, printed = _entroray("train", *overrides, f"run.dir={place}", asked=asked)
    why = "" if code == 0 else printed[-1500:]
    yield holds(f"{label}: ends in order", code == 0, why or "exit code 0", seconds=seconds, code=code)
    if code == 0:
        yield from journalled(label, place, overrides)


def _entroray(*words: str, asked: Asked) -> tuple[int, float, str]:
    """Exit code, seconds and output of a command that has a process group of its own."""
    environment = dict(os.environ)
    if CACHE.is_dir():
        environment["ENTRORAY_CACHE"] = str(CACHE)
    if asked.card:
        environment.pop("CUDA_VISIBLE_DEVICES", None)
    with open(folder(asked) / "printed", "w+") as out:
        began = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "entroray", *words],
            cwd=ROOT,
            env=environment,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        HELD["process"] = process
        try:
            code = process.wait(DRY_WITHIN if asked.dry else WITHIN)
        except subprocess.TimeoutExpired:
            code = -signal.SIGTERM
        _end(process)
        out.seek(0)
        return code, time.perf_counter() - began, out.read()


def _end(process: "subprocess.Popen[Any]") -> None:
    """In order where it still runs, and then by force, with all that it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            os.killpg(process.pid, number)
            try:
                process.wait(8)
            except subprocess.TimeoutExpired:
                continue


def journalled(label: str, place: Path, overrides: Sequence[str]) -> Iterator[Check]:
    """What a finished run left."""
    steps = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    asked = next(int(word.partition("=")[2]) for word in overrides if word.startswith("run.steps="))
    yield holds(f"{label}: steps", len(steps) == asked, f"{asked} of them", steps=len(steps))
    last = steps[-1]
    shown = ("reward/mean", "entropy/mean", "tokens/per_second", "mismatch/kl", *_seconds(last))
    numbers = {name.replace("/", " "): last[name] for name in shown if name in last}
    finite = all(math.isfinite(step["entropy/mean"]) for step in steps)
    yield holds(f"{label}: the last step", finite, "all entropies finite", **numbers)
    probes = [step["sync/probe_error"] for step in steps if "sync/probe_error" in step]
    yield measured(f"{label}: probe", seen=probes)
    made = {
        "report": (place / "report.html").is_file(),
        "records": any(place.glob("tokens/*")),
        "checkpoint": any(place.glob("checkpoints/*/")),
    }
    wanted = {**made, "checkpoint": made["checkpoint"] or not _saves(overrides)}
    yield holds(
        f"{label}: files", all(wanted.values()), "report, token records, a checkpoint if asked", **made
    )


def _seconds(step: dict[str, Any]) -> list[str]:
    return [name for name in step if name.startswith("seconds/")]


def _saves(overrides: Sequence[str]) -> bool:
    return any(word.startswith("checkpoint.every=") for word in overrides)


def quickstart(asked: Asked) -> Iterator[Check]:
    """The quickstart for 15 steps on the warm-started model of 0.8 M parameters."""
    if asked.dry:
        yield from run("tiny", (*SMALL, "cluster=cpu", random_model(asked), "learner.lr_high=true"), asked)
        return
    if not any(CACHE.glob("models/*/*.safetensors")):
        raise NotThereError(
            "tests/gpu/unpacked/cache has no warm-started model: tests/gpu/pieces.sh makes it"
        )
    yield from run("quickstart", QUICK, asked)


def large(label: str, more: Sequence[str], asked: Asked) -> Iterator[Check]:
    """Two steps of 1.5B with 2k tokens; with settings that this checkout may not have."""
    if asked.dry:
        yield record.not_here(label, "a model of 1.5B on a card")
        return
    overrides = (*LARGE, random_model(asked), *more)
    load_config, build_parts = (
        there("entroray.wiring.compose", "load_config"),
        there("entroray.wiring.parts", "build_parts"),
    )
    try:
        build_parts(load_config([*overrides])[0])
    except ConfigError as error:
        if not more:
            raise
        raise NotThereError(str(error)[:300]) from error
    yield from run(label, overrides, asked)


def leave() -> None:
    """Nothing that it started is left."""
    if process := HELD.get("process"):
        _end(process)
    if "temporary" in HELD:
        HELD["temporary"].cleanup()


STEPS: dict[str, Step] = {
    "quickstart": quickstart,
    "1.5B": partial(large, "1.5B", ()),
    "LoRA": partial(large, "1.5B, LoRA", LORA),
    "top-p": partial(large, "1.5B, top-p", TOP_P),
}

if __name__ == "__main__":
    try:
        record.main("h", "entroray train on one card", STEPS)
    finally:
        leave()
