"""Who runs on which node: engines whole, ranks on as few nodes as hold them; or why not, and what helps."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, product
from math import ceil, floor, inf

ENGINES, RANKS, VERIFIERS = "generators", "learner ranks", "verifiers"
SETTINGS = {ENGINES: "generator.replicas", RANKS: "learner.ranks", VERIFIERS: "verifier.replicas"}
KINDS = {"CPU": "cpus", "GPU": "gpus"}
USUAL = 8
"""Cards of a node that nothing is known of."""
EPS = 1e-9


@dataclass(frozen=True)
class Node:
    """A machine, or what of it is free."""

    name: str
    cpus: float
    gpus: float
    id: str = ""
    """Ray's."""


@dataclass(frozen=True)
class Need:
    """How many actors of a role there are, and what each takes of its node."""

    count: int
    cpus: float
    gpus: float = 0.0

    @property
    def cards(self) -> float:
        """Of a node: an actor is never given parts of two cards, so that two of 0.4 cards share one."""
        return 1 / floor(1 / self.gpus + EPS) if 0 < self.gpus < 1 else self.gpus


Needs = Mapping[str, Need]
"""By role: `ENGINES`, `RANKS`, `VERIFIERS`."""
Placement = Mapping[str, Sequence[int]]
"""By role the node of each of its actors, as a place in the list of nodes."""


class _Room:
    """What is left of each node, as actors are placed."""

    def __init__(self, nodes: Sequence[Node]):
        self.cpus, self.cards = [n.cpus for n in nodes], [n.gpus for n in nodes]

    def fits(self, at: int, need: Need, most: int = 1) -> int:
        """How many such actors a node takes, up to `most`."""
        pairs = (self.cpus[at], need.cpus), (self.cards[at], need.cards)
        return floor(min([most, *(have / want for have, want in pairs if want)]) + EPS)

    def take(self, at: int, need: Need, count: int) -> list[int]:
        self.cpus[at] -= count * need.cpus
        self.cards[at] -= count * need.cards
        return [at] * count

    def put(self, need: Need, first: Callable[[int], tuple[float, ...]], together: bool) -> list[int] | None:
        """Each on the node that comes `first` of those with room; `together` on as few nodes as hold all."""
        placed: list[int] = []
        while left := need.count - len(placed):
            able = [at for at in range(len(self.cpus)) if self.fits(at, need)]
            if not able:
                return None
            count = {at: self.fits(at, need, left) if together else 1 for at in able}
            best = min(able, key=lambda at: (-count[at], *first(at)))
            placed += self.take(best, need, count[best])
        return placed


def place(nodes: Sequence[Node], needs: Needs, *, pairs: bool) -> Placement | None:
    """The node of every actor; None where the nodes do not hold them.

    Ranks take as few nodes as hold them, so that most collectives stay within a node. An engine of several
    cards comes before them and goes where it leaves the fewest over, one of a single card after them, one of
    CPUs where most are free. With `pairs` each engine is on the card of the rank of its number. Verifiers go
    where no cards are, and where most CPUs are free.
    """
    room, engine, rank = _Room(nodes), needs[ENGINES], needs[RANKS]
    smallest = lambda at: (room.cards[at], room.cpus[at])
    idlest = lambda at: (-room.cpus[at],)
    found: dict[str, list[int] | None] = {}
    if pairs:
        both = Need(rank.count, engine.cpus + rank.cpus, 1.0)
        found[ENGINES] = found[RANKS] = room.put(both, smallest, True)
    for role in () if pairs else (ENGINES, RANKS) if engine.gpus > 1 else (RANKS, ENGINES):
        first = smallest if role == RANKS or engine.gpus else idlest
        found[role] = room.put(needs[role], first, role == RANKS)
    found[VERIFIERS] = room.put(needs[VERIFIERS], lambda at: (nodes[at].gpus > 0, -room.cpus[at]), False)
    placed = {role: at for role in SETTINGS if (at := found[role]) is not None}
    return placed if len(placed) == len(SETTINGS) else None


def assumed_nodes(needs: Needs, *, pairs: bool) -> list[Node]:
    """As few nodes of 8 cards as hold such a run, or one of as many cards as it has."""
    cards = needs[RANKS].count if pairs else ceil(sum(n.count * n.cards for n in needs.values()) - EPS)
    size = max(1, needs[ENGINES].gpus, min(USUAL, cards))
    names = (f"node {n}, taken to have {size:g} GPU" for n in range(1, cards + 2))
    nodes: list[Node] = []
    while not place(nodes, needs, pairs=pairs):
        nodes.append(Node(next(names), inf, size))
    return nodes


def _total(of: Iterable[Node | Need], kind: str) -> float:
    return sum(getattr(x, KINDS[kind]) * getattr(x, "count", 1) for x in of)


def arithmetic(nodes: Sequence[Node], needs: Needs) -> dict[str, str]:
    """What every role needs and what the nodes have, by kind."""
    rows = {}
    for kind, field in KINDS.items():
        each = {role: getattr(n, field) for role, n in needs.items()}
        terms = " + ".join(f"{needs[role].count} {role} x {size:g}" for role, size in each.items() if size)
        rows[kind] = f"{kind}: {terms or '0'} = {_total(needs.values(), kind):g} of {_total(nodes, kind):g}"
    return rows


def shortage(nodes: Sequence[Node], needs: Needs, *, pairs: bool) -> str | None:
    """Why the nodes do not hold the actors, with the arithmetic and the smallest change; None if they do."""
    if place(nodes, needs, pairs=pairs):
        return None
    rows = arithmetic(nodes, needs)
    short = [rows[kind] for kind in KINDS if _total(needs.values(), kind) > _total(nodes, kind) + EPS]
    each = "; ".join(f"{role}: {n.cpus:g} CPU, {n.gpus:g} GPU each" for role, n in needs.items())
    sizes = ", ".join(f"{n.cpus:g} CPU and {n.gpus:g} GPU" for n in nodes)
    apiece = (
        f"no nodes hold, though there is enough in all, {each}. Nodes have {sizes}, and an actor cannot be"
    )
    why = f"the cluster is too small: {'; '.join(short)}" if short else f"{apiece} spread over nodes"
    change = smallest_change(nodes, needs, pairs=pairs)
    done = f"The smallest change that does: {change}; or" if change else "Lower cluster.cpus.*, or"
    return f"{why}. {done} join more or larger nodes"


def smallest_change(nodes: Sequence[Node], needs: Needs, *, pairs: bool) -> str | None:
    """The fewest settings with which all have a place and the fewest cards, then CPUs, are given up; fewer
    shards of an engine only where fewer engines do not do."""
    have = {kind: _total(nodes, kind) + EPS for kind in KINDS}
    holds = lambda less: all(_total(less.values(), kind) <= most for kind, most in have.items())
    tried = sorted((each for each in _smaller(needs, pairs) if holds(each[2])), key=lambda each: each[0])
    return next((words for _, words, less in tried if place(nodes, less, pairs=pairs)), None)


def _smaller(needs: Needs, pairs: bool) -> Iterator[tuple[tuple[float, ...], str, Needs]]:
    """Fewer actors and fewer shards: what decides between them, the settings, what is needed then."""
    parallel = int(needs[ENGINES].gpus)
    shards = [parallel >> n for n in range(parallel.bit_length())] or [parallel]
    for tp, *numbers in product(shards, *(_fewer(need.count) for need in needs.values())):
        less = {r: replace(n, count=count) for (r, n), count in zip(needs.items(), numbers, strict=True)}
        words = [f"{SETTINGS[r]}={n.count}" for r, n in less.items() if n != needs[r]]
        if tp != parallel:
            less[ENGINES] = replace(less[ENGINES], gpus=float(tp))
            words.append(f"generator.tensor_parallel={tp}")
        if not pairs or less[ENGINES].count == less[RANKS].count:
            kept = [-_total(less.values(), kind) for kind in ("GPU", "CPU")]
            yield (tp != parallel, *kept, len(words)), " ".join(words), less


def _fewer(count: int) -> set[int]:
    """Up to three less, a half, a quarter, ..., one."""
    return {count, *range(max(1, count - 3), count), *(count >> n for n in range(count.bit_length()))}


def lines(nodes: Sequence[Node], placed: Placement, needs: Needs, *, pairs: bool) -> list[str]:
    """A line for each node that somebody runs on."""
    found = []
    for at, node in enumerate(nodes if placed else ()):
        held = {role: [i for i, there in enumerate(on) if there == at] for role, on in placed.items()}
        said = [f"{role} {_spans(own)}{_size(needs[role])}" for role, own in held.items() if own]
        if pairs and held[RANKS]:
            said[:2] = [f"{said[0]} and {said[1]}, a card for each two"]
        here = {role: replace(n, count=len(held[role])) for role, n in needs.items()}
        have = {"GPU": node.gpus, "CPU": node.cpus}
        of = [
            f"{_total(here.values(), kind):g} of {most:g} {kind}"
            for kind, most in have.items()
            if 0 < most < inf
        ]
        if said:
            found.append(f"{node.name}: {', '.join(said)}; {', '.join(of)}")
    return found


def _size(need: Need) -> str:
    return f" with {need.gpus:g} GPU each" if need.gpus > 1 else ""


def _spans(numbers: Sequence[int]) -> str:
    """0, 1, 2, 5 as `0-2, 5`."""
    runs = [[n for _, n in run] for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
