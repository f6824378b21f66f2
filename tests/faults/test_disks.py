"""F15 to F17, F28 and F47: checkpoints that are damaged or cut, a full disk, folders of other runs."""

import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from entroray.errors import PreflightError
from entroray.wiring import run_directory
from entroray.workers.checkpoint import newest
from tests.faults import saves
from tests.faults.record import Fault
from tests.unit.test_run_directory import begun, resume

pytestmark = pytest.mark.faults
__all__ = ["begun"]


def flip(file: Path) -> None:
    held = bytearray(file.read_bytes())
    held[random.Random(0).randrange(len(held))] ^= 1
    file.write_bytes(held)


HARMS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a bit of a shard is flipped": (saves.FILES[0], flip),
    "a shard is a byte shorter": (saves.FILES[1], lambda f: os.truncate(f, f.stat().st_size - 1)),
    "a shard is gone": (saves.FILES[1], Path.unlink),
    "a shard is empty": (saves.FILES[0], lambda f: f.write_bytes(b"")),
    "the manifest is cut": ("manifest.json", lambda f: os.truncate(f, 40)),
    "the driver's state is other": ("driver.json", lambda f: f.write_text('{"version": 1}')),
    "the marker is gone": ("COMMITTED", Path.unlink),
}


@pytest.mark.fault("F15", "{harm}")
@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    fault: Fault, tmp_path: Path, harm: str
) -> None:
    for step in (1, 2):
        saves.save(tmp_path, step)
    name, act = HARMS[harm]
    assert newest(tmp_path) == (tmp_path / "step-000002", [])
    act(tmp_path / "step-000002" / name)
    fault.fired("the newest was whole before")
    found, why = newest(tmp_path)
    assert found == tmp_path / "step-000001"
    assert name == "COMMITTED" or (len(why) == 1 and "step-000002" in why[0])
    fault.saw(why[0].replace(f"{tmp_path}/", "")[:90] if why else "it has no marker, so it is none")
    fault.goes_on("the one before is taken, before anything of either is loaded", lost="a step")


@pytest.mark.fault("F16", "a save is ended ({ends}) at {how}, 20 times")
@pytest.mark.parametrize(("how", "ends"), [("a random byte", "SIGXFSZ"), ("a random time", "SIGALRM")])
def test_a_save_that_is_cut_leaves_the_checkpoint_before(
    fault: Fault, tmp_path: Path, how: str, ends: str
) -> None:
    command = [sys.executable, "-m", "tests.faults.saves", str(tmp_path / "kept"), how[9:], "20"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True)
    cuts = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    ended, sizes = Counter(cut["ended"] for cut in cuts), [cut["left"] for cut in cuts if cut["left"]]
    assert len(cuts) == 20 and ended[ends] >= (20 if ends == "SIGXFSZ" else 5)
    fault.fired(f"{ended[ends]} of 20 ended by {ends}, with up to {max(sizes, default=0):,} bytes written")
    whole = ["step-000001" if cut["ended"] != "done" else "step-000002" for cut in cuts]
    late = [cut for cut, name in zip(cuts, whole, strict=True) if cut["found"] != name]
    assert all(cut["found"] == "step-000002" for cut in late), (
        "whole though its process died behind the marker"
    )
    fault.saw("its marker is missing")
    assert all(cut["after"] == "step-000003" and cut["aside"] == [] for cut in cuts)
    fault.goes_on(
        "step 1 is found each time, the next save is whole and clears away what was left of this one",
        lost="a step",
    )


@pytest.mark.fault("F17", "a disk with room for one checkpoint and a half, as the second is saved")
def test_a_full_disk_is_typed_and_leaves_the_checkpoint_before(fault: Fault, tmp_path: Path) -> None:
    room = int(1.5 * saves.SIZE * len(saves.FILES)) // 1024
    script = f"mount -t tmpfs -o size={room}k none {tmp_path} && exec {sys.executable} -m tests.faults.saves"
    command = ["unshare", "-rm", "sh", "-c", f"{script} {tmp_path}/kept full"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    if "mount" in done.stderr or "unshare" in done.stderr:
        pytest.skip(f"NOT TESTED: no file system can be mounted here ({done.stderr.strip()})")
    said = json.loads(done.stdout.splitlines()[-1])
    fault.fired(f"{said['save'][3:].partition('): ')[0].split('(')[-1][:60]}")
    assert (
        "No space left" in said["save"]
        and said["save"].startswith("4: ")
        and "checkpoint.keep" in said["save"]
    )
    assert said["page"].startswith("4: ") and "MiB free" in said["page"]
    fault.saw("InfrastructureError with the free space and the remedy")
    assert said["found"] == "step-000001" and said["why"] == []
    fault.goes_on("the checkpoint before is whole, nothing is left aside", lost="a step")


@pytest.mark.fault("F28", "resumed with {path}={value}")
@pytest.mark.parametrize(
    ("path", "value"), [("seed", 2), ("model.path", "/other"), ("sampler.temperature", 0.9)]
)
def test_a_resume_that_would_be_another_run_is_refused_by_name(
    fault: Fault, begun: Path, path: str, value: object
) -> None:
    found = resume(begun)
    assert found and found.resume
    found.lock.close()
    fault.fired("without it, step 3 is gone on from")
    with pytest.raises(PreflightError, match=rf"^run\.dir=/.*\b{path}.*config\.yaml.*run\.dir"):
        resume(begun, **{path: value})
    fault.refused(f"{path} by name, both values")


@pytest.mark.fault("F28", "resumed by code without a setting that the run had")
def test_a_setting_that_this_version_has_not_is_refused_by_name(fault: Fault, begun: Path) -> None:
    fault.fired("the run's settings hold learner.old_key")
    with pytest.raises(PreflightError, match=r"learner\.old_key"):
        run_directory.compare(begun, {"learner": {"old_key": 1}}, {})
    fault.refused("learner.old_key by name")


HOLDS = """
import sys, time
from pathlib import Path
from entroray.wiring.run_directory import lock_folder
lock = lock_folder(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


@pytest.mark.fault("F47", "a second run in the folder of one that lives, with run.resume=auto")
def test_the_second_run_in_a_folder_is_refused_until_the_first_is_dead(fault: Fault, begun: Path) -> None:
    command = [sys.executable, "-c", HOLDS, str(begun)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        try:
            assert first.stdout and first.stdout.readline() == "held\n"
            fault.fired(f"process {first.pid} holds the folder")
            with pytest.raises(
                PreflightError, match=rf"is being written by another run \(process {first.pid}"
            ):
                resume(begun)
            fault.saw("refused with the other's pid")
        finally:
            first.send_signal(signal.SIGKILL)
            first.wait(timeout=30)
    assert resume(begun)
    fault.goes_on("once the first was killed its folder is gone on with")
