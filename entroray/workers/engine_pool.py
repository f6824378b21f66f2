"""The generators as one: whole waves handed out, what a dead engine held re-issued, the dead replaced."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayTaskError

from entroray.errors import InfrastructureError
from entroray.types import Rollout
from entroray.workers.cluster import settle, settle_next
from entroray.workers.generator import Request

GRACE = 30.0
"""Seconds a call over Ray may take beyond the deadline of the items it carries."""


@dataclass(eq=False)
class Engine:
    """One generator actor and how many samples it owes."""

    name: str
    handle: Any
    owes: int = 0


@dataclass
class PrefixAffinity:
    """Which engine served a prompt last: what its cache knows of the prompt is read again for nothing.

    A request goes there unless that engine owes more than `ahead` samples more than the one that owes least,
    which is then the home. The `most` prompts served last are remembered. Seeds make a sample the same on
    any engine, so this moves work, not results.
    """

    ahead: int = 16
    most: int = 4096
    known: dict[str, Engine] = field(default_factory=dict)
    """The prompt served longest ago first."""

    def choose(self, prompt_id: str, live: Sequence[Engine]) -> Engine:
        """The engine of `live`, of which there is one, to ask next."""
        least = min(live, key=lambda e: e.owes)
        home = self.known.pop(prompt_id, least)
        chosen = home if home in live and home.owes <= least.owes + self.ahead else least
        self.known[prompt_id] = chosen
        if len(self.known) > self.most:
            del self.known[next(iter(self.known))]
        return chosen


@dataclass(eq=False)
class Pending:
    """One request and who waits for its rollouts."""

    request: Request
    answer: asyncio.Future[list[Rollout]]


class EnginePool:
    """Engines that serve the same weights; requests made in one turn of the event loop travel together.

    Together, because an engine that is given a whole wave in one call runs it in the same batches every
    time: what it samples does not depend on how fast calls arrived. An engine that dies or gives no
    answer is dropped, its requests go to the others, and `spawn` starts another while `restarts` lasts;
    it serves once `WeightSync` has brought it the weights (`mend`, or the next sync).
    """

    def __init__(
        self,
        handles: Sequence[Any],
        spawn: Callable[[], Any],
        *,
        restarts: int,
        start_deadline: float,
        report: Callable[..., None],
    ):
        self.live = [Engine(f"generator {i}", handle) for i, handle in enumerate(handles)]
        self.spawn, self.restarts, self.start_deadline, self.report = spawn, restarts, start_deadline, report
        self.started = len(handles)
        self.newcomers: list[Engine] = []
        self.mend: Callable[[], Awaitable[None]] | None = None
        self.homes = PrefixAffinity()
        self.queue: list[Pending] = []
        self.tasks: set[asyncio.Task[None]] = set()
        self.replacing: set[asyncio.Task[None]] = set()
        self.changed = asyncio.Event()
        self.last = "none was started"

    @property
    def handles(self) -> list[Any]:
        """Of the engines that serve."""
        return [engine.handle for engine in self.live]

    async def sample(self, request: Request) -> list[Rollout]:
        """One rollout per seed of `request`; InfrastructureError when no engine is left to give them."""
        if not self.queue:
            asyncio.get_running_loop().call_soon(self._hand_out)
        asked = Pending(request, asyncio.get_running_loop().create_future())
        self.queue.append(asked)
        return await asked.answer

    def _hand_out(self) -> None:
        """Everything asked for since the last turn, each request to an engine that knows its prompt."""
        asked, self.queue = [a for a in self.queue if not a.answer.done()], []
        if not self.live:
            self._keep(self._wait_and_ask(asked))
            return
        shares: dict[Engine, list[Pending]] = {engine: [] for engine in self.live}
        for each in asked:
            engine = self.homes.choose(each.request.prompt_id, self.live)
            engine.owes += len(each.request.seeds)
            shares[engine].append(each)
        for engine, share in shares.items():
            if share:
                self._keep(self._serve(engine, share))

    def _keep(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _serve(self, engine: Engine, share: list[Pending]) -> None:
        """One call for all of `share`; answers as they come, the rest asked again when the engine is lost."""
        left = dict(enumerate(share))
        deadline = max(a.request.deadline for a in share) + GRACE
        try:
            answers = engine.handle.sample_all.options(num_returns="streaming").remote(
                [a.request for a in share]
            )
            while left:
                index, rollouts = await settle_next(
                    answers, deadline=deadline, what=f"{engine.name}, sampling"
                )
                asked = left.pop(index)
                engine.owes -= len(asked.request.seeds)
                if not asked.answer.done():
                    asked.answer.set_result(rollouts)
        except InfrastructureError as error:
            self.lose(engine, error)
            self.queue += [a for a in left.values() if not a.answer.done()]
            self._hand_out()
        except RayTaskError as error:  # a request that no engine would take: not the engine's fault
            _fail(left.values(), error)

    async def _wait_and_ask(self, asked: list[Pending]) -> None:
        try:
            await self.ready()
        except InfrastructureError as error:
            _fail(asked, error)
            return
        self.queue += asked
        self._hand_out()

    async def ready(self) -> None:
        """Returns when an engine serves; InfrastructureError when there is none and none will come."""
        while not self.live:
            self._demand_hope()
            self.changed.clear()
            await self.changed.wait()

    async def arrived(self) -> None:
        """As `ready`, but an engine that still waits for its weights will do."""
        while not self.newcomers and not self.live:
            self._demand_hope()
            self.changed.clear()
            await self.changed.wait()

    def _demand_hope(self) -> None:
        if not self.replacing and not self.newcomers:
            raise InfrastructureError(
                f"no generator is left ({self.last}) and generator.restarts is used up: look at the "
                "engine's own log, then raise generator.restarts or lower its memory"
            )

    def there(self) -> list[Any]:
        """Of the engines that serve, and of those that will once they have the weights."""
        return self.handles + [engine.handle for engine in self.newcomers]

    async def all(self, method: Callable[[Any], Any], *, deadline: float, what: str) -> list[Any]:
        """`method(handle)` of every engine that serves, in order; those that fail are lost, not answered."""

        async def one(engine: Engine) -> list[Any]:
            try:
                return [await settle(method(engine.handle), deadline=deadline, what=f"{engine.name}, {what}")]
            except InfrastructureError as error:
                self.lose(engine, error)
                return []

        return [answer for answers in await asyncio.gather(*map(one, self.live)) for answer in answers]

    def lose(self, engine: Engine, error: Exception) -> None:
        """Serve without `engine` from now on, and start another in its place while that is allowed."""
        if engine not in self.live:
            return
        self.live.remove(engine)
        self.last = str(error)
        ray.kill(engine.handle)
        self.report("engine_lost", engine=engine.name, error=str(error), restarts_left=self.restarts)
        if self.restarts > 0:
            self.restarts -= 1
            task = asyncio.get_running_loop().create_task(self._replace())
            self.replacing.add(task)
            task.add_done_callback(self._replaced)
        self.changed.set()

    async def _replace(self) -> None:
        engine = Engine(f"generator {self.started}", self.spawn())
        self.started += 1
        start = engine.handle.start.remote()
        await settle(start, deadline=self.start_deadline, what=f"{engine.name}, starting")
        self.newcomers.append(engine)
        self.changed.set()
        if self.mend is not None:
            await self.mend()

    def _replaced(self, task: asyncio.Task[None]) -> None:
        self.replacing.discard(task)
        if not task.cancelled() and (error := task.exception()):
            self.last, self.newcomers = str(error), []
            self.report("engine_not_replaced", error=str(error))
        self.changed.set()

    def admit(self, handles: Sequence[Any]) -> None:
        """The engines behind `handles` hold the weights that the others hold: they serve too."""
        joining = [engine for engine in self.newcomers if engine.handle in handles]
        for engine in joining:
            self.report("engine_joined", engine=engine.name)
        self.live += joining
        self.newcomers = [engine for engine in self.newcomers if engine not in joining]
        self.changed.set()

    async def idle(self, deadline: float) -> None:
        """Returns when no samples are under way; InfrastructureError after `deadline` seconds."""
        if self.tasks and (await asyncio.wait(self.tasks, timeout=deadline))[1]:
            raise InfrastructureError(
                f"samples of the run before were still under way after {deadline:.0f} s"
            )

    async def close(self) -> None:
        """Cancel what is under way, replacements too."""
        for task in (*self.tasks, *self.replacing):
            task.cancel()
        await asyncio.gather(*self.tasks, *self.replacing, return_exceptions=True)


def _fail(asked: Iterable[Pending], error: Exception) -> None:
    for each in asked:
        if not each.answer.done():
            each.answer.set_exception(error)
