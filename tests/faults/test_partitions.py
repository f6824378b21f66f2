"""F30: nodes that the network leaves out, or that are lost with all that ran on them."""

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.faults.record import Fault
from tests.faults.test_lost_ranks import happened
from tests.faults.test_stopped_runs import prompts
from tests.ray.namespaces import ROOT_ONLY, Nodes, nodes
from tests.ray.processes import is_dead, kinds, printed_at_end, start, step_reached, steps, until

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900), ROOT_ONLY]
FAR = 1
SETTINGS = [
    *("train", "experiment=quickstart", "objective=grpo", "rollout.groups_per_step=4"),
    *("learner.lr_high=true", "observe.tokens.every=1", "observe.report=false", "evaluate.final=false"),
    *("++data.settings.size=4000", "data.settings.max_digits=3", "data.max_prompt=128"),
    *("generator.replicas=2", "verifier.replicas=2"),
    *("cluster.cpus.learner=3", "cluster.cpus.generator=1.5", "cluster.cpus.verifier=0.25"),
    *("cluster.address=10.99.0.1:6379", "checkpoint.every=5"),
]
START = 300.0


@pytest.fixture
def cluster() -> Iterator[Nodes]:
    """A head that the learner fits on, and a node that it does not; an engine and a verifier on each."""
    with nodes("f", [5, 2]) as made:
        yield made


def begin(cluster: Nodes, folder: Path, model: str, count: int, *own: str) -> subprocess.Popen:
    """A run of `count` steps, driven from the head, once it has made two."""
    told = [*SETTINGS, f"run.dir={folder}", f"model.path={model}", f"run.steps={count}", *own]
    process = start(*told, within=cluster.network.within(0), variables=cluster.environment)
    until(process, step_reached(folder, 2), START)
    return process


def titled(cluster: Nodes, node: int, what: str) -> list[psutil.Process]:
    """Living actors of a class on a node."""
    living = [p for p in cluster.network.processes(node) if not is_dead(p)]
    return [p for p in living if f"ray::{what}" in " ".join(p.cmdline())]


def actors(cluster: Nodes) -> list[psutil.Process]:
    """An engine and a verifier of the run are on the far node, and the learner is not."""
    found = [p for what in ("Generator", "Verifier") for p in titled(cluster, FAR, what)]
    assert len(found) == 2 and not titled(cluster, FAR, "LearnerRank"), found
    return found


def balanced(folder: Path, count: int) -> None:
    """Every step once, every prompt once, and the ledger of the run adds up."""
    assert steps(folder) == list(range(1, count + 1))
    trained = prompts(folder)
    assert sum(map(len, trained.values())) == len(set().union(*trained.values())) == 4 * count
    (ledger,) = [each["lines"] for each in happened(folder, "ledger")]
    whole = [n for name, n in ledger.items() if name.startswith(("trained", "pending", "dropped"))]
    for unit, issued in ledger["issued"].items():
        assert issued == sum(each[unit] for each in whole) > 0
    assert ledger["trained"]["groups"] == 4 * count


def cut(cluster: Nodes, process: subprocess.Popen, seconds: float, fault: Fault) -> None:
    """The far node reaches nobody for so long, and nobody it; the run lives through it."""
    far = actors(cluster)
    cluster.network.cut(FAR)
    ends = time.monotonic() + seconds
    assert not cluster.network.reaches_head(FAR)
    fault.fired(f"10.99.0.2, with {' and '.join(p.cmdline()[0].strip() for p in far)}, reached no head")
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=ends - time.monotonic())
    cluster.network.heal(FAR)
    assert cluster.network.reaches_head(FAR)


def lost(folder: Path) -> list[str]:
    """As `engine_lost generator 0`; who was started in its place on the same node may be lost as well."""
    named = lambda kind, role: [f"{kind} {fields[role]}" for fields in happened(folder, kind)]
    found = named("engine_lost", "engine") + named("verifier_lost", "verifier")
    assert len(set(found)) == len(found), f"somebody is lost twice: {found}"
    return found


def of_both(folder: Path) -> bool:
    """Whether an engine and a verifier are lost, and no rank."""
    assert "learner_lost" not in kinds(folder)
    return {each.split()[0] for each in lost(folder)} == {"engine_lost", "verifier_lost"}


@pytest.mark.fault("F30", "a node with an engine and a verifier is cut off for 20 s")
def test_a_partition_of_20_seconds_trains_nothing_twice(
    fault: Fault, cluster: Nodes, tmp_path: Path, model: str
) -> None:
    folder = tmp_path / "run"
    process = begin(cluster, folder, model, 30)
    cut(cluster, process, 20.0, fault)
    fault.saw(", ".join(lost(folder)) or "nobody is lost, samples are waited for")
    until(process, step_reached(folder, steps(folder)[-1] + 2), START)
    fault.goes_on("two more steps; to the end every step and every prompt once, the ledger adds up")
    printed_at_end(process, 0)
    balanced(folder, 30)


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.fault("F30", "a node with an engine and a verifier is cut off for 5 minutes")
def test_a_partition_of_five_minutes_is_a_node_that_is_lost_once(
    fault: Fault, cluster: Nodes, tmp_path: Path, model: str
) -> None:
    folder = tmp_path / "run"
    process = begin(cluster, folder, model, 2500, "++data.settings.size=20000")
    far, before = actors(cluster), steps(folder)[-1]
    cut(cluster, process, 300.0, fault)
    after = steps(folder)[-1]
    fault.saw(f"{', '.join(lost(folder))}; without it {after - before} steps were made")
    assert of_both(folder) and after > before
    psutil.wait_procs(far, timeout=60.0)
    assert all(map(is_dead, far)), "Ray lets nothing live that it has declared dead"
    until(process, step_reached(folder, steps(folder)[-1] + 2), START)
    fault.goes_on("the same run goes on, and nothing of the node comes back")
    process.terminate()
    printed_at_end(process, 143)
    assert of_both(folder)
    balanced(folder, steps(folder)[-1])


@pytest.mark.fault("F30", "SIGKILL to a node's raylet with an engine and a verifier")
def test_a_node_that_is_lost_with_what_runs_on_it_costs_no_step(
    fault: Fault, cluster: Nodes, tmp_path: Path, model: str
) -> None:
    folder = tmp_path / "run"
    process = begin(cluster, folder, model, 40)
    far = actors(cluster)
    killed = [p for p in cluster.network.processes(FAR) if not is_dead(p)]
    for each in sorted(killed, key=lambda p: "raylet" not in p.name()):
        each.kill()
    fault.fired(f"{len(killed)} processes of a node are dead, {len(far)} of them actors of the run")
    until(process, lambda: of_both(folder), START)
    fault.saw("engine_lost, verifier_lost")
    until(process, step_reached(folder, steps(folder)[-1] + 2), START)
    fault.goes_on("two more steps; to the end every step and every prompt once, the ledger adds up")
    printed_at_end(process, 0)
    assert of_both(folder)
    balanced(folder, 40)
