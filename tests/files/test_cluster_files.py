"""The image, Compose and KubeRay: parsed, and their commands tried with what is here."""

import copy
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from entroray.cli import COMMANDS
from entroray.cli.submit import RUNS
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


def test_every_node_says_what_it_takes_of_the_machine() -> None:
    for name in ("head", "worker"):
        service = COMPOSE["services"][name]
        flags = dict(
            word[2:].split("=") for word in service["command"] if word.startswith("--") and "=" in word
        )
        assert flags["num-cpus"] == "${ENTRORAY_CPUS:-1}" and service["mem_limit"] == "${ENTRORAY_MEMORY:-8g}"
        assert int(flags["object-store-memory"]) < 2e9 and service["shm_size"] == "2gb", "else Ray uses /tmp"
        assert service["stop_grace_period"] == "60s", "so long may a job take to save"
        assert service["restart"] == "on-failure"


def test_a_run_is_submitted_as_often_as_one_likes_into_the_volume() -> None:
    submit = COMPOSE["services"]["submit"]
    assert not any("run.dir" in word for word in submit["entrypoint"] + submit["command"])
    kept = {v.partition(":")[2] for each in COMPOSE["services"].values() for v in each["volumes"]}
    folder = RUNS.replace("~", "/home/entroray")
    assert folder in kept and f"--logdir={folder}" in COMPOSE["services"]["tensorboard"]["command"]
    assert "~/entroray-runs ~/.cache/entroray" in DOCKERFILE, "a volume takes its owner from the image"


def test_health_is_asked_of_a_page_and_not_of_a_ray_of_its_own() -> None:
    probe = COMPOSE["services"]["head"]["healthcheck"]["test"]
    assert probe[:3] == ["CMD", "python", "-c"] and "/api/gcs_healthz" in probe[3]
    compile(probe[3], "probe", "exec")


def test_the_token_is_read_from_a_file_that_no_image_and_no_commit_holds() -> None:
    for ignored in (".dockerignore", ".gitignore"):
        assert "docker/.env" in (ROOT / ignored).read_text().splitlines()
    assert "> docker/.env" in (ROOT / "launch" / "README.md").read_text()


def test_every_builder_leaves_out_what_is_large_and_keeps_no_downloads() -> None:
    ignored = (ROOT / ".dockerignore").read_text().split()  # of the context, which any builder reads
    assert {".git", ".venv", "runs"} <= set(ignored)
    installs = re.findall(r"^RUN .*launch/setup\.sh.*$", DOCKERFILE, re.MULTILINE)
    assert len(installs) == 2
    assert all("UV_NO_CACHE=1" in line and "PIP_NO_CACHE_DIR=1" in line for line in installs)


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


def refused(job: dict[str, Any]) -> list[str]:
    """What KubeRay's API would say to this RayJob."""
    schema = yaml.safe_load((ROOT / "tests" / "cluster" / "rayjob-1.6.2.yaml").read_text())
    return [error.message for error in jsonschema.Draft7Validator(schema).iter_errors(job)]


def test_kuberay_1_6_2_knows_every_field_of_the_job() -> None:
    assert refused(RAYJOB) == []
    for text in ((ROOT / "launch" / "kuberay.yaml").read_text(), (ROOT / "launch" / "README.md").read_text()):
        assert "1.6.0 or newer" in text, "older ones probe with wget, which the image lacks"


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        ("shutdownAfterJobFinish", True, "'shutdownAfterJobFinish' was unexpected"),
        ("backoffLimit", "0", "'0' is not of type 'integer'"),
        ("rayClusterSpec.authOptions", {"mode": "none"}, "'none' is not one of ['disabled', 'token']"),
        ("rayClusterSpec.headGroupSpec.rayStartParams", {"num-cpus": 4}, "4 is not of type 'string'"),
        ("rayClusterSpec.headGroupSpec.replicas", 1, "'replicas' was unexpected"),
    ],
)
def test_a_wrong_field_of_the_job_is_refused(place: str, value: Any, said: str) -> None:
    job = copy.deepcopy(RAYJOB)
    *parents, last = place.split(".")
    part = job["spec"]
    for parent in parents:
        part = part[parent]
    part[last] = value
    assert any(said in message for message in refused(job))


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
