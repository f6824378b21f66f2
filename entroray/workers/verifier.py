"""Judges responses in processes of their own, so that no answer can hold, crash or fool the run.

Judges on servers are asked from here, while these processes judge (`entroray/reward/served.py`). Every judge
process (forked by `judge_forkserver`, in milliseconds) has its own process group, memory limit and socket,
serves one item at a time, and is killed with its group at the item's deadline. Contained, not sandboxed:
files and network are open. What the judge `code` runs is sandboxed, in processes of `program_server`.
"""

import asyncio
import json
import math
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import psutil

from entroray.binding import effective_settings
from entroray.errors import ConfigError, InfrastructureError
from entroray.reward.judges import OWN
from entroray.reward.parts import judge_parts, sum_parts
from entroray.reward.served import ServedJudges, bind_judge
from entroray.reward.tools import Call
from entroray.reward.verdicts import Response, as_verdict, failed, graded
from entroray.train.pulse import TURN, TURNS, Beat, Pulse
from entroray.types import Answer, Prompt, Rollout, Status, Verdict
from entroray.workers.judge_forkserver import FORK, HEADER

ITEMS_PER_WORKER = 1000
"""A worker is replaced after so many items, so that a leak in a judge cannot grow into its memory limit."""

_MAX_MESSAGE = 1 << 28
_START_DEADLINE = 120.0
"""Seconds for a fork server or a worker to start, the judge built."""
_SAYING = 5.0
"""Seconds beyond its own deadline that a judge of ours has to say what it found."""
LOOK = 2.0
"""Seconds between two looks at whether a process of a verifier is stopped."""
_CLOSE_DEADLINE = 10.0
"""Seconds the fork server has to end itself and its workers."""

_ENVIRONMENT = {
    name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "PYTHONUNBUFFERED")
}


class Verifier:
    """`slots` judge processes; one verdict per rollout, each within `deadline` seconds of its own start.

    `reward` is what `entroray.reward.build_verification` takes by keyword. `memory_mb` bounds what one
    worker may allocate beyond what it starts with; `output` is the descriptor that what judges print goes to,
    this process's own by default; `patience` are the seconds that a server which is not well is given. The
    constructor does not wait for the judge; serves one event loop.
    """

    def __init__(
        self,
        reward: Mapping[str, Any],
        *,
        slots: int = 2,
        deadline: float = 10.0,
        memory_mb: int | None = 2048,
        output: int | None = None,
        patience: float = math.inf,
    ):
        if slots < 1 or deadline <= 0:
            raise ConfigError(f"verifier.slots={slots} and verifier.deadline={deadline} must be above 0")
        self._reward, self._memory_mb, self._output = dict(reward), memory_mb, output
        self._deadline, self._width, self._slots = deadline, slots, asyncio.Semaphore(slots)
        self._patience, self._judges = patience, self._reward["judges"]
        self._parts = {domain: judge_parts(judge) for domain, judge in self._judges.items()}
        self._idle: deque[_Worker] = deque()
        self._pids = set[int]()
        """Of judge processes that wait or judge."""
        self._watch: asyncio.Task[None] | None = None
        self._forking, self._closed = asyncio.Lock(), False
        self._server = _ForkServer(self._reward, memory_mb, output)

    @cached_property
    def _served(self) -> ServedJudges:
        """Made at the first call, whose error a caller gets as it is."""
        return ServedJudges(self._reward, self._deadline, self._patience)

    @cached_property
    def _own_deadlines(self) -> dict[tuple[str, str], float | None]:
        """Seconds by domain and part, of judges of ours that have their own."""
        parts = {(domain, name): spec for domain, of in self._parts.items() for name, spec in of.items()}
        bound = {at: bind_judge(spec) for at, spec in parts.items() if spec.get("fn") in OWN}
        return {at: effective_settings(judge).get("deadline") for at, judge in bound.items()}

    async def warm_up(self) -> None:
        """Return once every slot has its worker; raises ConfigError when the judge cannot be built."""
        _ = self._served
        if not self._watch:
            self._watch = asyncio.create_task(self._look())
            self._watch.add_done_callback(_tell)
        while len(self._idle) < self._width:
            self._idle.append(await self._fork())

    async def judge(self, prompt: Prompt, rollouts: Sequence[Rollout]) -> list[Verdict]:
        """One verdict per rollout, in order; a truncated response keeps that status beside its reward.

        Raises InfrastructureError when no worker can be started at all.
        """
        return list(await asyncio.gather(*(self._judge(prompt, r) for r in rollouts)))

    async def answer(self, prompt: Prompt, calls: Sequence[str]) -> list[Answer]:
        """One answer of the tool of `reward` per call, in order; raises as `judge` does."""
        verdicts = await asyncio.gather(*(self._local(prompt, Call(call)) for call in calls))
        return [Answer(str(v.answer or ""), not v.correct, v.status, v.detail) for v in verdicts]

    async def _look(self) -> None:
        """Count turns of the loop, and kill those of its processes that have been stopped for too long."""
        TURNS.limit, pulses = TURN, dict[int, Pulse]()
        while True:
            await asyncio.sleep(LOOK)
            TURNS.count += 1
            pulses = {pid: pulses.get(pid) or Pulse() for pid in (self._server.pid, *self._pids)}
            for pid, pulse in pulses.items():
                if pulse.look(_beat_of(pid), LOOK):
                    _kill(pid)  # a fork server takes its own along

    def close(self) -> None:
        """End every process this verifier started; what is still being judged fails."""
        self._closed = True
        if self._watch:
            self._watch.cancel()
        for worker in self._idle:
            worker.channel.close()
        self._idle.clear()
        if "_served" in vars(self):
            self._served.close()
        self._server.close()

    async def _judge(self, prompt: Prompt, rollout: Rollout) -> Verdict:
        if not rollout.status.usable:
            return failed("not judged: the response itself failed", rollout.status)
        judge, response = self._judges.get(prompt.domain, {}), Response(rollout.text, rollout.length)
        parts = self._parts.get(prompt.domain, {"": {}})  # without a judge a process says so
        asked = [self._part(prompt, response, name, spec) for name, spec in parts.items()]
        found = await asyncio.gather(*asked) if len(asked) > 1 else [await asked[0]]
        verdict = sum_parts(judge, dict(zip(parts, found, strict=True)))
        cut = verdict.status is Status.OK and rollout.status is Status.TRUNCATED
        return replace(verdict, status=Status.TRUNCATED) if cut else verdict

    async def _part(self, prompt: Prompt, response: Response, name: str, spec: Mapping[str, Any]) -> Verdict:
        """The verdict of one part of the judge of a prompt's domain; "" is the whole of it."""
        at = prompt.domain, name
        if at not in self._served.judges:
            return await self._local(prompt, response, name, ours=spec.get("fn") in OWN)
        verdict = await self._served.judge(at, response, prompt)
        if self._closed:
            raise InfrastructureError("this verifier is closed")
        return verdict

    async def _local(self, prompt: Prompt, text: str, part: str = "", *, ours: bool = False) -> Verdict:
        item, own = pickle.dumps((text, prompt, part)), self._own_deadlines.get((prompt.domain, part))
        deadline = own + _SAYING if ours and own else self._deadline
        async with self._slots:
            verdict = await self._attempt(item, deadline, ours)
            verdict = verdict or await self._attempt(item, deadline, ours, fresh=True)
        return verdict or failed("two judge processes died over this response", Status.INFRA_FAILED)

    async def _attempt(
        self, item: bytes, deadline: float, ours: bool, *, fresh: bool = False
    ) -> Verdict | None:
        """The verdict, or None if the worker died; a worker is reused only after a good verdict.

        An answer that a judge of `ours` has worked on until the deadline is wrong: a policy that writes
        10^{10^{10}} is not drawn anew. One that a busy machine kept from working has failed, as any other.
        """
        worker = self._idle.popleft() if self._idle and not fresh else await self._fork()
        reusable, before = False, _cpu_seconds(worker.pid)
        try:
            async with asyncio.timeout(deadline):
                verdict = await worker.evaluate(item)
            reusable = verdict.status.usable and worker.served < ITEMS_PER_WORKER
            return verdict
        except TimeoutError:
            if _is_stopped(worker.pid):
                return None  # that is nothing the response did
            late = f"no verdict within {deadline:g} s"
            worked = _cpu_seconds(worker.pid) - before > deadline / 4
            return graded(False, None, late) if ours and worked else failed(late, Status.TIMEOUT)
        except (OSError, EOFError):
            return None
        finally:
            if reusable:
                self._idle.append(worker)
            else:
                worker.channel.close()
                self._pids.discard(worker.pid)
                self._server.kill(worker.pid)

    async def _fork(self) -> "_Worker":
        """A fresh worker; if the fork server is gone, another is started, once."""
        async with self._forking:
            for last in (False, True):
                if not self._server.healthy and not self._closed:
                    await asyncio.to_thread(self._server.close)  # the loop turns meanwhile
                    again = self._reward, self._memory_mb, self._output
                    self._server = await asyncio.to_thread(_ForkServer, *again)
                if self._closed:
                    self._server.close()
                    raise InfrastructureError("this verifier is closed")
                try:
                    async with asyncio.timeout(_START_DEADLINE):
                        worker = await self._server.fork()
                    self._pids.add(worker.pid)
                    return worker
                except (OSError, EOFError) as error:  # TimeoutError is an OSError
                    if last:
                        raise InfrastructureError(
                            f"no judge process could be started ({error!r}): see the verifier's log"
                        ) from error
        raise AssertionError("unreachable")


@dataclass
class _Worker:
    """The verifier's end of one judge process."""

    pid: int
    channel: socket.socket
    served: int = 0

    async def evaluate(self, item: bytes) -> Verdict:
        self.served += 1
        await asyncio.get_running_loop().sock_sendall(self.channel, HEADER.pack(len(item)) + item)
        return _decode(await _receive(self.channel))


class _ForkServer:
    """The verifier's end of the fork server; `healthy` until it fails to answer."""

    def __init__(self, reward: Mapping[str, Any], memory_mb: int | None, output: int | None):
        self._control, theirs = socket.socketpair()
        self._control.settimeout(_START_DEADLINE)
        try:
            with theirs:
                self._launch(theirs.fileno(), [json.dumps(reward), json.dumps(memory_mb)], output)
            (length,) = HEADER.unpack(self._control.recv(HEADER.size, socket.MSG_WAITALL))
            self.pid = int(self._control.recv(length, socket.MSG_WAITALL))
        except (OSError, struct.error, subprocess.SubprocessError) as error:
            raise InfrastructureError("the verifier's fork server did not start: see its log") from error
        self._control.setblocking(False)
        self._ready, self.healthy = False, True

    def _launch(self, fd: int, settings: list[str], output: int | None) -> None:
        """Return as soon as the fork server has detached itself, long before it has built its judge."""
        path = os.pathsep.join(filter(None, sys.path))
        subprocess.run(
            [sys.executable, "-P", "-m", "entroray.workers.judge_forkserver", str(fd), *settings],
            pass_fds=[fd],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            env=os.environ | _ENVIRONMENT | {"PYTHONPATH": path},
            timeout=_START_DEADLINE,
        )

    async def fork(self) -> _Worker:
        """A fresh worker; raises ConfigError if the judge cannot be built, EOFError if the server is gone."""
        self.healthy = False
        if not self._ready:
            if refusal := (await _receive(self._control)).decode():
                raise ConfigError(refusal)
            self._ready = True
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with theirs:
            socket.send_fds(self._control, [HEADER.pack(FORK)], [theirs.fileno()])
        worker = _Worker(int(await _receive(self._control)), ours)
        self.healthy = True
        return worker

    def kill(self, pid: int) -> None:
        """Kill the process group of worker `pid`; a server that is gone has taken its workers along."""
        try:
            self._control.send(HEADER.pack(pid))
        except BlockingIOError:  # it reads no commands: the next `_fork` replaces it, and kills its workers
            self.healthy = False
        except OSError:
            return

    def close(self) -> None:
        """End it and its workers, their groups included, within _CLOSE_DEADLINE seconds; once."""
        if self._control.fileno() < 0:
            return
        if not self._ready:  # still importing: it has no workers yet
            _kill(self.pid)
        self._control.settimeout(_CLOSE_DEADLINE)
        try:
            self._control.shutdown(socket.SHUT_WR)
            while self._control.recv(1 << 16):
                pass
        except OSError:
            _kill(self.pid)
        self._control.close()


def _tell(watch: asyncio.Task[None]) -> None:
    """Have who looks at heartbeats know that nobody looks at judge processes any more."""
    if not watch.cancelled() and (error := watch.exception()):
        TURNS.failure = f"what looks at its judge processes has failed: {error!r}"


def _cpu_seconds(pid: int) -> float:
    """What a process has had of the processors; 0 for one that is gone."""
    try:
        return sum(psutil.Process(pid).cpu_times()[:2])
    except psutil.Error:
        return 0.0


def _is_stopped(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
    except psutil.Error:
        return False


def _beat_of(pid: int) -> Beat:
    """Another at each call, except of a process that is stopped and has not run since the last."""
    with suppress(psutil.Error):
        if _is_stopped(pid):
            return Beat(psutil.Process(pid).num_ctx_switches(), 1)
    return Beat(object(), 1)


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


async def _receive(channel: socket.socket) -> bytes:
    """One message from a worker or the fork server; EOFError if the other side is gone."""
    (length,) = HEADER.unpack(await _receive_exactly(channel, HEADER.size))
    if not 0 <= length <= _MAX_MESSAGE:
        raise EOFError(f"a message of {length} bytes")
    return await _receive_exactly(channel, length)


async def _receive_exactly(channel: socket.socket, count: int) -> bytes:
    loop, parts = asyncio.get_running_loop(), bytearray()
    while len(parts) < count:
        part = await loop.sock_recv(channel, min(count - len(parts), 1 << 20))
        if not part:
            raise EOFError("the other side is gone")
        parts += part
    return bytes(parts)


def _decode(message: bytes) -> Verdict:
    """A verdict as JSON, never pickle: what comes back may have been written by a hostile answer."""
    try:
        return as_verdict(Verdict(**json.loads(message)), "the judge process")
    except (ValueError, TypeError, AttributeError) as error:
        return failed(f"the judge process sent no verdict: {error}")
