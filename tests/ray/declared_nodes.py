"""A Ray of this machine that takes itself for a head and four nodes of eight cards: who gets what, as JSON.

`python -m tests.ray.declared_nodes`; in a process of its own, for one process is in one Ray.
"""

import json
import os
import time
from dataclasses import replace
from typing import Any

import ray
from ray.cluster_utils import Cluster
from ray.util import placement_group_table

from entroray.config import share_cards
from entroray.errors import PreflightError
from entroray.planning.placement import ENGINES, RANKS, VERIFIERS
from entroray.wiring import actors
from entroray.workers import cluster, nodes
from entroray.workers.nodes import Places
from tests.composed import configured

DEADLINE = 60.0
SHARED = ["cluster=node8_shared", "generator.replicas=2", "learner.ranks=2"]
CASES = {
    "one_gpu": ["cluster=one_gpu"],
    "node8": ["cluster=node8"],
    "node8_shared": ["cluster=node8_shared"],
    **{
        f"tp{tp}": ["cluster=nodes4x8", f"generator.tensor_parallel={tp}", f"generator.replicas={16 // tp}"]
        for tp in (1, 2, 4, 8)
    },
    "shared4x8": ["cluster=node8_shared", "generator.replicas=32", "learner.ranks=32", "verifier.replicas=1"],
}


class Probe:
    """An actor that says where it is."""

    def where(self) -> tuple[str, str, bool]:
        """Its node, its cards, and whether it is in a placement group."""
        group = ray.util.get_current_placement_group()
        cards = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        return ray.get_runtime_context().get_node_id(), cards, group is not None


def planned(*overrides: str) -> Places:
    config = configured(*overrides)
    return nodes.find_places(actors.resource_shares(config), pairs=share_cards(config.cluster))


def by_node(places: Places) -> dict[str, list[str]]:
    """As planned, by names of the nodes; with what Ray reserved, once it has."""
    numbers = {n.id: f"{at}" if n.gpus else "head" for at, n in enumerate(nodes.alive_nodes())}
    found = {role: [numbers[node] for node in on] for role, on in places.nodes.items()}
    if places.cards:
        cluster.wait([places.cards.ready()], deadline=DEADLINE, what="cards")
        table: Any = placement_group_table(places.cards)
        found["reserved"] = [numbers[node] for _, node in sorted(table["bundles_to_node_id"].items())]
        places.release()
    return found


def spawned(
    places: Places, *overrides: str, roles: tuple[str, ...] = (ENGINES, RANKS)
) -> dict[str, list[Any]]:
    """A probe in place of every actor, killed once all have said where they are."""
    shares = actors.resource_shares(configured(*overrides))
    at = {role: places.of(role) for role in roles}
    spawn = lambda role: cluster.spawn(Probe, replace(shares[role][1], at=next(at[role])))
    handles = {role: [spawn(role) for _ in range(shares[role][0])] for role in roles}
    ask = lambda each: cluster.wait([h.where.remote() for h in each], deadline=DEADLINE, what="probes")
    found: dict[str, list[Any]] = {role: ask(each) for role, each in handles.items()}
    if places.cards:
        cluster.kill_actors(handles[ENGINES][1:2])  # and one in its place
        found["again"] = ask([spawn(ENGINES)])
    places.release()
    cluster.kill_actors([h for each in handles.values() for h in each])
    return found


def refused(*overrides: str) -> tuple[float, str]:
    began = time.monotonic()
    try:
        actors.check_cluster(configured(*overrides))
    except PreflightError as error:
        return time.monotonic() - began, str(error)
    return 0.0, ""


def main() -> None:
    there = Cluster()
    there.add_node(num_cpus=8, include_dashboard=False)
    for _ in range(4):
        there.add_node(num_cpus=64, num_gpus=8)
    cluster.start(there.address, cpu_only=True)
    plans = {name: by_node(planned(*told)) for name, told in CASES.items()}
    lines = actors.placement_lines(configured(*CASES["tp4"]))
    shared = spawned(planned(*SHARED), *SHARED)
    whole = ["cluster=nodes4x8", "generator.replicas=1", "generator.tensor_parallel=4", "learner.ranks=2"]
    apart = spawned(planned(*whole), *whole, roles=(ENGINES, RANKS, VERIFIERS))
    found = {"plans": plans, "lines": lines, "shared": shared, "apart": apart}
    found["refused"] = refused("cluster=nodes4x8", "learner.ranks=17")
    print(json.dumps(found))
    cluster.stop()
    there.shutdown()


if __name__ == "__main__":
    main()
