"""A run across three nodes: network namespaces joined by launch/ray-head.sh and launch/ray-worker.sh."""

import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
NODES = range(3)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.cluster,
    pytest.mark.skipif(
        os.geteuid() != 0 or not shutil.which("ip") or not (ROOT / ".venv").is_dir(),
        reason="needs root, iproute2 and the .venv of launch/setup.sh",
    ),
]


def ip(*arguments: str, check: bool = True) -> None:
    subprocess.run(["ip", *arguments], check=check, capture_output=True, timeout=20)


def within(node: int, *command: str) -> list[str]:
    return ["ip", "netns", "exec", f"entroray{node}", *command]


@pytest.fixture
def network() -> Iterator[None]:
    """Three namespaces on one bridge: 10.99.0.1, .2, .3."""
    ip("link", "add", "entroray", "type", "bridge")
    ip("link", "set", "entroray", "up")
    for node in NODES:
        ip("netns", "add", f"entroray{node}")
        ip("link", "add", f"er{node}", "type", "veth", "peer", "name", "eth0", "netns", f"entroray{node}")
        ip("link", "set", f"er{node}", "master", "entroray", "up")
        inside = ("-n", f"entroray{node}")
        ip(*inside, "addr", "add", f"10.99.0.{node + 1}/24", "dev", "eth0")
        ip(*inside, "link", "set", "eth0", "up")
        ip(*inside, "link", "set", "lo", "up")
    yield
    for node in NODES:
        ip("link", "del", f"er{node}", check=False)  # that of a namespace goes some time later
        ip("netns", "del", f"entroray{node}", check=False)
    ip("link", "del", "entroray", check=False)


@pytest.fixture
def nodes(network: None, tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a cluster of three one-core nodes."""
    environment = os.environ | {"RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_TMPDIR": "/tmp/ray-nodes-test"}
    environment.pop("RAY_ADDRESS", None)
    scripts = [["launch/ray-head.sh"], *[["launch/ray-worker.sh", "10.99.0.1:6379"]] * 2]
    started = []
    for node, script in zip(NODES, scripts, strict=True):
        own = [f"--host=10.99.0.{node + 1}", "--num-cpus=1", "--block"]
        started.append(subprocess.Popen(within(node, *script, *own), cwd=ROOT, env=environment))
        time.sleep(8)
    yield environment
    ours = [
        p for s in started for p in (psutil.Process(s.pid), *psutil.Process(s.pid).children(recursive=True))
    ]
    for process in started:
        process.terminate()
    _, alive = psutil.wait_procs(ours, timeout=30)
    for left in alive:
        left.kill()


def test_a_doctor_sums_over_three_nodes_and_a_wrong_interface_is_a_sentence(nodes: dict[str, str]) -> None:
    """By the nodes' own processes, with the driver's variables; its secrets stand in no log of Ray's."""
    command = within(0, str(ROOT / ".venv" / "bin" / "entroray"), "doctor", "cluster.address=10.99.0.1:6379")

    def said(**variables: str) -> str:
        told = {**nodes, "HF_TOKEN": "hf_a_secret_of_mine", **variables}
        done = subprocess.run(
            command, env=told, cwd=ROOT, capture_output=True, text=True, timeout=150, check=False
        )
        return next(line for line in done.stdout.splitlines() if "ray_clusters" in line)

    found = said(GLOO_SOCKET_IFNAME="eth0")  # without it, gloo takes that of the name they share, loopback
    assert found.startswith("ok") and "1 MB summed by gloo over 3 processes" in found
    assert all(f"10.99.0.{node + 1} on eth0" in found for node in NODES)
    wrong = said(GLOO_SOCKET_IFNAME="eth7")
    assert wrong.startswith("wrong") and wrong.count("GLOO_SOCKET_IFNAME=eth7 is no interface of") == 3
    alone = said(GLOO_SOCKET_IFNAME="lo")
    assert alone.startswith("wrong") and "set GLOO_SOCKET_IFNAME to the interface between the nodes" in alone
    logs = subprocess.run(
        ["grep", "-rl", "hf_a_secret_of_mine", "/tmp/ray-nodes-test"], capture_output=True, timeout=60
    )
    assert logs.returncode == 1, logs.stdout


def test_a_run_across_three_nodes(nodes: dict[str, str], model: str, tmp_path: Path) -> None:
    overrides = ["experiment=quickstart", "objective=grpo", "run.steps=2", "rollout.groups_per_step=4"]
    overrides += [
        "learner.lr_high=true",
        "observe.report=false",
        "evaluate.final=false",
        "data.max_prompt=128",
        f"model.path={model}",
    ]
    shares = {"generator": 1, "learner": 1, "verifier": 0.5}  # no two of them fit on one core
    overrides += [f"cluster.cpus.{role}={share}" for role, share in shares.items()]
    overrides += ["generator.replicas=1", "cluster.address=10.99.0.1:6379", f"run.dir={tmp_path}/run"]
    command = within(0, str(ROOT / ".venv" / "bin" / "entroray"), "train", *overrides)
    done = subprocess.run(
        command, env=nodes, cwd=ROOT, capture_output=True, text=True, timeout=580, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "= 2.5 of 3" in done.stdout and "2 steps in" in done.stdout
