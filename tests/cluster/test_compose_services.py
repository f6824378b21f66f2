"""docker/docker-compose.yml on a real engine: built, brought up with two workers, used twice, hurt."""

import os
import re
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.runs import JOB, steps, until

ROOT = Path(__file__).parents[2]
COMPOSE = ("docker", "compose", "-p", "entroray-test", "-f", "docker/docker-compose.yml")
RUNS = "/home/entroray/entroray-runs"
MODEL = "/home/entroray/.cache/entroray/model"
NODES = ("head-1", "worker-1", "worker-2")


def missing() -> str:
    if not shutil.which("docker"):
        return "no docker is installed here"
    for asked in (["docker", "info"], ["docker", "compose", "version"]):
        if subprocess.run(asked, capture_output=True, timeout=60).returncode:
            return f"`{' '.join(asked)}` fails here"
    return ""


pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module", autouse=True)
def here() -> None:
    if why := missing():
        pytest.skip(f"NOT TESTED: {why}; tests/cluster/up.sh makes one")


ENVIRONMENT = os.environ | {"RAY_AUTH_TOKEN": secrets.token_hex(32), "ENTRORAY_CPUS": "2"}


def told(*command: str, timeout: float = 1200) -> str:
    """What a command prints, which must end with 0."""
    done = subprocess.run(
        command, cwd=ROOT, env=ENVIRONMENT, text=True, stdout=-1, stderr=subprocess.STDOUT, timeout=timeout
    )
    assert done.returncode == 0, f"{' '.join(command)}: {done.stdout[-4000:]}"
    return done.stdout


def compose(*arguments: str) -> str:
    return told(*COMPOSE, *arguments)


def inside(node: str, *command: str) -> str:
    return told("docker", "exec", f"entroray-test-{node}", *command)


def nodes_there() -> int:
    done = subprocess.run(
        [*COMPOSE, "exec", "-T", "head", "ray", "status"],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    listed = re.search(r"Active:\n(.*)Pending:", done.stdout, re.DOTALL)
    return sum(map(int, re.findall(r"^ (\d+) ", listed.group(1), re.MULTILINE))) if listed else 0


@pytest.fixture(scope="module")
def cluster(here: None, model: Path) -> Iterator[None]:
    """A head and two workers, and a model where all three have it."""
    try:
        compose("up", "--build", "--scale", "worker=2", "-d", "head", "worker")
        told("docker", "cp", str(model), f"entroray-test-head-1:{MODEL}")
        told("docker", "exec", "--user", "0", "entroray-test-head-1", "chown", "-R", "1000", MODEL)
        until(lambda: nodes_there() == 3, 180, "three nodes")
        yield
    finally:
        subprocess.run([*COMPOSE, "down", "-v"], cwd=ROOT, env=ENVIRONMENT, timeout=200)


def submitted(*overrides: str) -> list[str]:
    return [*COMPOSE, "run", "--rm", "-T", "submit", *JOB, f"model.path={MODEL}", *overrides]


def journalled(run: str) -> list[int]:
    found = subprocess.run(
        ["docker", "exec", "entroray-test-head-1", "cat", f"{run}/metrics.jsonl"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    return steps(found.stdout)


def actors(node: str) -> set[str]:
    """Kinds of actors in a container."""
    listed = told("docker", "top", f"entroray-test-{node}", "-eo", "pid,args")
    return set(re.findall(r"ray::([A-Z]\w+)", listed))


def test_a_run_is_submitted_twice_in_a_row(cluster: None) -> None:
    folders = set()
    for _ in range(2):
        said = told(*submitted("run.steps=2", "generator.replicas=1"))
        assert "2 steps in" in said
        folders |= set(re.findall(rf"^run +({RUNS}/\S+)", said, re.MULTILINE))
    assert len(folders) == 2 and all(journalled(folder) == [1, 2] for folder in folders)


def test_a_node_keeps_objects_in_memory_and_costs_little_while_idle(cluster: None) -> None:
    logs = compose("logs", "--no-color", "head", "worker")
    assert "/dev/shm" not in logs, "Ray says so where it has to use the disk"
    assert "store" in inside("head-1", "sh", "-c", "ps -eo args | grep raylet | head -1")
    probes = told(
        "docker", "inspect", "-f", "{{range .State.Health.Log}}{{.ExitCode}} {{end}}", "entroray-test-head-1"
    )
    assert set(probes.split()) == {"0"}


def test_a_restarted_worker_costs_no_step(cluster: None) -> None:
    run = f"{RUNS}/restarted"
    spread = ("cluster.cpus.generator=1.2", "cluster.cpus.learner=1.2", "generator.replicas=2")
    command = submitted(*spread, "run.steps=12", f"run.dir={run}")
    process = subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=-2, text=True
    )
    until(lambda: 3 in journalled(run), 600, "step 3", lambda: process.poll() is None)
    holding = {node: actors(node) for node in NODES}
    # Three actors that fit on no node together: one of two workers has an engine and not the learner.
    victim = next(n for n in NODES[1:] if "Generator" in holding[n] and "LearnerRank" not in holding[n])
    told("docker", "restart", f"entroray-test-{victim}")
    said, _ = process.communicate(timeout=900)
    assert process.returncode == 0, said[-4000:]
    assert journalled(run) == list(range(1, 13)), "every step once"
    events = inside("head-1", "cat", f"{run}/events.jsonl")
    assert "engine_lost" in events, "it was hurt at all"
    until(lambda: nodes_there() == 3, 120, "the worker joins again")


def test_a_stopped_head_saves_the_run_first_and_the_run_goes_on(cluster: None) -> None:
    run = f"{RUNS}/stopped"
    command = submitted("generator.replicas=1", "run.steps=1000", "checkpoint.every=0", f"run.dir={run}")
    process = subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=-2, text=True
    )
    until(lambda: 2 in journalled(run), 600, "step 2", lambda: process.poll() is None)
    compose("stop", "head")
    said, _ = process.communicate(timeout=120)
    exited = told("docker", "inspect", "-f", "{{.State.ExitCode}}", "entroray-test-head-1")
    assert exited.strip() == "0", "it ended by itself, not by SIGKILL"
    compose("up", "--scale", "worker=2", "-d", "head", "worker")
    saved = inside("head-1", "sh", "-c", f"ls {run}/checkpoints/*/COMMITTED")
    assert "COMMITTED" in saved, said[-4000:]
    more = max(journalled(run)) + 1
    told(*submitted("generator.replicas=1", f"run.steps={more}", f"run.dir={run}", "run.resume=auto"))
    assert journalled(run) == list(range(1, more + 1)), "every step once"
