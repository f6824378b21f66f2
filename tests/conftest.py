"""What `ray/` and `faults/` share: a local Ray, a tiny model, a cache of warm starts, a finished run."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.ray.stack import FinishedRun, Stack

TINY = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 128,
    "max_position_embeddings": 512,
}
FEATURES = (
    *("experiment=quickstart", "objective=grpo", "run.steps=6", "rollout.groups_per_step=8"),
    *("generator.replicas=1", "learner.threads=1", "learner.updates_per_rollout=2", "observe.tokens.every=1"),
    *("observe.diagnosis.every=2", "checkpoint.every=2", "++data.settings.size=3000"),
    "run.trace=true",
    *("evaluate.every=2", "evaluate.prompts=32", "evaluate.samples=2", "evaluate.final=false"),
    *("model.warm_start.band=[0.0,1.0]", "model.warm_start.check_every=40"),
    "evaluate.sets.sums={source: reasoning_gym, task: chain_sum, template: '{expression:compact}=', "
    "samples: 4, temperature: 0.7, top_p: 0.9, max_tokens: 40, "
    "settings: {size: 12, seed: 100000, min_terms: 2, max_terms: 3, min_digits: 1, max_digits: 1}}",
    "+control.high={knob: objective.surrogate.high, fn: band, signal: entropy/mean, at_least: 9, at_most: 9, "
    "step: 0.1, low: 0.2, high: 1}",
)
"""Of a run that evaluates prompts and a set, saves, diagnoses, keeps every token, moves a knob, is traced."""
SECRETS = {
    "HF_TOKEN": "hf_canary-0001",
    "WANDB_API_KEY": "canary-0002-wandb",
    "MY_SECRET": "canary-0003/+=",
    "DB_PASSWORD": "canary-0004",
    "AWS_SECRET_ACCESS_KEY": "canary-0005",
    "HF_ENDPOINT": "https://me:canary-0006@mirror.invalid/hf",
}
"""In the environment of a run; each has `canary` in it, and nothing else has."""


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where every process of all workers looks for a warm-started model before it makes one."""
    folder = tmp_path_factory.getbasetemp() / "cache"
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent.with_name("cache")
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ENTRORAY_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random two-layer model with a tied head, whose folder asks for greedy draws without repetition."""
    from entroray.policy.tiny_model import build_tiny_model

    folder = tmp_path_factory.mktemp("model")
    build_tiny_model(folder, TINY, seed=3)
    file, greedy = folder / "generation_config.json", {"do_sample": True, "temperature": 0.1, "top_k": 1}
    file.write_text(json.dumps(json.loads(file.read_text()) | greedy | {"repetition_penalty": 3.0}))
    return str(folder)


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    from entroray.workers import cluster

    cluster.start(None, cpu_only=True)
    yield
    cluster.stop()


@pytest.fixture(scope="session")
def stack(local_ray: None, model: str) -> "Iterator[Stack]":
    """Engine, ranks and verifiers for tests that leave them alive."""
    from tests.ray.stack import Stack

    shared = Stack(model)
    yield shared
    shared.end()


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[FinishedRun]":
    """A run of `FEATURES` in a process of its own, warm start included, for tests that only read.

    It has secrets in its environment, and runs on a machine whose name leads beyond loopback.
    """
    from tests.ray.processes import Watched, on_a_named_machine, printed_at_end, start
    from tests.ray.stack import FinishedRun

    folder = tmp_path_factory.mktemp("runs") / "finished"
    logs = tempfile.mkdtemp(prefix="entroray-")  # a short name: sockets lie in it
    command, told = ("train", *FEATURES, f"run.dir={folder}"), {**SECRETS, "RAY_TMPDIR": logs}
    process = start(*command, within=on_a_named_machine(), variables=told)
    watched = Watched(process)
    try:
        printed = printed_at_end(process, 0, 500.0)  # a busy machine is four times slower
        yield FinishedRun(folder, FEATURES, printed, frozenset(watched.found), Path(logs))
    finally:
        process.kill()
        shutil.rmtree(logs, ignore_errors=True)
