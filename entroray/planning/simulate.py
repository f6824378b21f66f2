"""The loop as discrete events: engines that batch continuously, a learner, verifiers, a driver, a window."""

import heapq
import random
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Shape:
    """What there is of each role, and what a step is made of."""

    engines: int = 1
    seats: int = 256  # sequences that an engine decodes at once; others queue
    ranks: int = 1
    updates: int = 1
    groups: int = 32
    group_size: int = 8
    max_lag: int = 0
    verifiers: int = 1

    @property
    def responses(self) -> int:
        return self.groups * self.group_size


@dataclass(frozen=True)
class Rates:
    """Seconds of work, alone on its machine; `entroray plan --json` prints them, `--rates` reads them."""

    lengths: tuple[int, ...]  # response tokens, as they are drawn
    decode: float  # one step of an engine, whatever it decodes
    decode_sequence: float = 0.0  # for each sequence in that step
    prefill: float = 0.0  # to begin one sequence
    prompt_tokens: float = 0.0
    learner_update: float = 0.0  # one optimizer update, whatever its size
    learner_token: float = 0.0  # to score and update one token, prompts' too, on one rank
    sync: float = 0.0
    sync_engine: float = 0.0  # for each engine
    verify: float = 0.0  # one response, of one verifier
    driver: float = 0.0  # of the event loop, for each response that comes in
    driver_step: float = 0.0  # of the event loop between two steps, for each response
    kept: float = 1.0  # share of groups that objective.keep keeps
    cores: float = 0.0  # shared by engines and ranks; 0: each has its own
    engine_cores: float = 1.0  # that an engine keeps busy when it is alone
    learner_cores: float = 1.0
    overlap: float = 1.0  # speed of engines and learner at once over that by their share of the cores


@dataclass
class _Group:
    version: int
    left: int


@dataclass
class _Engine:
    """Decodes `active`, a heap of (step at which it ends, serial, group); `debt` is prefill to do first."""

    active: list[tuple[float, int, _Group]] = field(default_factory=list)
    queue: deque[tuple[int, _Group]] = field(default_factory=deque)
    steps: float = 0.0
    debt: float = 0.0
    at: float = 0.0
    stamp: int = 0


class _Loop:
    """`marks` holds the time and what was spent until then at the end of each step."""

    def __init__(self, shape: Shape, rates: Rates) -> None:
        self.shape, self.rates, self.now, self.serial = shape, rates, 0.0, 0
        self.events: list[tuple[float, int, Callable[..., None], tuple]] = []
        self.engines = [_Engine() for _ in range(shape.engines)]
        self.chance, self.version, self.phase = random.Random(0), 0, "sample"
        self.drawn = round(shape.groups / rates.kept)
        """Groups judged for one step, of which `shape.groups` are kept."""
        self.unfinished, self.finished = Counter[int](), Counter[int]()
        self.speed, self.working, self.worked_at, self.stamp = 1.0, 0.0, 0.0, 0
        self.driver_free = self.verifier_free = self.began = 0.0
        self.spent: defaultdict[str, float] = defaultdict(float)
        self.marks = [(0.0, self.spent.copy())]

    def run(self, steps: int) -> None:
        self._fill(self.drawn * (self.shape.max_lag + 1))
        while len(self.marks) <= steps:
            self.now, _, act, arguments = heapq.heappop(self.events)
            act(*arguments)

    def _at(self, seconds: float, act: Callable[..., None], *arguments: object) -> None:
        self.serial += 1
        heapq.heappush(self.events, (seconds, self.serial, act, arguments))

    # Engines.

    def _fill(self, groups: int) -> None:
        """Give groups to the engines by turns."""
        self.unfinished[self.version] += groups
        for engine in self.engines:
            self._advance(engine)
        for _ in range(groups):
            group = _Group(self.version, self.shape.group_size)
            self.serial += 1
            drawn = self.chance.choices(self.rates.lengths, k=group.left)
            self.engines[self.serial % len(self.engines)].queue.extend((n, group) for n in drawn)
        for engine in self.engines:
            self._schedule(engine)
        self._respeed()

    def _step(self, engine: _Engine) -> float:
        return max(1e-9, self.rates.decode + self.rates.decode_sequence * len(engine.active))

    def _advance(self, engine: _Engine) -> None:
        if engine.active:
            work = (self.now - engine.at) * self.speed
            self.spent["generator"] += self.now - engine.at
            paid = min(engine.debt, work)
            engine.debt -= paid
            engine.steps += (work - paid) / self._step(engine)
        engine.at = self.now

    def _schedule(self, engine: _Engine) -> None:
        """Seat who waits, and say when the next sequence ends."""
        while engine.queue and len(engine.active) < self.shape.seats:
            length, group = engine.queue.popleft()
            self.serial += 1
            heapq.heappush(engine.active, (engine.steps + length, self.serial, group))
            engine.debt += self.rates.prefill
        engine.stamp += 1
        if engine.active and self.speed:
            self._at(self.now + self._left(engine) / self.speed, self._decoded, engine, engine.stamp)

    def _left(self, engine: _Engine) -> float:
        """Seconds at full speed until the next sequence ends."""
        return engine.debt + max(0.0, engine.active[0][0] - engine.steps) * self._step(engine)

    def _decoded(self, engine: _Engine, stamp: int) -> None:
        if engine.stamp != stamp:
            return
        self._advance(engine)
        soon = 1e-9 * max(1.0, self.now)  # less than the clock resolves would never pass
        while engine.active and self._left(engine) <= soon:
            group = heapq.heappop(engine.active)[2]
            group.left -= 1
            if not group.left:
                self._judge(group)
        self._schedule(engine)
        self._respeed()

    def _respeed(self) -> None:
        """Share the cores anew; engines stand still in a sync."""
        r, learns = self.rates, self.phase == "learn"
        busy = sum(bool(e.active) for e in self.engines) if r.cores else 0
        demand = busy * r.engine_cores + learns * r.learner_cores * self.shape.ranks
        shared = min(1.0, r.cores / demand) if r.cores and demand else 1.0
        speed = 0.0 if self.phase == "sync" else shared * (r.overlap if learns and busy else 1.0)
        if speed == self.speed:
            return
        for engine in self.engines:
            self._advance(engine)
        self.working -= (self.now - self.worked_at) * self.speed
        self.speed, self.worked_at = speed, self.now
        for engine in self.engines:
            self._schedule(engine)
        self._plan_end()

    # A step.

    def _judge(self, group: _Group) -> None:
        size, r = self.shape.group_size, self.rates
        self.driver_free = max(self.now, self.driver_free) + r.driver * size
        self.verifier_free = (
            max(self.driver_free, self.verifier_free) + r.verify * size / self.shape.verifiers
        )
        self.spent["driver"] += r.driver * size
        self.spent["verifier"] += r.verify * size / self.shape.verifiers
        self._at(self.verifier_free, self._judged, group)

    def _judged(self, group: _Group) -> None:
        self.unfinished[group.version] -= 1
        self.finished[group.version] += 1
        self._take()

    def _take(self) -> None:
        """Begin to learn if there are groups enough and none left behind would grow older than the lag."""
        oldest = self.version - self.shape.max_lag
        late = sum(n for version, n in self.unfinished.items() if version <= oldest)
        if self.phase != "sample" or late or self.finished.total() < self.drawn:
            return
        left = self.drawn
        for version in sorted(self.finished):
            taken = min(left, self.finished[version])
            self.finished[version] -= taken
            left -= taken
        r, s = self.rates, self.shape
        tokens = s.responses * sum(r.lengths) / len(r.lengths)
        self.spent["tokens"] += tokens
        self._enter("learn", "sample")
        read = tokens + r.prompt_tokens * s.responses
        self.working, self.worked_at = (
            r.learner_update * s.updates + r.learner_token * read / s.ranks,
            self.now,
        )
        self._respeed()
        self._plan_end()

    def _enter(self, phase: str, last: str) -> None:
        self.spent[last] += self.now - self.began
        self.phase, self.began = phase, self.now

    def _plan_end(self) -> None:
        self.stamp += 1
        if self.phase == "learn":
            self._at(self.now + max(0.0, self.working) / self.speed, self._learned, self.stamp)

    def _learned(self, stamp: int) -> None:
        if stamp == self.stamp:
            self._enter("sync", "learn")
            self._respeed()
            self._at(self.now + self.rates.sync + self.rates.sync_engine * self.shape.engines, self._synced)

    def _synced(self) -> None:
        self._enter("rest", "sync")
        self._respeed()
        self.driver_free = max(self.now, self.driver_free) + self.rates.driver_step * self.shape.responses
        self._at(self.driver_free, self._committed)

    def _committed(self) -> None:
        self._enter("sample", "rest")
        self.version += 1
        self._fill(self.drawn)
        self.marks.append((self.now, self.spent.copy()))
        self._take()


def simulate(shape: Shape, rates: Rates, warm: int = 2) -> dict[str, float]:
    """Means of the steps after `warm` others: seconds by phase, tokens, idle shares by role.

    With a lag long and short steps may take turns, so that means are of twice as many as take part.
    """
    loop, steps = _Loop(shape, rates), 2 * (shape.max_lag + 1)
    loop.run(warm + steps)
    (begun, before), (ended, after) = loop.marks[warm], loop.marks[-1]
    seconds = (ended - begun) / steps
    spent = {name: (after[name] - before[name]) / steps for name in after}
    at_work = {
        "generator": spent["generator"] / shape.engines,
        "learner": spent["learn"] + spent["sync"],
        "verifier": spent["verifier"],
        "driver": spent["driver"] + spent["rest"],
    }
    phases = {name: spent[name] for name in ("sample", "learn", "sync", "rest")}
    idle = {f"idle/{role}": max(0.0, 1 - work / seconds) for role, work in at_work.items()}
    return {"seconds": seconds, "tokens/per_second": spent["tokens"] / seconds, **phases, **idle}


def bounds(shape: Shape, rates: Rates) -> dict[str, float]:
    """Seconds of a step if a role took no time, or all responses had their mean length; the least first."""
    mean = round(sum(rates.lengths) / len(rates.lengths))
    without = {
        "engines": replace(rates, decode=0.0, decode_sequence=0.0, prefill=0.0),
        "long responses": replace(rates, lengths=(mean,)),
        "learner": replace(rates, learner_update=0.0, learner_token=0.0),
        "sync": replace(rates, sync=0.0, sync_engine=0.0),
        "verifiers": replace(rates, verify=0.0),
        "driver": replace(rates, driver=0.0, driver_step=0.0),
    }
    found = {name: simulate(shape, of)["seconds"] for name, of in without.items()}
    return dict(sorted(found.items(), key=lambda item: item[1]))
