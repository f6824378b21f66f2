"""launch/slurm.sbatch on stand-ins of Slurm and Ray: what it starts, waits for, saves and ends."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STAY = "while true; do sleep 0.05; done"
STUBS = {
    "bin/scontrol": 'case $1 in show) printf "n1\\nn2\\n" ;; esac',
    "bin/srun": f'trap "echo workers end >>$LOG; exit" TERM; echo $$ >srun.pid; {STAY}',
    "bin/scancel": 'kill -TERM "$(cat srun.pid)"',
    "bin/hostname": 'echo "10.0.0.1 172.17.0.1"',
    "launch/setup.sh": "sleep ${SETUP:-0}",
    "launch/ray-head.sh": f'trap "echo head ends >>$LOG; exit" TERM; [[ -z ${{FAILS:-}} ]] || exit 1; {STAY}',
    ".venv/bin/ray": """n=$(cat joined 2>/dev/null || echo 0); echo $((n < ${NODES:-2} ? n + 1 : n)) >joined
printf 'Node status\\n---\\nActive:\\n'; ((n < 1)) || printf ' 1 node_a\\n'
printf 'Idle:\\n'; ((n < 2)) || printf ' 1 node_b\\n'; printf 'Pending:\\n 7 launching\\n'""",
    ".venv/bin/entroray": f"""echo "seen $(cat joined)" >>$LOG
trap 'mkdir -p "$SAVES"; touch "$SAVES/COMMITTED"; echo saved >>$LOG; exit 143' TERM
[[ -n ${{STAYS:-}} ]] || exit ${{CODE:-0}}
{STAY}""",
}


class Job:
    """A checkout and a PATH of stubs, each of which notes its call."""

    def __init__(self, home: Path) -> None:
        self.home, self.log, self.said = home, home / "log", home / "said"
        for name, script in STUBS.items():
            path = home / name
            path.parent.mkdir(parents=True, exist_ok=True)
            noted = "" if name.endswith("/ray") else f'echo "{path.name} $*" >>$LOG\n'
            path.write_text(f"#!/usr/bin/env bash\n{noted}{script}\n")
            path.chmod(0o755)

    def start(self, *arguments: str, nodes: int = 2, **variables: str) -> subprocess.Popen:
        slurm = {"SLURM_SUBMIT_DIR": str(self.home), "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_ID": "7"}
        slurm |= {"SLURM_JOB_NUM_NODES": str(nodes), "SLURM_CPUS_PER_TASK": "16", "LOG": str(self.log)}
        slurm |= {"SAVES": str(self.home / "runs" / "slurm-7" / "checkpoints" / "step-000003")}
        path = f"{self.home}/bin:{os.environ['PATH']}"
        script = (ROOT / "launch" / "slurm.sbatch").read_text()
        (self.home / "job").write_text(script.replace("sleep 2", "sleep 0.1"))
        command = ["bash", str(self.home / "job"), *arguments]
        environment = os.environ | slurm | {"PATH": path} | variables
        with self.said.open("w") as said:
            return subprocess.Popen(command, env=environment, stderr=said)

    def run(self, *arguments: str, **variables: str) -> tuple[int, str]:
        """Its code, and what was noted."""
        process = self.start(*arguments, **variables)
        return process.wait(timeout=30), self.log.read_text()

    def signalled(self, number: signal.Signals, *arguments: str, **variables: str) -> tuple[int, str, str]:
        """The same, of a job that gets a signal once it trains; and what it said."""
        process = self.start(*arguments, STAYS="1", **variables)
        until = time.monotonic() + 20
        while not (self.log.exists() and "seen" in self.log.read_text()):
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.02)
        time.sleep(0.1)
        process.send_signal(number)  # as B: has it, to the script alone
        return process.wait(timeout=30), self.log.read_text(), self.said.read_text()


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def test_the_script_starts_both_kinds_of_node_and_returns_the_runs_code(job: Job) -> None:
    code, log = job.run("experiment=gsm8k", CODE="5")
    assert code == 5
    assert "ray-head.sh --host=10.0.0.1 --num-cpus=16 --block" in log
    assert (
        "--nodes=1 --ntasks=1 --exclude=n1 --overlap launch/ray-worker.sh 10.0.0.1:6379 --num-cpus=16" in log
    )
    assert f"train experiment=gsm8k run.dir={job.home}/runs/slurm-7 cluster.address=10.0.0.1:6379" in log


def test_the_run_starts_once_every_node_has_joined(job: Job) -> None:
    assert "seen 2" in job.run()[1]


def test_a_node_that_does_not_join_and_a_head_that_ends_are_said(job: Job) -> None:
    process = job.start(FAILS="1")
    assert process.wait(timeout=30) == 4 and "the Ray head on n1 has ended" in job.said.read_text()
    script = (ROOT / "launch" / "slurm.sbatch").read_text()
    assert '"${there:-0} of $nodes nodes joined Ray within 300 s"' in script
    began, waited = script.index("\nSECONDS=0"), script.index("until there=")
    assert script.index("./launch/setup.sh") < began < waited, "the set-up is not counted"


def test_on_one_node_nothing_is_a_step(job: Job) -> None:
    code, log = job.run(nodes=1, NODES="1")
    assert code == 0 and "srun" not in log and "scancel" not in log


def test_the_run_and_its_head_are_no_steps_for_a_signal_makes_srun_kill_its_own(job: Job) -> None:
    steps = [line for line in job.run()[1].splitlines() if line.startswith("srun ")]
    assert len(steps) == 1 and "ray-worker.sh" in steps[0]


def test_sigterm_saves_and_ends_and_no_more(job: Job) -> None:
    code, log, _ = job.signalled(signal.SIGTERM)
    assert code == 143 and "saved" in log and "requeue" not in log


def test_before_its_time_is_up_the_run_saves_and_queues_again(job: Job) -> None:
    code, log, _ = job.signalled(signal.SIGUSR1)
    assert code == 143
    order = [log.index(each) for each in ("saved", "workers end", "head ends", "scontrol requeue 7")]
    assert order == sorted(order)
    assert (
        "#SBATCH --signal=B:USR1@300\n#SBATCH --requeue\n" in (ROOT / "launch" / "slurm.sbatch").read_text()
    )


def test_a_job_that_saved_nothing_does_not_queue_again_for_ever(job: Job) -> None:
    code, log, said = job.signalled(signal.SIGUSR1, SAVES=str(job.home / "elsewhere"))
    assert code == 143 and "requeue" not in log and "before a step was saved" in said


def test_a_job_that_queued_again_goes_on_where_it_was(job: Job) -> None:
    folder = f"run.dir={job.home}/runs/slurm-7"
    assert f"train a=1 {folder} run.resume=auto cluster" in job.run("a=1", SLURM_RESTART_COUNT="1")[1]
    given = job.run("run.dir=/shared/x", "run.resume=never", SLURM_RESTART_COUNT="2")[1]
    assert "train run.dir=/shared/x run.resume=never cluster" in given


@pytest.mark.parametrize("code", [0, 4])
def test_nodes_end_in_order_however_the_run_ended(job: Job, code: int) -> None:
    ended, log = job.run(CODE=str(code))
    assert ended == code and "scancel --signal=INT 7.0" in log
    assert log.index("workers end") < log.index("head ends"), "else steps count as cancelled"


def test_a_signal_while_setting_up_ends_the_job(job: Job) -> None:
    process = job.start(SETUP="1")
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 143 and "entroray" not in job.log.read_text()
