"""Where Ray starts what is planned, on nodes whose cards are declared."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from entroray.planning.placement import ENGINES, RANKS, VERIFIERS
from tests.ray import declared_nodes


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    command = [sys.executable, "-m", declared_nodes.__name__]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=580, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_engines_are_whole_on_a_node_and_ranks_fill_as_few_as_hold_them(found: Any) -> None:
    plans = found["plans"]
    for tp in (1, 2, 4, 8):
        plan = plans[f"tp{tp}"]
        assert len(set(plan[RANKS])) == 2 and len(set(plan[ENGINES])) == 2, plan
        assert not set(plan[RANKS]) & set(plan[ENGINES])
    assert len(set(plans["node8"][RANKS] + plans["node8"][ENGINES])) == 1
    for plan in plans.values():
        assert set(plan[VERIFIERS][:8]) == {"head"}, "the node without cards, while it has room"
    assert len(found["lines"]) == 5
    assert any(line.endswith("verifiers 0-3; 4 of 8 CPU") for line in found["lines"])


def test_ray_reserves_cards_on_the_nodes_of_the_plan_in_its_order(found: Any) -> None:
    for name in ("one_gpu", "node8_shared", "shared4x8"):
        plan = found["plans"][name]
        assert plan["reserved"] == plan[ENGINES] == plan[RANKS]
    assert len(set(found["plans"]["node8_shared"]["reserved"])) == 1


def test_an_engine_and_the_rank_of_its_number_are_on_one_card_and_no_other_is(found: Any) -> None:
    engines, ranks = found["shared"][ENGINES], found["shared"][RANKS]
    assert engines == ranks and len({(node, cards) for node, cards, _ in engines}) == 2
    assert all(len(cards.split(",")) == 1 for _, cards, _ in engines)


def test_an_engine_that_replaces_another_is_on_its_card(found: Any) -> None:
    assert found["shared"]["again"] == [found["shared"][ENGINES][1]]


def test_an_engine_of_several_cards_has_them_on_one_node_and_is_in_no_placement_group(found: Any) -> None:
    """In one, vLLM would have Ray start its workers."""
    ((node, cards, grouped),) = found["apart"][ENGINES]
    assert len(set(cards.split(","))) == 4 and not grouped
    ranks = found["apart"][RANKS]
    assert len({at for at, _, _ in ranks}) == 1 and len({(at, own) for at, own, _ in ranks}) == 2
    assert found["apart"][VERIFIERS][0][0] not in (node, ranks[0][0])


def test_a_cluster_that_is_too_small_is_refused_at_once_with_the_arithmetic(found: Any) -> None:
    seconds, said = found["refused"]
    assert seconds < 5 and "GPU: 8 generators x 2 + 17 learner ranks x 1 = 33 of 32" in said
    assert "learner.ranks=16" in said
