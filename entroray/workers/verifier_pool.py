"""The verifiers as one pool: each call goes to the least busy, and one that dies is replaced."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from ray.exceptions import RayError

from entroray.errors import EntrorayError, InfrastructureError
from entroray.workers.cluster import await_starts, kill_actors, settle
from entroray.workers.heartbeat import Watched

LOSSES = 3
"""For each verifier of a pool: how many may be lost while no call is answered, before the run ends."""


@dataclass(eq=False)
class _Member:
    """One verifier actor."""

    name: str
    handle: Any
    busy: int = 0
    """Calls that it has not answered."""
    ready: bool = False


class VerifierPool:
    """`count` verifiers that answer independently; a call that loses its verifier is made to another.

    `spawn()` starts an actor, which serves once it has warmed up, within `start_deadline` seconds.
    `report(kind, **fields)` hears of `verifier_lost` and `verifier_joined`.
    """

    def __init__(
        self, count: int, spawn: Callable[[], Any], *, start_deadline: float, report: Callable[..., None]
    ):
        self.spawn, self.start_deadline, self.report = spawn, start_deadline, report
        self.most = LOSSES * count
        self.lost_in_a_row, self.last_error = 0, ""
        self.started = 0
        self.members: list[_Member] = []
        self.joining: set[asyncio.Task[None]] = set()
        self.changed = asyncio.Event()
        for _ in range(count):
            self._spawn()

    @property
    def handles(self) -> list[Any]:
        """Of every verifier that is not lost."""
        return [member.handle for member in self.members]

    def watched(self) -> list[Watched]:
        """Every verifier there is, for its heartbeat to be looked at."""
        return [Watched(m.handle, partial(self._drop, m), 0.0, m.name) for m in self.members]

    async def start(self) -> None:
        """Return when all have warmed up or failed; those that failed are replaced, unless none came."""
        members = list(self.members)
        for index, error in (await await_starts([self._warm_up(m) for m in members])).items():
            self._drop(members[index], error)

    async def call(self, method: Callable[[Any], Any], *, deadline: float) -> Any:
        """`method(handle)` on the least busy verifier, and on another as long as the one asked is lost.

        One is lost if it dies, cannot start a judge process, or gives no answer within `deadline` seconds.
        InfrastructureError if this call has lost too many, or none is left.
        """
        for _ in range(self.most):
            member = await self._least_busy()
            member.busy += 1
            try:
                answer = await settle(method(member.handle), deadline=deadline, what=member.name)
            except InfrastructureError as error:
                self._drop(member, error)
            else:
                self.lost_in_a_row = 0
                return answer
            finally:
                member.busy -= 1
        raise self._used_up()

    async def _least_busy(self) -> _Member:
        while not (ready := [member for member in self.members if member.ready]):
            if not self.members:
                raise self._used_up()
            self.changed.clear()
            await self.changed.wait()  # each start has its deadline
        return min(ready, key=lambda member: member.busy)

    def _used_up(self) -> InfrastructureError:
        return InfrastructureError(
            f"{self.most} verifiers were lost in a row, the last one thus: {self.last_error}. Look at the "
            "memory of their nodes, then lower verifier.slots or verifier.memory_mb"
        )

    def _spawn(self) -> _Member:
        member = _Member(f"verifier {self.started}", self.spawn())
        self.started += 1
        self.members.append(member)
        return member

    async def _warm_up(self, member: _Member) -> None:
        warm, what = member.handle.warm_up.remote(), f"{member.name}, starting"
        await settle(warm, deadline=self.start_deadline, what=what)
        member.ready = True
        self.changed.set()

    def _drop(self, member: _Member, error: BaseException) -> None:
        """Go on without `member`, and start another in its place while that is allowed."""
        if member not in self.members:
            return
        self.members.remove(member)
        kill_actors([member.handle])
        self.lost_in_a_row, self.last_error = self.lost_in_a_row + 1, str(error)
        left = max(0, self.most - self.lost_in_a_row)
        self.report("verifier_lost", verifier=member.name, error=str(error), restarts_left=left)
        if left:
            task = asyncio.get_running_loop().create_task(self._join(self._spawn()))
            self.joining.add(task)
            task.add_done_callback(self.joining.discard)
        self.changed.set()

    async def _join(self, member: _Member) -> None:
        try:
            await self._warm_up(member)
        except (EntrorayError, RayError) as error:
            self._drop(member, error)
        else:
            self.report("verifier_joined", verifier=member.name)

    async def close(self) -> None:
        """Cancel the starts under way, and begin none any more."""
        self.lost_in_a_row = self.most
        for task in self.joining:
            task.cancel()
        await asyncio.gather(*self.joining, return_exceptions=True)
