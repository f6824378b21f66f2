"""F48: the supervisor of `soak.py` beside a real run of a minute."""

from pathlib import Path

import pytest

from tests.faults import soak
from tests.faults.record import Fault
from tests.faults.soak_run import Supervisor, whole_lines
from tests.faults.test_lost_ranks import happened
from tests.faults.test_stopped_runs import prompts

SEED, STEPS, EVERY = 26, 16, 4
SMALL = (
    *("rollout.groups_per_step=4", "checkpoint.every=2", "observe.tokens.every=1", "data.max_prompt=128"),
    *("++data.settings.size=2000", "learner.lr_high=true"),
)


@pytest.mark.faults
@pytest.mark.timeout(900)
@pytest.mark.fault(
    "F48", f"{STEPS} steps with a fault every {EVERY}, of seed {SEED}, supervised from outside"
)
def test_a_short_soak_makes_every_step_once_and_leaves_nothing(
    fault: Fault, tmp_path: Path, model: str
) -> None:
    run = Supervisor(tmp_path, seed=SEED, steps=STEPS, every=EVERY)
    run.command += [*SMALL, f"model.path={model}"]
    run.supervise()
    rows = whole_lines(run.run / "metrics.jsonl")
    found = {"steps": STEPS, **soak.result(run.log.rows, rows)}
    faults = ", ".join(f"{count} x {kind}" for kind, count in found["faults"].items())
    fault.fired(f"{faults}: each seen by the supervisor")
    assert list(soak.misses(found)) == [] and sum(found["faults"].values()) >= 3
    slowest = max(row["seconds"] for row in run.log.of("answer"))
    fault.saw("the slowest answer of a fault", after=slowest)
    trained = prompts(run.run)
    assert sum(map(len, trained.values())) == len(set().union(*trained.values())) == 4 * STEPS
    ledger = happened(run.run, "ledger")[-1]["lines"]
    whole = [n for name, n in ledger.items() if name.startswith(("trained", "pending", "dropped"))]
    for unit, issued in ledger["issued"].items():
        assert issued == sum(each[unit] for each in whole) > 0
    restarts = f"{found['restarts']} new drivers"
    fault.goes_on(f"every step and prompt once, the ledger adds up, nothing is left over; {restarts}")
