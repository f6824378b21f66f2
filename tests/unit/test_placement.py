"""Who runs where, on nodes as they come: against what holds of every plan, and against trying them all."""

import random
from importlib.util import find_spec
from itertools import product
from math import inf
from pathlib import Path
from typing import Any

import pytest
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from entroray.errors import ConfigError, PreflightError
from entroray.planning import placement
from entroray.planning.placement import ENGINES, RANKS, VERIFIERS, Need, Node
from entroray.wiring import actors, memory, preflight
from entroray.wiring.parts import build_parts
from entroray.workers import nodes
from entroray.workers.cluster import Share
from entroray.workers.nodes import Places
from tests.composed import configured

HEAD = Node("head", 16.0, 0.0)
A, B = "a" * 56, "b" * 56
"""Ids of nodes, as Ray has them."""


def cards(*gpus: float, cpus: float = 64.0) -> list[Node]:
    return [Node(f"n{at}", cpus, each, f"id{at}") for at, each in enumerate(gpus)]


def asked(engines: int, of: float, ranks: int, *, gpus: float = 1.0, verifiers: int = 1) -> dict[str, Need]:
    return {
        ENGINES: Need(engines, 1.0, of),
        RANKS: Need(ranks, 1.0, gpus),
        VERIFIERS: Need(verifiers, 1.0),
    }


def placed(there: list[Node], needs: dict[str, Need], *, pairs: bool = False) -> Any:
    return placement.place(there, needs, pairs=pairs)


@pytest.mark.parametrize(("engines", "of"), [(16, 1), (8, 2), (4, 4), (2, 8)])
def test_engines_of_any_size_are_whole_and_ranks_fill_two_of_four_nodes(engines: int, of: int) -> None:
    found = placed(cards(8, 8, 8, 8), asked(engines, of, 16, verifiers=engines))
    first = [0] * (8 // of) + [1] * (8 // of)
    assert found[RANKS] == ([2] * 8 + [3] * 8 if of > 1 else [0] * 8 + [1] * 8)
    assert found[ENGINES] == (first if of > 1 else [at + 2 for at in first])
    assert len(found[VERIFIERS]) == engines


def test_engine_and_rank_of_a_number_share_a_card_and_ranks_are_in_the_order_of_nodes() -> None:
    needs = asked(16, 0.5, 16, gpus=0.5)
    found = placed(cards(8, 8), needs, pairs=True)
    assert found[ENGINES] == found[RANKS] == [0] * 8 + [1] * 8
    assert placed(cards(8, 4), needs, pairs=True) is None
    one = placed(cards(1), asked(1, 0.5, 1, gpus=0.5), pairs=True)
    assert one == {ENGINES: [0], RANKS: [0], VERIFIERS: [0]}


def test_in_a_mixed_cluster_everybody_goes_where_the_others_need_it_least() -> None:
    there = [HEAD, *cards(8, 4, 4)]
    found = placed(there, asked(2, 4, 8, verifiers=2))
    assert found == {ENGINES: [2, 3], RANKS: [1] * 8, VERIFIERS: [0, 0]}
    found = placed(there, asked(2, 1, 4))
    assert found[RANKS] == [2] * 4 and found[ENGINES] == [3, 3], "the node of eight is left whole"
    none_left = [Node("head", 0.0, 0.0), *cards(8)]
    assert placed(none_left, asked(4, 1, 4))[VERIFIERS] == [1]


def test_engines_on_cpus_go_where_most_are_free() -> None:
    there = [Node("a", 1.0, 0), Node("b", 1.0, 0), Node("c", 0.5, 0)]
    needs = {ENGINES: Need(1, 1.0), RANKS: Need(1, 1.0), VERIFIERS: Need(1, 0.5)}
    assert placed(there, needs) == {ENGINES: [1], RANKS: [0], VERIFIERS: [2]}


def test_two_parts_of_a_card_share_one_only_if_they_fit() -> None:
    two = lambda gpus: placed(cards(1), {**asked(2, gpus, 1, gpus=0.0), RANKS: Need(1, 1.0)})
    assert two(0.4) and two(0.5) and two(0.6) is None


def every_plan(there: list[Node], engines: int, of: int, ranks: int) -> list[tuple[int, ...]]:
    """The nodes of ranks in each way there is."""
    ways = product(range(len(there)), repeat=engines + ranks)
    held = lambda way, at: sum(of if i < engines else 1 for i, there in enumerate(way) if there == at)
    return [way[engines:] for way in ways if all(held(way, at) <= n.gpus for at, n in enumerate(there))]


def test_a_plan_is_found_where_there_is_one_and_ranks_of_it_are_on_few_nodes() -> None:
    drawn = random.Random(3)
    for _ in range(60):
        there = cards(*(drawn.randint(0, 4) for _ in range(drawn.randint(1, 3))))
        engines, of, ranks = drawn.randint(1, 2), drawn.choice([1, 2, 4]), drawn.randint(1, 4)
        ways = every_plan(there, engines, of, ranks)
        found = placed(there, asked(engines, of, ranks))
        assert bool(found) is bool(ways), (there, engines, of, ranks)
        if found and of == 1:
            assert len(set(found[RANKS])) == min(len(set(way)) for way in ways)


def test_what_does_not_fit_is_refused_with_the_arithmetic_and_the_smallest_change() -> None:
    why = placement.shortage(cards(8), asked(4, 1, 8), pairs=False)
    assert why and "GPU: 4 generators x 1 + 8 learner ranks x 1 = 12 of 8" in why
    assert "that does: learner.ranks=4;" in why
    why = placement.shortage(cards(6, 6), asked(3, 4, 0), pairs=False)
    assert why and "enough in all" in why and "that does: generator.replicas=2;" in why
    why = placement.shortage(cards(4, 4), asked(1, 8, 0), pairs=False)
    assert why and "cannot be spread" in why and "that does: generator.tensor_parallel=4;" in why
    why = placement.shortage(cards(4), asked(8, 0.5, 8, gpus=0.5), pairs=True)
    assert why and "that does: generator.replicas=4 learner.ranks=4;" in why
    why = placement.shortage(cards(8, cpus=2.0), asked(4, 1, 4), pairs=False)
    assert why and "CPU: " in why and "cluster.cpus" in why and "that does" not in why
    assert placement.shortage(cards(8), asked(4, 1, 4), pairs=False) is None


def test_every_smallest_change_is_one_that_does() -> None:
    for gpus in range(1, 9):
        words = placement.smallest_change(cards(gpus, gpus), asked(4, 4, 4), pairs=False)
        said = dict(word.split("=") for word in words.split()) if words else {}
        less = asked(
            int(said.get("generator.replicas", 4)),
            int(said.get("generator.tensor_parallel", 4)),
            int(said.get("learner.ranks", 4)),
        )
        assert words is not None and placed(cards(gpus, gpus), less), gpus
        assert ("tensor_parallel" in words) is (gpus < 4), "fewer shards are the last thing"


def test_an_actor_larger_than_every_node_is_refused_by_name() -> None:
    shares = {ENGINES: (1, Share(1, 4, 1)), RANKS: (2, Share(1, 1, 1)), VERIFIERS: (1, Share(0.1, 0, 1))}
    there = [Node("a", 8.0, 0), Node("b", 8.0, 2.0), Node("c", 8.0, 4.0)]
    assert "6 of 6" in nodes.check_resources(shares, there)
    with pytest.raises(PreflightError, match=r" generators: 1 CPU, 4 GPU .*generator\.tensor_parallel"):
        nodes.check_resources(shares, [*there[:2], there[1], there[1]])
    with pytest.raises(PreflightError, match=r" GPU: 1 generators x 4 \+ 2 .* = 6 of 4\. "):
        nodes.check_resources(shares, [there[2]])


def test_the_table_has_a_line_for_each_node_that_somebody_runs_on() -> None:
    there = [HEAD, *cards(8, 8, 4)]
    needs = asked(2, 4, 8, verifiers=2)
    found = placement.lines(there, placed(there, needs), needs, pairs=False)
    assert found == [
        "head: verifiers 0-1; 2 of 16 CPU",
        "n0: generators 1 with 4 GPU each; 4 of 8 GPU, 1 of 64 CPU",
        "n1: learner ranks 0-7; 8 of 8 GPU, 8 of 64 CPU",
        "n2: generators 0 with 4 GPU each; 4 of 4 GPU, 1 of 64 CPU",
    ]
    needs = asked(2, 0.5, 2, gpus=0.5)
    found = placement.lines(cards(2), placed(cards(2), needs, pairs=True), needs, pairs=True)
    assert found == [
        "n0: generators 0-1 and learner ranks 0-1, a card for each two, verifiers 0; 2 of 2 GPU, 5 of 64 CPU"
    ]
    assert placement._spans([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"


def test_a_run_that_this_machine_cannot_hold_is_shown_on_nodes_of_eight(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    found = actors.placement_lines(configured("cluster=nodes4x8"))
    assert [line.partition(":")[0] for line in found] == [
        f"node {n}, taken to have 8 GPU" for n in range(1, 5)
    ]
    assert "generators 0-3 with 2 GPU each" in found[0] and "learner ranks 8-15" in found[3]
    assert placement.assumed_nodes(asked(1, 16, 1), pairs=False)[0] == Node(
        "node 1, taken to have 16 GPU", inf, 16
    )
    assert actors.placement_lines(configured("learner.ranks=9000")) == [], "the start says why"
    (line,) = actors.placement_lines(configured())
    assert "generators 0, learner ranks 0, verifiers 0; " in line and "GPU" not in line


def test_actors_start_on_the_nodes_of_the_plan_and_later_ones_where_there_is_room() -> None:
    whole = Places({ENGINES: [A, B], RANKS: [A]}).of(ENGINES)
    first, second, later = next(whole), next(whole), next(whole)
    assert isinstance(first, NodeAffinitySchedulingStrategy), "vLLM would take Ray's executor in a group"
    assert (first.node_id, second.node_id, first.soft, later) == (A, B, True, "DEFAULT")
    assert next(Places({}).of(RANKS)) == "DEFAULT"


def test_engine_and_rank_start_in_one_bundle_and_a_new_engine_in_the_one_with_room() -> None:
    group: Any = object()
    pairs = Places({ENGINES: [A, A], RANKS: [A, A], VERIFIERS: [B]}, group)
    for role in (ENGINES, RANKS):
        given = pairs.of(role)
        found = [next(given) for _ in range(3)]
        assert all(isinstance(each, PlacementGroupSchedulingStrategy) for each in found)
        assert [each.placement_group_bundle_index for each in found] == [0, 1, -1]
    assert isinstance(next(pairs.of(VERIFIERS)), NodeAffinitySchedulingStrategy)


@pytest.mark.parametrize(
    ("overrides", "setting"),
    [
        (["generator.replicas=4"], r"generator\.replicas=4, learner\.ranks=8"),
        (["generator.tensor_parallel=2"], r"generator\.tensor_parallel=2"),
        (["cluster.gpus_per_learner=0.6"], r"gpus_per_learner=0\.6.*0\.5"),
        (["cluster.gpus_per_learner=1", "cluster.gpus_per_generator=1"], r"gpus_per_learner=1.*0\.5"),
        (["generator.sleep=false", "generator.transfer=plasma", "generator.replicas=4"], "replicas=4"),
        (["driver.max_lag=1"], r"generator\.sleep .*driver\.max_lag=0"),
    ],
)
def test_cards_are_shared_by_as_many_engines_as_ranks_and_by_turns(
    overrides: list[str], setting: str
) -> None:
    assert configured("cluster=node8_shared").generator.replicas == 8
    with pytest.raises(ConfigError, match=setting):
        configured("cluster=node8_shared", *overrides)


def test_verifiers_on_gpus_are_as_many_as_engines() -> None:
    count = lambda *told: actors.resource_shares(configured(*told))[VERIFIERS][0]
    assert count() == count("generator.replicas=3") == count("cluster=one_gpu") == 1
    assert count("cluster=nodes4x8") == 8 and count("cluster=node8_shared") == 8
    assert count("cluster=nodes4x8", "verifier.replicas=3") == 3


def test_memory_that_another_process_may_not_open_is_refused_where_cards_are_shared_by_ipc(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refuse = lambda cluster: preflight._refuse_expandable(configured(f"cluster={cluster}"))
    for told in ("expandable_segments:True", "max_split_size_mb:64,expandable_segments: true"):
        monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", told)
        refuse("gpu")
        with pytest.raises(PreflightError, match=r"generator\.transfer=ipc.*expandable_segments.*plasma"):
            refuse("one_gpu")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:False")
    refuse("one_gpu")


@pytest.mark.parametrize("name", memory.memory.TABLE)
def test_what_cards_are_shown_to_hold_is_what_the_settings_of_each_cluster_make(name: str) -> None:
    config = configured(f"cluster={name}", "rollout.max_tokens=512")
    count, layout = memory.memory.TABLE[name]
    made = memory.layout(config, build_parts(config).objective)
    of_lengths = {"longest": made.longest, "served": made.served}
    assert made == memory.memory.replace(layout, **of_lengths)
    needs = nodes.needs(actors.resource_shares(config))
    assert sum(n.count * n.gpus for n in needs.values()) == count


@pytest.mark.parametrize(
    ("name", "size", "card"),
    [
        ("one_gpu", "1.5B", 80),
        ("node8", "1.5B", 80),
        ("node8", "7B", 80),
        ("node8_shared", "1.5B", 80),
        ("node8_shared", "7B", 80),
        ("nodes4x8", "1.5B", 80),
        ("nodes4x8", "7B", 80),
        ("nodes4x8", "32B", 80),
    ],
)
def test_what_each_cluster_is_for_fits_as_it_is_with_responses_of_8k(name: str, size: str, card: int) -> None:
    told = [
        f"cluster={name}",
        f"model.path=Qwen/Qwen2.5-{size}",
        "learner.lr=1e-6",
        "rollout.max_tokens=8192",
    ]
    config = configured(*told)
    assert f"of {card * 0.985:.1f} GiB" in memory.check_cards(
        config, build_parts(config).objective, card * memory.NAMED
    )


@pytest.mark.parametrize(("name", "size"), [("one_gpu", "1.5B"), ("node8_shared", "7B")])
def test_an_engine_that_starts_anew_beside_a_rank_finds_the_share_that_vllm_asks_for(
    name: str, size: str
) -> None:
    """It asks for `gpu_memory_utilization` of the card also where keys and values have bytes of their own."""
    found = find_spec("vllm")
    assert found and found.origin
    worker = Path(found.origin).parent / "v1" / "worker"
    assert "if init_snapshot.free_memory < requested_memory:" in (worker / "utils.py").read_text()
    assert "if kv_cache_memory_bytes := self.cache_config" in (worker / "gpu_worker.py").read_text()
    config = configured(f"cluster={name}", f"model.path=Qwen/Qwen2.5-{size}", "learner.lr=1e-6")
    s, card = memory.layout(config, build_parts(config).objective), 80 * memory.NAMED
    states = sum(memory.memory.learner_states(memory.QWEN[size].parameters, s).values())
    free = card * (1 - memory.memory.RESERVE) - states
    assert s.kv_bytes and s.utilisation * card < free < 0.92 * card
