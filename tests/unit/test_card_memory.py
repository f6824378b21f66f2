"""What cards hold, against arithmetic and DeepSpeed's own estimates; what is refused, and the way out."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from entroray import cli
from entroray.config import Config
from entroray.errors import ConfigError, PreflightError
from entroray.planning import memory as planning
from entroray.planning.memory import GIB, NAMED, QWEN, Layout, ModelShape, learner_states
from entroray.policy import head
from entroray.wiring import memory, preflight
from entroray.wiring.parts import build_parts
from tests.composed import configured

NONE: Any = SimpleNamespace(needs=())
SEVEN = "model.path=Qwen/Qwen2.5-7B-Instruct", "learner.lr=1e-6"
RANK = Layout(2, 8704, ranks=4)


def counted(m: ModelShape, *, tied: bool) -> int:
    """Parameters of a Qwen2, by its equations: biases of queries, keys and values, two norms a layer."""
    attention = (m.width + 1) * (m.queries + 2 * m.keys) + m.queries * m.width
    layer = attention + 3 * m.width * m.intermediate + 2 * m.width
    return m.vocabulary * m.width * (1 if tied else 2) + m.layers * layer + m.width


@pytest.mark.parametrize("size", QWEN)
def test_the_shapes_of_qwen_have_as_many_parameters_as_they_say(size: str) -> None:
    assert counted(QWEN[size], tied=size == "1.5B") == QWEN[size].parameters


@pytest.mark.parametrize("ranks", [1, 4, 16])
def test_states_are_those_of_deepspeeds_own_estimates(ranks: int) -> None:
    """It counts gradients of ZeRO 2 in both precisions, where those in bf16 go as they come, and gathers a
    layer in ZeRO 3, which we count with its buckets."""
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as three
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs as two

    n, s = 7_615_616_512, replace(RANK, ranks=ranks)
    ours = {stage: sum(learner_states(n, replace(s, zero_stage=stage)).values()) for stage in (2, 3)}
    assert two(n, ranks, cpu_offload=False)[1] == pytest.approx(ours[2] + 2 * n / ranks)
    assert three(n, 0, ranks, cpu_offload=False)[1] == pytest.approx(ours[3] + 0 * n)
    host = {stage: replace(s, zero_stage=stage, host_optimizer=True) for stage in (2, 3)}
    assert two(n, ranks, cpu_offload=True)[1] == sum(learner_states(n, host[2]).values())
    offloaded = three(n, 0, ranks, cpu_offload=True, cpu_offload_params=False)[1]
    assert offloaded == pytest.approx(sum(learner_states(n, host[3]).values()))


def test_zero_1_in_bf16_holds_every_gradient_in_both_precisions_on_each_rank() -> None:
    states = learner_states(QWEN["7B"].parameters, RANK)
    assert states["gradients"] == 6 * QWEN["7B"].parameters
    assert states["Adam moments"] == 2 * QWEN["7B"].parameters


def test_activations_are_those_that_a_layer_keeps_of_every_token() -> None:
    m = ModelShape(layers=2, width=8, intermediate=16, queries=8, keys=4, vocabulary=32, parameters=1000)
    layer = 2 * (4 + 4) * 8 + 2 * (16 + 8 + 64)
    assert planning.layer_bytes(m, 2) == layer == 304
    s = Layout(2, longest=10, token_budget=100)
    kept = lambda **told: planning.learner_work(m, replace(s, **told))["activations"] / 100
    assert kept() == 2.5 * layer + 64
    assert kept(checkpoint_every=1) == 1.5 * layer + 2 * 16 + 64
    assert kept(checkpoint_every=2) == 2.5 * layer + 16 + 64
    assert kept(checkpoint_every=1, host_activations=True) == 1.5 * layer + 64
    assert kept(longest=200) == 2 * kept(), "a row longer than the budget stands alone"


def test_a_tile_and_a_weight_gradient_are_those_of_the_head() -> None:
    work = planning.learner_work(QWEN["1.5B"], RANK)
    assert planning.TILE == 4 * head.CARD_TILE_ELEMENTS
    assert work["head"] - planning.TILES * planning.TILE == 6 * 151_936 * 1536


def test_keys_and_values_are_what_is_left_of_a_share_and_no_more_than_the_card_has() -> None:
    card, s = 80 * NAMED, replace(RANK, utilisation=0.85)
    engine = planning.engine_bytes(QWEN["7B"], s, card)
    assert sum(engine.values()) == pytest.approx(0.85 * card)
    assert planning.engine_bytes(QWEN["7B"], replace(s, kv_bytes=GIB), card)["keys and values"] == GIB
    assert planning.token_bytes(QWEN["7B"], s) == 2 * 28 * 512 * 2
    long = replace(s, longest=1_000_000)
    assert any(short.startswith("engine: ") for short in planning.shortages(QWEN["7B"], long, card))


def test_nccl_packs_into_two_buffers_that_a_budget_can_hold() -> None:
    """Each is sent once it is over its size, so that one holds the largest parameter besides."""
    sent, taken = planning.sync_bytes(QWEN["7B"], RANK)
    assert taken == 2 * 256 * 2**20 + 152_064 * 3584 * 2 and sent == 2 * taken
    assert planning.sync_bytes(QWEN["7B"], replace(RANK, transfer="plasma")) == (0, 0)


def told(*overrides: str) -> tuple[Config, Any]:
    config = configured(*overrides)
    return config, build_parts(config).objective


def test_7b_on_eight_cards_of_80_gb_at_zero_1_is_refused_and_the_change_fits() -> None:
    """72 GB of states, and 8,192 tokens take 53 GB."""
    eight = ["cluster=eight_gpus", *SEVEN, "rollout.max_tokens=4096"]
    with pytest.raises(PreflightError, match=r"learner rank: [\d.]+ GiB of 78\.8 GiB") as refused:
        memory.check_cards(*told(*eight, "learner.zero_stage=1"), 80 * NAMED)
    change = str(refused.value).rpartition("that does: ")[2].split()
    assert change == ["learner.zero_stage=2", "learner.gradient_checkpointing=true"]
    assert "GiB of 78.8" in memory.check_cards(*told(*eight, *change), 80 * NAMED)
    assert "learner rank" in memory.check_cards(*told(*eight, "learner.zero_stage=1"), 181 * NAMED)


@pytest.mark.parametrize(
    ("overrides", "card", "change"),
    [
        (["cluster=gpu", "rollout.max_tokens=32768", "learner.ranks=2"], 141, ["checkpointing=true"]),
        (["cluster=gpu", "learner.gradient_checkpointing=true"], 80, ["learner.ranks=4"]),
        (
            ["cluster=gpu", "learner.ranks=4", "learner.token_budget=65536", "learner=zero3"],
            80,
            ["learner.token_budget=32768"],
        ),
        (
            [
                "cluster=gpu",
                "learner.ranks=8",
                "learner.gradient_checkpointing=true",
                "generator.engine={gpu_memory_utilization: 0.99}",
            ],
            80,
            ["generator.engine.gpu_memory_utilization=0.9"],
        ),
        (
            ["cluster=gpu", "learner.ranks=8", "learner.gradient_checkpointing=true"],
            24,
            ["learner.zero_stage=3", "learner.ranks=32"],
        ),
    ],
)
def test_the_smallest_change_is_found_by_trying(overrides: list[str], card: int, change: list[str]) -> None:
    shape, s = QWEN["7B"], memory.layout(*told(*overrides, *SEVEN))
    found = planning.smallest_change(shape, s, card * NAMED)
    assert found and [w for w, c in zip(found[0], change, strict=True) if not w.endswith(c)] == [], found
    assert not planning.shortages(shape, found[1], card * NAMED)


def test_a_card_of_both_that_is_too_small_becomes_two_or_none_do() -> None:
    shape, s = QWEN["7B"], memory.layout(*told("cluster=one_gpu", *SEVEN))
    apart = planning.smallest_change(shape, s, 24 * NAMED)
    assert apart and apart[0][0] == "cluster=gpu" and not planning.shortages(shape, apart[1], 24 * NAMED)
    assert planning.smallest_change(QWEN["32B"], s, 8 * NAMED) is None
    with pytest.raises(PreflightError, match=r"Neither .*rollout\.max_tokens"):
        memory.check_cards(*told("cluster=one_gpu", *SEVEN), 8 * NAMED)


@pytest.mark.parametrize("name", ["dapo_math", "gsm8k_1b5", "rubric"])
def test_what_ships_for_cards_fits_on_those_of_80_gb(name: str) -> None:
    assert "of 78.8 GiB" in memory.check_cards(*told(f"experiment={name}"), 80 * NAMED)


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Cards of this machine, as nvidia-smi tells of them."""

    def stub(lines: str) -> None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\nprintf '{lines}'\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    return stub


def test_cards_found_here_are_checked_before_the_start_and_shown(smi: Any) -> None:
    config = configured("cluster=gpu", *SEVEN)
    assert preflight.cards(config) == "none found here" and memory.smallest_card() is None
    smi("81559, 580.65.06\\n143771, 580.65.06\\n")
    assert memory.smallest_card() == 81_559 * 2**20
    assert preflight.cards in preflight.FAST
    with pytest.raises(PreflightError, match=r"learner rank: .* of 79\.6 GiB.*learner\.ranks="):
        preflight.cards(config)
    assert preflight.cards(configured()) == "none is asked for"
    smi("No devices were found\\n")
    assert memory.cards_here() == []


def test_a_driver_before_580_is_refused(smi: Any) -> None:
    smi("81559, 570.86.15\\n81559, 570.86.15\\n")
    with pytest.raises(PreflightError, match=r"570\.86\.15.*580.*cluster=cpu"):
        memory.check_driver(memory.cards_here())
    smi("81559, 580.65.06\\n")
    assert memory.check_driver(memory.cards_here()) == "580.65.06 on 1 cards"


def test_a_plan_of_a_named_card_needs_neither_card_nor_weights(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "--card=80", "cluster=eight_gpus", *SEVEN]
    assert cli.run(command) == 3
    told = capsys.readouterr()
    assert "model: 7,615,616,512 parameters" in told.out and "card, learner rank: " in told.out
    assert "learner.gradient_checkpointing=true" in told.err
    assert cli.run([*command, "learner.gradient_checkpointing=true"]) == 0
    with pytest.raises(ConfigError, match="--card=large"):
        memory.named_card("large")


def test_the_page_has_the_table_that_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["plan", "--table"]) == 0
    page = (Path(__file__).parents[2] / "launch" / "README.md").read_text()
    assert capsys.readouterr().out in page and len(re.findall(r"^\| (?:1\.5|7|32)B ", page, re.M)) == 18
