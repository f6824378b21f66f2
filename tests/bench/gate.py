"""What lets a training process go on for so many steps and then hold still, between two steps of its own.

The process that measures opens it (`Side`), the one that trains passes it at the end of every step (`Gate`).
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import psutil

PIPES = "ENTRORAY_BENCH_PIPES"
"""Of the process that trains: the descriptors it is asked by and answers with."""


class Segment(NamedTuple):
    """Steps that were timed together."""

    steps: int
    seconds: float
    tokens: float
    """Response tokens that were trained on."""
    phases: dict[str, float]
    """Seconds of each phase, a step."""

    @property
    def rate(self) -> float:
        """Trained response tokens a second."""
        return self.tokens / self.seconds


class Gate:
    """The side that trains; holds still at its first step."""

    def __init__(self) -> None:
        reading, writing = (int(number) for number in os.environ[PIPES].split(","))
        self.asked, self.answers = os.fdopen(reading), os.fdopen(writing, "w", buffering=1)
        self.steps = self.left = 0
        self.began = self.tokens = self.held = 0.0
        """`held`: seconds it held still after the last step."""
        self.phases: Counter[str] = Counter()

    def step(self, tokens: float, phases: Mapping[str, float]) -> None:
        """A step has ended in which so many tokens were trained on; returns when the next may begin."""
        self.tokens += tokens
        self.phases.update(phases)
        self.left -= 1
        self.held = 0.0
        if self.left > 0:
            return
        self._answer()
        ended = time.perf_counter()
        if not (line := self.asked.readline()):
            self.left = sys.maxsize  # nobody measures: a signal is on its way
        else:
            self.steps = self.left = int(line)
        self.tokens, self.phases, self.began = 0.0, Counter(), time.perf_counter()
        self.held = self.began - ended

    def _answer(self) -> None:
        seconds = time.perf_counter() - self.began
        each = {name: value / max(1, self.steps) for name, value in self.phases.items()}
        with suppress(BrokenPipeError):
            print(json.dumps([self.steps, seconds, self.tokens, each]), file=self.answers)


class Side:
    """A training process held at its first step, and everything that it started."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str], log: Any) -> None:
        reading, out = os.pipe()
        answered, writing = os.pipe()
        pipes = {PIPES: f"{reading},{writing}"}
        self.name, self.log = name, log
        self.process = subprocess.Popen(
            command,
            env={**environment, **pipes},
            pass_fds=(reading, writing),
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        os.close(reading)
        os.close(writing)
        self.out, self.answers = os.fdopen(out, "w", buffering=1), os.fdopen(answered)
        self.memory = 0.0
        """Most MB that its processes have held, shared pages divided among those that share them."""

    def ready(self) -> None:
        """Wait for the end of its first step."""
        self._read()

    def ask(self, steps: int) -> None:
        """Let it go on for so many steps; `read` waits for them."""
        print(steps, file=self.out)

    def run(self, steps: int) -> Segment:
        """Let it go on for so many steps, and hold it again."""
        self.ask(steps)
        return self.read()

    def read(self) -> Segment:
        """What the steps came to that were asked for; its memory is looked at when they are done."""
        segment = Segment(*self._read())
        self.memory = max(self.memory, self._held())
        return segment

    def _read(self) -> list[Any]:
        line = self.answers.readline()
        if not line:
            self.log.flush()
            with open(self.log.name, errors="replace") as log:
                raise AssertionError(f"{self.name} has ended: {log.read()[-3000:]}")
        return json.loads(line)

    def processes(self) -> list[psutil.Process]:
        whole = psutil.Process(self.process.pid)
        return [whole, *whole.children(recursive=True)]

    def _held(self) -> float:
        total = 0
        for each in self.processes():
            with suppress(psutil.Error):
                total += each.memory_full_info().pss
        return total / 2**20

    def close(self) -> None:
        """End it and all that it started."""
        there = self.processes() if self.process.poll() is None else []
        self.out.close()
        self.process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(60)
        for each in there:
            with suppress(psutil.Error):
                each.kill()
        self.process.wait(60)
        self.answers.close()
