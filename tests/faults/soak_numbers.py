"""What a soak decides by arithmetic: which fault when, what grew, what is left over, who won."""

import math
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""The 0.975 quantiles of Student's t with 1, 2, ... 9 degrees of freedom."""
LOSING_SIDE = 0.05
"""How far below 0 the interval of the difference of mean reward may reach."""
SETTLED = 50
"""Steps of its life after which a process is expected to have all the memory that it needs."""
FEWEST = 6
"""Samples, from then on, that a line is laid through."""
GROWTH = 0.05
"""Share of its mean that a process may grow by, from then to its end."""


class Fault(NamedTuple):
    """One of a schedule: what, after which step, how late in the next one, and to which victim."""

    step: int
    kind: str
    delay: float
    """Seconds after that step, below 1."""
    victim: float
    """In [0, 1): where in the list of those that it could hit."""


def schedule(seed: int, steps: int, every: int, kinds: Sequence[str]) -> list[Fault]:
    """About one fault each `every` steps, the gaps from 2/3 to 4/3 of it, each kind before one comes twice.

    The last comes two steps before the end, so that what heals it is seen.
    """
    draw, found, bag, step = random.Random(seed), list[Fault](), list[str](), 0
    while True:
        step += draw.randint(every - every // 3, every + every // 3)
        if step > steps - 2:
            return found
        bag = bag or draw.sample(list(kinds), len(kinds))
        found.append(Fault(step, bag.pop(), round(draw.random(), 3), round(draw.random(), 3)))


def growth(steps: Sequence[float], values: Sequence[float]) -> float:
    """The rise of the line of least squares from the first to the last of `steps`, as a share of the mean."""
    mean = statistics.fmean(values)
    slope = statistics.linear_regression(steps, values).slope
    return slope * (max(steps) - min(steps)) / mean if mean else 0.0


class Growth(NamedTuple):
    """Of one process, from `SETTLED` steps of its life on; None where it did not live long enough."""

    role: str
    pid: int
    steps: int
    """Of its life."""
    mb: float | None = None
    memory: float | None = None
    descriptors: float | None = None

    @property
    def holds(self) -> bool:
        """Whether it grew by no more than it may, or died too early to tell."""
        return all(share is None or share <= GROWTH for share in (self.memory, self.descriptors))


def growths(samples: Sequence[Mapping[str, Any]]) -> list[Growth]:
    """One for each process of `samples` ({role, pid, born, turn, mb, descriptors}), as they came."""
    of = dict[tuple[int, float], list[Mapping[str, Any]]]()
    for sample in samples:
        of.setdefault((sample["pid"], sample["born"]), []).append(sample)
    return [_growth(rows) for rows in of.values()]


def _growth(rows: Sequence[Mapping[str, Any]]) -> Growth:
    first, role, pid = rows[0]["turn"], rows[0]["role"], rows[0]["pid"]
    life, late = rows[-1]["turn"] - first, [row for row in rows if row["turn"] - first >= SETTLED]
    if len(late) < FEWEST:
        return Growth(role, pid, life)
    turns, mb = [row["turn"] for row in late], [row["mb"] for row in late]
    descriptors = growth(turns, [row["descriptors"] for row in late])
    return Growth(
        role, pid, life, round(statistics.fmean(mb), 1), round(growth(turns, mb), 4), round(descriptors, 4)
    )


class Interval(NamedTuple):
    """95 % of a mean difference, by Student's t over pairs."""

    mean: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """`holds`, or what it misses."""
        if not self.low <= 0 <= self.high:
            return "MISS: it does not hold 0"
        if self.low < -LOSING_SIDE:
            return f"MISS: it reaches {-self.low:.3f} below 0, {LOSING_SIDE} are allowed"
        return "holds"


def interval(differences: Sequence[float]) -> Interval | None:
    """None from fewer than two pairs; ValueError from more than ten."""
    pairs = len(differences)
    if pairs < 2:
        return None
    if pairs > len(T_975) + 1:
        raise ValueError(f"{pairs} seeds: the table of Student's t goes to {len(T_975) + 1}")
    mean = statistics.fmean(differences)
    half = T_975[pairs - 2] * statistics.stdev(differences) / math.sqrt(pairs)
    return Interval(mean, mean - half, mean + half)


@dataclass(frozen=True)
class Machine:
    """What a run could leave behind: each thing, and the processes that hold it."""

    processes: Mapping[str, set[int]] = field(default_factory=dict)
    shared: Mapping[str, set[int]] = field(default_factory=dict)
    """Files of /dev/shm."""
    ports: Mapping[str, set[int]] = field(default_factory=dict)
    """Listening, as `127.0.0.1:8265`."""
    folders: Mapping[str, set[int]] = field(default_factory=dict)
    """In the run's folder for temporary files."""
    descriptors: Mapping[str, set[int]] = field(default_factory=dict)
    """Open in the process that supervises, which started and ended all the others."""


KEPT = ("ray/", "torchinductor_")
"""Beginnings of temporary folders kept on purpose: Ray's logs, one a driver, and what torch compiled."""


def left_over(before: Machine, after: Machine, ours: set[int]) -> list[str]:
    """What is new and held by nobody, or by one of `ours`: what others on the machine hold is theirs."""
    found = list[str]()
    for name in Machine.__dataclass_fields__:
        was, now = getattr(before, name), getattr(after, name)
        new = {thing: holders for thing, holders in now.items() if thing not in was}
        found += [f"{name}: {thing}" for thing, by in new.items() if not by or by & ours]
    kept = tuple(f"folders: {beginning}" for beginning in KEPT)
    return sorted(each for each in found if not each.startswith(kept))
