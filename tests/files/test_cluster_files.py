"""The ways onto a cluster that cannot be gone here: parsed, and their commands tried with what is here."""

import os
import re
import shlex
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from entroray.cli import COMMANDS
from entroray.wiring import actors, compose

ROOT = Path(__file__).parents[2]
COMPOSE = yaml.safe_load((ROOT / "docker" / "docker-compose.yml").read_text())
RAYJOB = yaml.safe_load((ROOT / "launch" / "kuberay.yaml").read_text())
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text()


@pytest.mark.parametrize("script", ["ray-head.sh", "ray-worker.sh"])
def test_scripts_say_what_they_are_for(script: str) -> None:
    path = ROOT / "launch" / script
    done = subprocess.run([str(path), "--help"], capture_output=True, text=True, timeout=20)
    assert done.returncode == 0 and "Ray cluster" in done.stdout and "token" in done.stdout


def checked(command: list[str]) -> None:
    """The program of a command in a container is one of ours, and takes what it is given."""
    program, *arguments = command
    if program.startswith("launch/"):
        script = (ROOT / program).read_text()
        for flag in (a.partition("=")[0] for a in arguments if a.startswith("--host")):
            assert f"{flag}=" in script
    elif program == "entroray":
        assert arguments[0] in COMMANDS
        compose.load_config([a for a in arguments[1:] if not a.startswith("--")])
    else:
        assert program == "tensorboard"


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_services_of_the_compose_file(name: str) -> None:
    service = COMPOSE["services"][name]
    checked([*service.get("entrypoint", []), *service["command"]])
    assert "make one" in service["environment"]["RAY_AUTH_TOKEN"], "no service starts without a token"
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    named = {v.partition(":")[0] for v in service["volumes"]}
    assert named <= COMPOSE["volumes"].keys()
    assert service["build"]["target"] in targets()


def targets() -> list[str]:
    return re.findall(r"^FROM \S+ AS (\w+)$", DOCKERFILE, re.MULTILINE)


def test_the_image_has_two_targets_and_no_root() -> None:
    assert {"cpu", "cuda"} <= set(targets()) and DOCKERFILE.count("ARG BASE") == 1
    last_user = re.findall(r"^USER (\w+)$", DOCKERFILE, re.MULTILINE)[-1]
    assert last_user == "entroray"
    for build in ("cpu", "cuda"):
        assert f"ENTRORAY_BUILD={build} ./launch/setup.sh" in DOCKERFILE
    known = {"ARG", "FROM", "USER", "RUN", "WORKDIR", "ENV", "COPY", "CMD"}
    lines = re.sub(r"\\\n", " ", DOCKERFILE).splitlines()
    assert {line.split()[0] for line in lines if line.strip() and not line.startswith("#")} <= known


def containers(spec: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = spec["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [c for g in groups for c in g["template"]["spec"]["containers"]]


def test_the_job_for_kuberay() -> None:
    from importlib.metadata import requires

    spec = RAYJOB["spec"]
    checked(shlex.split(spec["entrypoint"]))
    assert f"ray[default]=={spec['rayClusterSpec']['rayVersion']}" in (requires("entroray") or ())
    assert spec["rayClusterSpec"]["authOptions"] == {"mode": "token"}, "KubeRay hands it to its own pods too"
    for container in containers(spec):
        names = {e["name"]: e["value"] for e in container["env"]}
        assert not any(name.startswith("RAY_AUTH") for name in names)
        shared = {m["mountPath"] for m in container["volumeMounts"]}
        assert all(Path(names[n]).parent.as_posix() in shared for n in ("ENTRORAY_CACHE", "HF_HOME"))


def asked(command: str) -> float:
    """GPUs that a run with these arguments takes."""
    config, _ = compose.load_config([w for w in shlex.split(command) if "=" in w])
    assert config.model.path.startswith("Qwen/"), "a cached model of the head is not there for the others"
    return sum(count * share.gpus for count, share in actors.resource_shares(config).values())


def test_the_examples_take_the_gpus_they_reserve() -> None:
    (group,) = RAYJOB["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    cards = int(container["resources"]["limits"]["nvidia.com/gpu"])
    assert asked(RAYJOB["spec"]["entrypoint"]) == group["replicas"] * cards
    slurm = (ROOT / "launch" / "slurm.sbatch").read_text()
    nodes, cards = (int(n) for n in re.findall(r"^#SBATCH --(?:nodes|gpus-per-node)=(\d+)$", slurm, re.M))
    (said,) = re.findall(r"sbatch launch/slurm.sbatch (.*\\\n#.*)\n", slurm)
    assert asked(said.replace("\\\n#", "")) == nodes * cards
    readme = (ROOT / "launch" / "README.md").read_text()
    (said,) = re.findall(r'^run="(.*)"$', readme, re.M)
    assert asked(said) == nodes * cards


STUB = """#!/usr/bin/env bash
printf '%s\\n' "$SRUN_CPUS_PER_TASK CPUs: $*" >>"$LOG"
case "$*" in
*"hostname -I"*) echo "10.0.0.1 172.17.0.1" ;;
*"ray-head.sh"* | *"ray-worker.sh"*) exec sleep 2 ;;
*"entroray train"*) exit 5 ;;
"show hostnames"*) printf 'n1\\nn2\\n' ;;
esac
"""


def test_the_slurm_script_starts_both_kinds_of_node_and_returns_the_runs_code(tmp_path: Path) -> None:
    stubs, log = tmp_path / "bin", tmp_path / "log"
    (tmp_path / "launch").mkdir()
    stubs.mkdir()
    for stub in (stubs / "srun", stubs / "scontrol"):
        stub.write_text(STUB)
        stub.chmod(0o755)
    setup = tmp_path / "launch" / "setup.sh"
    setup.write_text("#!/usr/bin/env bash\n")
    setup.chmod(0o755)
    slurm = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2"}
    slurm |= {"SLURM_CPUS_PER_TASK": "16"}
    environment = os.environ | slurm | {"PATH": f"{stubs}:{os.environ['PATH']}", "LOG": str(log)}
    script = ["bash", str(ROOT / "launch" / "slurm.sbatch"), "experiment=gsm8k"]
    done = subprocess.run(script, env=environment, timeout=30, check=False)
    until = time.monotonic() + 20  # the script need not outlive the start of its workers
    while "ray-worker.sh" not in (said := log.read_text()) and time.monotonic() < until:
        time.sleep(0.05)
    assert done.returncode == 5
    assert "-w n1 --overlap launch/ray-head.sh --host=10.0.0.1 --num-cpus=16 --block" in said
    assert "--exclude=n1 --overlap launch/ray-worker.sh 10.0.0.1:6379 --num-cpus=16 --block" in said
    assert all(line.startswith("16 CPUs: ") for line in said.splitlines())
    assert "entroray train experiment=gsm8k cluster.address=10.0.0.1:6379" in said
