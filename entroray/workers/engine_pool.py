"""The generators as one pool: spreads requests, re-issues those of a dead engine, and replaces it."""

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ray.exceptions import RayTaskError

from entroray.engine.adapter import ADAPTER
from entroray.engine.communicator import START
from entroray.engine.generator import Request
from entroray.errors import InfrastructureError, LearnerLostError, SyncError, first_line
from entroray.types import Rollout
from entroray.workers.cluster import SAMPLING, WAITS, await_starts, kill_actors, settle, settle_next
from entroray.workers.heartbeat import Watched
from entroray.workers.weight_sender import WeightSender

GRACE = 30.0
"""Seconds a call over Ray may take beyond the deadline of the items it carries."""
_LOOK = (
    "its own log is printed with ENTRORAY_WORKER_LOGS=1; where it has no memory, lower generator.engine."
    "gpu_memory_utilization, or kv_cache_memory_bytes"
)
_UNSENT = (
    "the weights did not get through (generator.transfer=nccl), though every engine answers: {}\n"
    "Go on from the last checkpoint with the same command and run.resume=auto"
)
PING = START + GRACE
"""Seconds in which an engine answers, that may stand in the start of a group whose members never come."""


@dataclass(eq=False)
class Engine:
    """One generator actor."""

    name: str
    handle: Any
    in_flight: int = 0
    """Samples asked of it that it has not given."""
    lost: bool = False


@dataclass
class PrefixAffinity:
    """Routes a prompt to the engine that served it last, to reuse its prefix cache (rollout/README.md)."""

    slack: int = 16
    """Samples that engine may have in flight beyond the idlest, which otherwise takes the prompt over."""
    capacity: int = 4096
    """Prompts remembered, those served last."""
    engines: dict[str, Engine] = field(default_factory=dict)
    """By prompt; the prompt served longest ago first."""

    def choose(self, prompt_id: str, live: Sequence[Engine]) -> Engine:
        """The engine of `live`, which is not empty, to ask next."""
        idlest = min(live, key=lambda e: e.in_flight)
        previous = self.engines.pop(prompt_id, idlest)
        keep = previous in live and previous.in_flight <= idlest.in_flight + self.slack
        self.engines[prompt_id] = chosen = previous if keep else idlest
        if len(self.engines) > self.capacity:
            del self.engines[next(iter(self.engines))]
        return chosen


@dataclass(eq=False)
class Pending:
    """One request and who waits for its rollouts."""

    request: Request
    answer: asyncio.Future[list[Rollout]]


class EnginePool:
    """Engines that serve the same weights; requests made in one turn of the event loop travel together.

    An engine that is given a whole wave in one call runs it in the same batches every time, so its samples
    do not depend on how fast calls arrived. An engine that dies or gives no answer is dropped, its requests
    go to the others, and `spawn` starts another while `restarts` lasts; it serves once `sender` has brought
    it the weights.
    """

    def __init__(
        self,
        handles: Sequence[Any],
        spawn: Callable[[], Any],
        sender: WeightSender,
        *,
        restarts: int,
        start_deadline: float,
        report: Callable[..., None],
    ):
        self.live = [Engine(f"generator {i}", handle) for i, handle in enumerate(handles)]
        self.spawn, self.sender, self.report = spawn, sender, report
        self.restarts = self.allowed = restarts
        self.start_deadline = start_deadline
        self.started = len(handles)
        self.starting: list[Engine] = []
        """In place of others, until they serve or have failed."""
        self.newcomers: list[Engine] = []
        """Started, but without the weights."""
        self.first_awaited = False
        """Whether the first weights are still to come: newcomers take them with the others."""
        self.cut_short = False
        """Whether an engine died during the last update: the others wait, paused, for it to be made again."""
        self.affinity = PrefixAffinity()
        self.queue: list[Pending] = []
        self.unanswered: set[asyncio.Future[list[Rollout]]] = set()
        self.tasks: set[asyncio.Task[None]] = set()
        self.held: set[asyncio.Task[None]] = set()
        """Requests that wait for an engine."""
        self.learner_lost: LearnerLostError | None = None
        """As seen in a send, which may have left engines paused: none serves before the next learner."""
        self.replacing: set[asyncio.Task[None]] = set()
        self.updating = asyncio.Lock()
        self.changed = asyncio.Event()
        self.last_error = "none was started"

    @property
    def handles(self) -> list[Any]:
        """Of the engines that serve."""
        return [engine.handle for engine in self.live]

    @property
    def all_handles(self) -> list[Any]:
        """Of the engines that serve, then of newcomers."""
        return [engine.handle for engine in (*self.live, *self.newcomers)]

    async def start(self) -> None:
        """Return when all have started or failed; those that failed are replaced, unless none came."""
        self.first_awaited, engines = True, list(self.live)
        try:
            failed = await await_starts([self._await_start(engine) for engine in engines])
        except InfrastructureError as error:
            if any(engine.lost for engine in engines):  # frozen, and replaced if that is allowed
                return await self.wait_for_engine(newcomers=True)
            raise InfrastructureError(f"no generator started ({error}): {_LOOK}") from error
        for index, why in failed.items():
            self.drop(engines[index], why)

    async def _await_start(self, engine: Engine) -> None:
        started, what = engine.handle.start.remote(), f"{engine.name}, starting"
        await settle(started, deadline=self.start_deadline, what=what)

    def watched(self) -> list[Watched]:
        """Every engine there is, for its heartbeat to be looked at."""
        engines = dict.fromkeys((*self.live, *self.newcomers, *self.starting))
        allowed = self.sender.longest if self.updating.locked() else 0.0
        return [Watched(e.handle, partial(self.drop, e), allowed, e.name) for e in engines if not e.lost]

    @property
    def busy(self) -> bool:
        """Whether an engine has samples to draw."""
        return any(engine.in_flight for engine in self.live)

    # --- sampling ---

    async def sample(self, request: Request) -> list[Rollout]:
        """One rollout per seed of `request`; InfrastructureError if no engine, or no learner, is left."""
        if self.learner_lost:
            raise self.learner_lost
        if not self.queue:
            asyncio.get_running_loop().call_soon(self._dispatch)
        pending = Pending(request, asyncio.get_running_loop().create_future())
        self.queue.append(pending)
        self.unanswered.add(pending.answer)
        pending.answer.add_done_callback(self.unanswered.discard)
        return await pending.answer

    def _dispatch(self) -> None:
        """Give every request of the last turn to an engine, all requests of an engine in one call."""
        pending, self.queue = [p for p in self.queue if not p.answer.done()], []
        if not self.live:
            _start(self._dispatch_later(pending), self.held)
            return
        shares: dict[Engine, list[Pending]] = {engine: [] for engine in self.live}
        for each in pending:
            engine = self.affinity.choose(each.request.prompt_id, self.live)
            engine.in_flight += len(each.request.seeds)
            shares[engine].append(each)
        for engine, share in shares.items():
            if share:
                _start(self._serve(engine, share), self.tasks)

    async def _serve(self, engine: Engine, share: list[Pending]) -> None:
        """One call for all of `share`; what a lost engine has not answered is dispatched again."""
        left, began = dict(enumerate(share)), time.monotonic()
        WAITS.trace.change("groups in flight", len(left))
        try:
            deadline = max(p.request.patience for p in share) + GRACE + self.sender.silence
            answers = engine.handle.sample_all.options(num_returns="streaming").remote(
                [p.request for p in share]
            )
            while left:
                found = await settle_next(answers, deadline=deadline, what=f"{engine.name}, {SAMPLING}")
                for index, rollouts in found.items():  # none, where it is at work and none has finished
                    pending = left.pop(index)
                    engine.in_flight -= len(pending.request.seeds)
                    _trace(engine, pending.request, began, rollouts)
                    if not pending.answer.done():
                        pending.answer.set_result(rollouts)
        except InfrastructureError as error:
            raised = f"{error}; where it was only slow, raise rollout.deadline"
            late = isinstance(error.__cause__, TimeoutError)
            self.drop(engine, InfrastructureError(raised) if late else error)
            self.queue += [p for p in left.values() if not p.answer.done()]
            self._dispatch()
        except Exception as error:  # boundary: a request no engine would take; whoever asked is told
            _fail([p.answer for p in left.values()], error)
        finally:
            engine.in_flight -= sum(len(p.request.seeds) for p in left.values())
            WAITS.trace.change("groups in flight", -len(left))

    async def _dispatch_later(self, pending: list[Pending]) -> None:
        try:
            await self.wait_for_engine()
        except InfrastructureError as error:
            _fail([p.answer for p in pending], error)
            return
        self.queue += pending
        self._dispatch()

    async def wait_for_engine(self, *, newcomers: bool = False) -> None:
        """Return when one serves, or has at least started; InfrastructureError when none ever will."""
        while not (self.live or (newcomers and self.newcomers)):
            if self.learner_lost:
                raise self.learner_lost
            if not self.replacing and not self.newcomers:
                raise InfrastructureError(
                    f"no generator is left ({self.last_error}) and generator.restarts={self.allowed} is used "
                    f"up: {_LOOK}, or raise generator.restarts"
                )
            self.changed.clear()
            await self.changed.wait()

    # --- weights ---

    async def update_weights(self, version: int) -> None:
        """Serve the learner's weights as `version` on every engine; SyncError if one holds something else."""
        while not await self._send_weights(version):
            await self.wait_for_engine(newcomers=True)

    async def _send_weights(self, version: int | None) -> bool:
        """False if an engine was lost on the way: try again without it.

        Without `version`, newcomers get the weights last sent, unless an update has changed them since.
        """
        transfer = self.sender.generator.transfer
        async with self.updating:
            if version is None and not self.cut_short and (self.first_awaited or not self.newcomers):
                return True  # they come with the first weights, or have come with an update meanwhile
            if transfer not in ("plasma", ADAPTER):  # ranks would wait in a collective for one that is dead
                await self._drop_unhealthy()
            if not (handles := self.all_handles):
                return False
            try:
                if await self.sender.send(handles, version):
                    self.first_awaited = self.cut_short = False
                    self._admit(handles)
                return True
            except LearnerLostError as error:
                self.learner_lost = error
                _fail(self.unanswered, error)  # engines may be paused: nobody shall wait for them
                self.changed.set()
                raise
            except SyncError:
                raise
            except (InfrastructureError, RayTaskError) as error:
                if not await self._drop_unhealthy():
                    if transfer == "nccl":
                        raise InfrastructureError(_UNSENT.format(first_line(error))) from error
                    raise
                self.cut_short = True
                return False

    async def _drop_unhealthy(self) -> bool:
        """Drop engines and newcomers that do not answer; was there one?"""
        engines = [*self.live, *self.newcomers]
        deadline, what = min(PING, self.sender.deadline), "asked whether it lives"
        await self.call_all(lambda h: h.check_alive.remote(), deadline=deadline, what=what, newcomers=True)
        return any(engine.lost for engine in engines)

    def _admit(self, handles: Sequence[Any]) -> None:
        """Let the newcomers of `handles` serve: they hold the weights that the others hold."""
        joining = [engine for engine in self.newcomers if engine.handle in handles]
        for engine in joining:
            self.report("engine_joined", engine=engine.name)
        self.live += joining
        self.newcomers = [engine for engine in self.newcomers if engine not in joining]
        self.changed.set()

    # --- members ---

    async def call_all(
        self, method: Callable[[Any], Any], *, deadline: float, what: str, newcomers: bool = False
    ) -> dict[str, Any]:
        """`method(handle)` by the name of each engine that serves; one that fails is dropped and left out."""

        async def call(engine: Engine) -> dict[str, Any]:
            try:
                answer = await settle(method(engine.handle), deadline=deadline, what=f"{engine.name}, {what}")
                return {engine.name: answer}
            except InfrastructureError as error:
                self.drop(engine, error)
                return {}

        engines = [*self.live, *(self.newcomers if newcomers else ())]
        answers = await asyncio.gather(*map(call, engines))
        return {name: answer for each in answers for name, answer in each.items()}

    def drop(self, engine: Engine, error: BaseException) -> None:
        """Go on without `engine`, and start another in its place while that is allowed."""
        if engine.lost:
            return
        engine.lost, self.last_error = True, str(error)
        self.live = [e for e in self.live if not e.lost]
        self.newcomers = [e for e in self.newcomers if not e.lost]
        kill_actors([engine.handle])
        replaced, self.restarts = self.restarts > 0, max(0, self.restarts - 1)
        self.report("engine_lost", engine=engine.name, error=str(error), restarts_left=self.restarts)
        if replaced:
            replacement = Engine(f"generator {self.started}", self.spawn())
            self.starting.append(replacement)
            self.started += 1
            task = _start(self._admit_replacement(replacement), self.replacing)
            task.add_done_callback(lambda task: self._replaced(replacement, task))
        self.changed.set()

    async def _admit_replacement(self, engine: Engine) -> None:
        await self._await_start(engine)
        self.newcomers.append(engine)
        self.changed.set()
        while self.all_handles and not await self._send_weights(None):
            pass  # an engine was lost on the way: perhaps this one, and the others wait for an update

    def _replaced(self, engine: Engine, task: asyncio.Task[None]) -> None:
        self.starting.remove(engine)
        if task.cancelled():
            kill_actors([engine.handle])
        elif (error := task.exception()) and not isinstance(error, LearnerLostError):
            self.drop(engine, error)
        self.changed.set()

    async def begin_anew(self, deadline: float) -> None:
        """Serve nothing until another learner's weights come; returns as `drain` does."""
        for task in self.held:  # whoever asked is gone, and engines serve only behind this
            task.cancel()
        self.first_awaited, self.cut_short, self.affinity = True, False, PrefixAffinity()
        async with self.updating:  # what is sent at this moment fails with the learner before
            self.learner_lost, self.cut_short = None, False
            self.sender.disconnect()
            self.sender.attempt += 1
        await self.drain(deadline)

    async def drain(self, deadline: float) -> None:
        """Give up samples under way, return when none is; InfrastructureError after `deadline` seconds."""
        ends, what = time.monotonic() + deadline, "giving up its samples"
        while under_way := [*self.tasks]:
            if time.monotonic() > ends:
                raise InfrastructureError(
                    f"samples of the run before were still under way after {deadline:.0f} s"
                )
            await self.call_all(lambda h: h.abort.remote(), deadline=PING, what=what)
            await asyncio.wait(under_way, timeout=1.0)

    async def close(self) -> None:
        """Cancel what is under way, replacements too, and start none any more."""
        self.restarts = 0
        ended = [*self.tasks, *self.held, *self.replacing]
        for task in ended:
            task.cancel()
        await asyncio.gather(*ended, return_exceptions=True)


def _start(work: Coroutine[Any, Any, None], tasks: set[asyncio.Task[None]]) -> asyncio.Task[None]:
    """A task of `work`, in `tasks` until it is done."""
    task = asyncio.get_running_loop().create_task(work)
    tasks.add(task)
    task.add_done_callback(tasks.discard)
    return task


def _trace(engine: Engine, request: Request, began: float, rollouts: Sequence[Rollout]) -> None:
    """The span of a request that has been answered."""
    if WAITS.trace.path:
        counts = {"samples": len(rollouts), "tokens": sum(r.drawn for r in rollouts)}
        WAITS.trace.span(engine.name, request.prompt_id, began, time.monotonic(), **counts)
        WAITS.trace.change("groups in flight", -1)


def _fail(answers: Iterable[asyncio.Future[Any]], error: Exception) -> None:
    for answer in answers:
        if not answer.done():
            answer.set_exception(error)
