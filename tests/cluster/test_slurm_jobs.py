"""launch/slurm.sbatch on a real Slurm of two nodes or more; tests/cluster/up.sh makes one."""

import re
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cluster.runs import JOB, steps, until

ROOT = Path(__file__).parents[2]
SPREAD = (
    *("cluster.cpus.generator=1.5", "cluster.cpus.learner=1.5", "cluster.cpus.verifier=0.5"),
    *("generator.replicas=1", "generator.threads=1", "learner.threads=1"),
)
"""Engine and learner do not fit on one node of two cores."""


def slurm(*command: str) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.strip()


def missing() -> str:
    """What a job of two nodes lacks here."""
    if not shutil.which("sbatch") or not (ROOT / ".venv").is_dir():
        return "no Slurm is installed here, or no .venv"
    idle = subprocess.run(
        ["sinfo", "-h", "-t", "idle", "-o", "%D"], capture_output=True, text=True, timeout=60
    )
    return "" if sum(map(int, idle.stdout.split())) >= 2 else "Slurm has no two idle nodes"


pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module", autouse=True)
def here() -> None:
    if why := missing():
        pytest.skip(f"NOT TESTED: {why}; tests/cluster/up.sh makes one")


@dataclass
class Job:
    """A run of two nodes in a folder that they share."""

    folder: Path
    number: str = ""

    def start(self, *overrides: str) -> None:
        flags = ["--parsable", "--gpus-per-node=0", "--cpus-per-task=2", "--nodes=2", "--time=30"]
        own = [f"run.dir={self.folder}/run", f"model.path={self.folder}/model", *JOB, *SPREAD, *overrides]
        output = f"--output={self.folder}/out"
        self.number = slurm("sbatch", *flags, output, "launch/slurm.sbatch", *own)

    def shown(self, what: str) -> str:
        return re.search(rf"{what}=(\S+)", slurm("scontrol", "show", "job", self.number)).group(1)

    def over(self) -> bool:
        return self.shown("JobState") in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

    def steps(self) -> list[int]:
        file = self.folder / "run" / "metrics.jsonl"
        return steps(file.read_text()) if file.exists() else []

    def said(self) -> str:
        return (self.folder / "out").read_text()

    def trains(self, step: int) -> None:
        until(lambda: step in self.steps(), 600, f"step {step}", lambda: not self.over())

    def signal(self, name: str) -> None:
        slurm("scancel", "--batch", f"--signal={name}", self.number)


@pytest.fixture
def job(model: Path) -> Iterator[Job]:
    folder = ROOT / "runs" / f"cluster-test-{secrets.token_hex(4)}"
    shutil.copytree(model, folder / "model")
    job = Job(folder)
    yield job
    if job.number and not job.over():
        slurm("scancel", job.number)
    shutil.rmtree(folder)


def test_a_run_of_two_nodes_waits_for_both_and_ends_clean(job: Job) -> None:
    job.start("run.steps=2")
    until(job.over, 900, "the job")
    assert (job.shown("JobState"), job.shown("ExitCode")) == ("COMPLETED", "0:0"), job.said()[-4000:]
    assert "= 3.5 of 4" in job.said() and job.steps() == [1, 2]
    assert not re.search(r"cancelled|srun: error|slurmstepd", job.said(), re.IGNORECASE), job.said()[-4000:]


def test_a_run_saves_before_its_limit_queues_again_and_goes_on(job: Job) -> None:
    job.start("run.steps=1000")
    job.trains(2)
    job.signal("USR1")  # what #SBATCH --signal=B:USR1@300 has Slurm do
    until(lambda: job.shown("Restarts") == "1", 120, "the second start")
    assert "USR1" not in job.said() and list((job.folder / "run" / "checkpoints").glob("step-*/COMMITTED"))
    # Slurm starts it two minutes later, and would refuse it before: its credential is revoked until then.
    until(lambda: "resume: going on after step" in job.said(), 900, "the resumption", lambda: not job.over())
    job.trains(max(job.steps()) + 1)
    job.signal("TERM")
    until(job.over, 120, "the end")
    assert (job.shown("JobState"), job.shown("ExitCode")) == ("FAILED", "143:0"), job.said()[-4000:]
    assert job.steps() == list(range(1, len(job.steps()) + 1)), "every step once"
    last = max((job.folder / "run" / "checkpoints").glob("step-*/COMMITTED")).parent
    assert last.name == f"step-{len(job.steps()):06d}"
