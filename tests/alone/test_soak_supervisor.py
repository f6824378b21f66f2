"""The supervisor of the soak, beside a driver of ten lines: it kills, starts again and sees what is left."""

import signal
import sys
from pathlib import Path

import psutil
import pytest

from tests.faults import soak_run
from tests.faults.soak_numbers import Fault
from tests.faults.soak_run import Supervisor, last_step, whole_lines

DRIVER = """
import json, pathlib, subprocess, sys, tempfile, time
run, leaves = pathlib.Path(sys.argv[1]), int(sys.argv[2])
run.mkdir(exist_ok=True)
lines = run / "metrics.jsonl"
done = len(lines.read_text().splitlines()) if lines.exists() else 0
for step in range(done + 1, 9):
    with lines.open("a") as file:
        file.write(json.dumps({"step": step, "reward/mean": 0.5}) + chr(10))
    time.sleep(0.2)
if leaves:
    tempfile.mkdtemp(prefix="forgotten-")
    subprocess.Popen(["sleep", "61"], start_new_session=True)
"""


def supervised(folder: Path, *, leaves: bool, faults: list[Fault]) -> Supervisor:
    found = Supervisor(folder, seed=1, steps=8, every=0)
    found.command, found.left = [sys.executable, "-c", DRIVER, str(found.run), str(int(leaves))], faults
    return found


def test_a_killed_driver_is_started_again_and_each_step_is_done_once(tmp_path: Path) -> None:
    killed = Fault(3, "kill the driver", 0.0, 0.0)
    run = supervised(tmp_path, leaves=False, faults=[killed])
    run.supervise()
    assert [row["step"] for row in whole_lines(run.run / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6, 7, 8]
    (fault,), exits = run.log.of("fault"), [(row["code"], row["explained"]) for row in run.log.of("exit")]
    assert fault["fired"] and fault["witness"]["gone"] and fault["step"] >= 3
    assert exits == [(-signal.SIGKILL, True), (0, True)] and len(run.log.of("answer")) == 1
    assert not any(thing.startswith(("processes", "folders")) for thing in run.log.of("end")[0]["left_over"])
    assert not run.temporary.exists()


def test_processes_and_files_that_a_run_leaves_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soak_run, "GRACE", 1.0)
    run = supervised(tmp_path, leaves=True, faults=[])
    run.supervise()
    left = run.log.of("end")[0]["left_over"]
    (process,) = [thing for thing in left if thing.startswith("processes")]
    assert "sleep 61" in process and any("folders: forgotten-" in thing for thing in left)
    psutil.Process(int(process.split()[1])).kill()


def test_a_soak_that_is_ended_ends_its_driver_and_goes_on_where_it_was(
    tmp_path: Path,
) -> None:
    def end(*_: object) -> None:
        raise soak_run.Interrupted

    first = supervised(tmp_path, leaves=False, faults=[])
    as_ever = first._look_for_answer
    first._look_for_answer = lambda: end() if first.step >= 2 else as_ever()  # type: ignore[method-assign]
    with pytest.raises(soak_run.Interrupted):
        first.supervise()
    assert first.driver and not psutil.pid_exists(first.driver.pid)
    assert 2 <= last_step(first.run) < 8 and first.log.of("interrupted")[0]["step"] >= 2
    again = supervised(tmp_path, leaves=False, faults=[])
    assert again.step == last_step(first.run) and again.turn == first.turn
    again.supervise()
    assert last_step(again.run) == 8 and [row["code"] for row in again.log.of("exit")] == [0]


def test_a_fault_that_has_fired_does_not_come_again(tmp_path: Path) -> None:
    whole = Supervisor(tmp_path, seed=1, steps=300, every=15)
    whole.log.add("fault", name=whole.left[0].kind, turn=12)
    again = Supervisor(tmp_path, seed=1, steps=300, every=15)
    assert len(whole.left) > 15 and again.left == whole.left[1:] and again.turn == 12
    whole.temporary.rmdir()
    again.temporary.rmdir()


def test_a_line_that_is_being_written_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    assert last_step(tmp_path) == 0 and whole_lines(file) == []
    file.write_text('{"step": 1, "a": 2}\n{"step": 2, "a": 3}\n{"step": 3, "a"')
    assert last_step(tmp_path) == 2 and [row["step"] for row in whole_lines(file)] == [1, 2]
