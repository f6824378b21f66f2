"""One run of a soak and the supervisor beside it: starts it, hurts it, starts it again, looks after it."""

import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.faults import soak_faults, soak_machine
from tests.faults.soak_faults import KINDS, fire
from tests.faults.soak_machine import MARK, Processes
from tests.faults.soak_numbers import Fault, left_over, schedule

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = (
    *("experiment=quickstart", "objective=grpo", "rollout.groups_per_step=8", "learner.lr=1e-4"),
    *("learner.updates_per_rollout=1", "generator.replicas=2", "generator.restarts=100"),
    *("checkpoint.every=10", "verifier.replicas=2", "observe.prediction.every=0"),
    *("observe.tokens.every=0", "observe.report=false", "evaluate.final=false", "run.resume=auto"),
)
"""The 0.8 M model of the quickstart, two engines, one rank: a step takes under a second on two idle cores."""
POLL = 0.1
LOOKED = 1.0
"""Seconds between two lists of the processes of the run."""
SAMPLED = 5
"""Steps between samples of memory."""
STALL = 600.0
"""Seconds without a step after which a driver is killed, which is a miss."""
ANSWERED = 300.0
"""Seconds after which a fault is one without an answer, which is a miss, and the next may come."""
GRACE = 60.0
"""Seconds after the end in which everything of a run has to go."""
SPARE = 3
"""Restarts beyond those that faults explain before a soak gives up."""


class Interrupted(Exception):
    """The soak was told to end: the same command goes on."""


def now() -> str:
    """As a run writes the time of an event."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class Log:
    """What happened to a run, a line each, in the order of time; one of another process goes on."""

    def __init__(self, path: Path):
        self.path, self.rows = path, whole_lines(path)
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, kind: str, **fields: Any) -> None:
        row = {"kind": kind, "time": now(), **fields}
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if kind != "memory":
            print(f"  {row['time'][11:19]} {kind} {json.dumps(fields)}", flush=True)

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["kind"] == kind]


class Supervisor:
    """Of one run in `folder`; `every` steps a fault, 0 for none."""

    def __init__(self, folder: Path, *, seed: int, steps: int, every: int):
        self.folder, self.run = folder, folder / "run"
        self.log = Log(folder / "soak.jsonl")
        self.command = [sys.executable, "-m", "entroray", "train", *SETTINGS]
        self.command += [f"seed={seed}", f"run.steps={steps}", f"run.dir={self.run}"]
        faults = schedule(seed, steps, every, list(KINDS)) if every else []
        self.left: list[Fault] = faults[len(self.log.of("fault")) :]
        self.temporary = Path(tempfile.mkdtemp(prefix="soak-"))
        self.processes = Processes(self.temporary.name, self.temporary)
        self.open: dict[str, Any] | None = None
        """The last fault, until it is answered."""
        turns = [row["turn"] for row in self.log.rows if "turn" in row]
        self.step, self.turn, self.moved = last_step(self.run), max(turns, default=0), time.monotonic()
        self.due: tuple[Fault, float] | None = None
        self.looked = 0.0
        self.driver: subprocess.Popen[bytes] | None = None

    def supervise(self) -> None:
        """Return when the run has ended with 0, or was given up; every process of it is gone then."""
        before = self.processes.machine()
        with ExitStack() as ending:
            ending.callback(shutil.rmtree, self.temporary, ignore_errors=True)
            ending.callback(self._end)
            while not self._drive():
                pass
            self._end()
            self._look_over(before)

    def _drive(self) -> bool:
        """One driver from its start to its end; whether it was the last."""
        self.moved, self.driver = time.monotonic(), self._start()
        self.log.add("start", pid=self.driver.pid, step=self.step, turn=self.turn)
        stalled = False
        while (code := self.driver.poll()) is None:
            if time.monotonic() - self.looked > LOOKED:
                self.processes.look(self.driver.pid)
                self.looked = time.monotonic()
            self._advance(self.driver.pid)
            if stalled := time.monotonic() - self.moved > STALL:
                self.driver.kill()
                self.driver.wait(timeout=30.0)
            time.sleep(POLL)
        self._advance(self.driver.pid)
        explained = code == 0 or (not stalled and self._explains(code))
        self.log.add("exit", code=code, step=self.step, turn=self.turn, explained=explained, stalled=stalled)
        if explained:
            self._answer(f"exit {code}" if code else "the end of the run")
        unexplained = sum(not row["explained"] for row in self.log.of("exit"))
        return code == 0 or unexplained > SPARE

    def _start(self) -> subprocess.Popen[bytes]:
        environment = os.environ | {MARK: self.temporary.name, "TMPDIR": str(self.temporary)}
        with (self.folder / "driver.log").open("ab") as out:
            return subprocess.Popen(  # deadline: `_drive` kills it if no step comes
                self.command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL,
                stdout=out, stderr=subprocess.STDOUT, preexec_fn=_die_with_parent,
            )  # fmt: skip

    def _advance(self, driver: int) -> None:
        """Count the steps done, look for the answer to a fault, fire what is due."""
        self._count(driver)
        self._look_for_answer()
        if self.due is None and self.open is None and self.left and self.step >= self.left[0].step:
            self.due = self.left[0], time.monotonic() + self.left[0].delay
        if self.due and time.monotonic() >= self.due[1] and self.driver and self.driver.poll() is None:
            self._fire(self.due[0], driver)

    def _count(self, driver: int) -> None:
        """Steps, those done again too, which are turns; every few of them memory is sampled."""
        step = last_step(self.run)
        passed, self.step = step - self.step, step
        if passed > 0:  # below 0: a driver has gone back to its checkpoint
            sample = (self.turn + passed) // SAMPLED > self.turn // SAMPLED
            self.turn, self.moved = self.turn + passed, time.monotonic()
            for row in soak_machine.memory(self.processes.alive(), driver) if sample else ():
                self.log.add("memory", turn=self.turn, **row)

    def _fire(self, fault: Fault, driver: int) -> None:
        began = now()
        witness = fire(fault.kind, fault.victim, driver, lambda: self.processes.look(driver))
        self._count(driver)  # those that passed meanwhile say nothing of what comes after
        self.due, self.left = None, self.left[1:]
        fired = soak_faults.fired(fault.kind, witness)
        self.log.add("fault", name=fault.kind, step=self.step, turn=self.turn, fired=fired, witness=witness)
        if fired:
            self.open = {"name": fault.kind, "turn": self.turn, "began": began, "at": time.monotonic()}

    def _look_for_answer(self) -> None:
        """The open fault is answered by an event, or, where none is due, by two more steps; or never."""
        if self.open is None or KINDS[self.open["name"]].number == signal.SIGTERM:
            return
        kind = KINDS[self.open["name"]]
        events = whole_lines(self.run / "events.jsonl") if kind.answers else []
        since = {event["kind"] for event in events if event["time"] >= self.open["began"]}
        if heard := next((name for name in kind.answers if name in since), None):
            self._answer(heard)
        elif not kind.answers and not kind.exits and self.turn >= self.open["turn"] + 2:
            self._answer("two more steps")
        elif time.monotonic() > self.open["at"] + ANSWERED:
            self.open = None

    def _explains(self, code: int) -> bool:
        """Whether the open fault may end a driver so."""
        return self.open is not None and code in KINDS[self.open["name"]].exits

    def _answer(self, how: str) -> None:
        if self.open:
            seconds = round(time.monotonic() - self.open["at"], 1)
            self.log.add("answer", name=self.open["name"], how=how, seconds=seconds)
            self.open = None

    def _end(self) -> None:
        """The driver is killed if it lives, which only an interruption does, and its processes waited for."""
        if self.driver and self.driver.poll() is None:
            self.driver.kill()
            self.driver.wait(timeout=30.0)
            self.log.add("interrupted", step=self.step, turn=self.turn, open=bool(self.open))
        until = time.monotonic() + GRACE
        while self.processes.look_closely() and time.monotonic() < until:
            time.sleep(0.2)

    def _look_over(self, before: soak_machine.Machine) -> None:
        after, ours = self.processes.machine(), {process.pid for process in self.processes.alive()}
        ray = sum(file.stat().st_size for file in self.temporary.glob("ray/**/*") if file.is_file())
        sessions = len(list(self.temporary.glob("ray/session_*_*")))
        found = left_over(before, after, ours)
        self.log.add("end", left_over=found, ray_sessions=sessions, ray_mb=round(ray / 2**20, 1))


def whole_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file that may be written to meanwhile."""
    text = path.read_text(errors="replace") if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def last_step(run: Path) -> int:
    """The newest step that a run has written down; 0 before the first."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return 0
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - (1 << 14)))
        found = re.findall(rb'^\{"step": (\d+),.*\}\n', file.read(), re.MULTILINE)
    return int(found[-1]) if found else 0


def _die_with_parent() -> None:
    """A supervisor that is killed leaves no driver; what it had blocked is let through."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
