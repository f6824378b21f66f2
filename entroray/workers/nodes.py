"""Ray's nodes: what they have, and the place that each actor of a run starts at."""

import os
import re
import socket
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray._private.state import available_resources_per_node
from ray.exceptions import ObjectStoreFullError, OutOfDiskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from entroray.errors import InfrastructureError, PreflightError
from entroray.planning import placement
from entroray.planning.placement import ENGINES, RANKS, Need, Needs, Node, Placement
from entroray.workers import cluster
from entroray.workers.cluster import Share

Shares = Mapping[str, tuple[int, Share]]
"""By role how many actors there are, and what each takes."""
JOINING = 60.0
"""Seconds that nodes of a cluster have to join it, once a run asks for more than there is."""
NODE_ID = "ray.io/node-id"
"""Ray's own label of a node."""


def needs(shares: Shares) -> Needs:
    """Those of the planner."""
    return {role: Need(count, share.cpus, share.gpus) for role, (count, share) in shares.items()}


def alive_nodes(*, free: bool = False) -> list[Node]:
    """Of the cluster, with all that they have, or only what nobody has taken."""
    left = available_resources_per_node() if free else {}
    alive = [n for n in ray.nodes() if n["Alive"]]
    names = [f"{n['NodeManagerHostname']} ({n['NodeManagerAddress']})" for n in alive]
    found = []
    for node, name in zip(alive, names, strict=True):
        id_, has = node["NodeID"], left.get(node["NodeID"], node["Resources"])
        own = f"{name}, {id_[:6]}" if Counter(names)[name] > 1 else name
        found.append(Node(own, has.get("CPU", 0.0), has.get("GPU", 0.0), id_))
    return found


def check_resources(shares: Shares, nodes: Sequence[Node] | None = None, *, pairs: bool = False) -> str:
    """The arithmetic of what every role needs and what `nodes`, by default the cluster's, have.

    PreflightError if they do not hold all actors at once, with the smallest change that does.
    """
    nodes, asked = alive_nodes() if nodes is None else nodes, needs(shares)
    if why := placement.shortage(nodes, asked, pairs=pairs):
        raise PreflightError(why)
    return "; ".join(placement.arithmetic(nodes, asked).values())


def await_resources(shares: Shares, within: float, *, pairs: bool = False) -> str:
    """As `check_resources`, of a cluster whose nodes may still be joining, for `within` seconds."""
    ends, said = time.monotonic() + within, False
    while True:
        try:
            return check_resources(shares, pairs=pairs)
        except PreflightError as error:
            if time.monotonic() >= ends:
                raise
            if not said:
                print(f"waiting at most {within:.0f} s for nodes to join, since {error}", flush=True)
        said = True
        time.sleep(min(1.0, within))


@contextmanager
def object_store() -> Iterator[None]:
    """InfrastructureError where inside something fits neither into Ray's object store nor on its disk."""
    try:
        yield
    except (ObjectStoreFullError, OutOfDiskError) as error:
        size, call = ray.cluster_resources()["object_store_memory"], re.search(r"ray::([\w.]+)", str(error))
        raise InfrastructureError(
            f"Ray's object store ({size / 1e9:.2f} GB on all nodes) and its disk are full, as "
            f"{call[1] if call else 'the driver'} put something there: free that disk, or give Ray more by "
            "ray start --object-store-memory, or RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES if it is the run's"
        ) from error


@dataclass(frozen=True)
class Places:
    """Where the actors of a run start, and what was reserved for it."""

    nodes: Mapping[str, Sequence[str]]
    """By role Ray's node of each actor; none where Ray is to choose."""
    cards: PlacementGroup | None = None
    """A bundle for each card that an engine and a rank share: whatever Ray gives it is on one card."""

    def of(self, role: str) -> Iterator[Any]:
        """Ray's scheduling strategies for the actors of a role in their order, without end: those that come
        later take the place of one that died.

        An engine of several cards is in no placement group, which vLLM would start its workers with Ray in.
        """
        on_cards = self.cards if role in (ENGINES, RANKS) else None
        for bundle, node in enumerate(self.nodes.get(role, ())):
            soft = NodeAffinitySchedulingStrategy(node, soft=True)  # a node that is lost is not waited for
            yield PlacementGroupSchedulingStrategy(on_cards, bundle) if on_cards else soft
        while True:
            yield PlacementGroupSchedulingStrategy(on_cards, -1) if on_cards else "DEFAULT"

    def release(self) -> None:
        """Give up what was reserved."""
        if self.cards:
            remove_placement_group(self.cards)


def plan_cluster(asked: Needs, *, pairs: bool) -> tuple[list[Node], Placement]:
    """The cluster's nodes and who runs where: on what is free, else on what will be, which Ray waits for."""
    for nodes in (alive_nodes(free=True), alive_nodes()):
        if placed := placement.place(nodes, asked, pairs=pairs):
            return nodes, placed
    return nodes, {}


def find_places(shares: Shares, *, pairs: bool) -> Places:
    """As planned; what shares a card is reserved."""
    nodes, placed = plan_cluster(needs(shares), pairs=pairs)
    ids = {role: [nodes[at].id for at in on] for role, on in placed.items()}
    return Places(ids, _reserve(shares, ids[RANKS]) if ids and pairs else None)


def _reserve(shares: Shares, nodes: Sequence[str]) -> PlacementGroup:
    cpus = shares[ENGINES][1].cpus + shares[RANKS][1].cpus
    bundle = {name: size for name, size in (("CPU", cpus), ("GPU", 1.0)) if size}
    where = [{NODE_ID: node} for node in nodes]
    return placement_group([bundle] * len(nodes), "PACK", bundle_label_selector=where)


def describe_places(asked: Needs, *, pairs: bool, assume: bool) -> list[str]:
    """Who will run where: in the cluster that was joined, else here, or with `assume` on nodes that do."""
    if cluster.joined():
        return placement.lines(*plan_cluster(asked, pairs=pairs), asked, pairs=pairs)
    there = [this_machine()]
    if assume and not placement.place(there, asked, pairs=pairs):
        there = placement.assumed_nodes(asked, pairs=pairs)
    return placement.lines(there, placement.place(there, asked, pairs=pairs) or {}, asked, pairs=pairs)


def this_machine() -> Node:
    """Its cores and cards."""
    return Node(socket.gethostname(), float(os.cpu_count() or 1), float(torch.cuda.device_count()))
