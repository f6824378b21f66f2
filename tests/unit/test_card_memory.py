"""What cards hold, against arithmetic and DeepSpeed's own estimates; what is refused, and the way out."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from entroray import cli
from entroray.config import Config, LearnerConfig
from entroray.errors import ConfigError, InfrastructureError, PreflightError
from entroray.planning import memory as planning
from entroray.planning.memory import GIB, NAMED, QWEN, Layout, ModelShape, learner_states
from entroray.policy import head
from entroray.wiring import memory, preflight
from entroray.wiring.parts import build_parts
from entroray.workers import cluster
from entroray.workers.deepspeed_backend import deepspeed_config
from tests.composed import configured

NONE: Any = SimpleNamespace(needs=())
SEVEN = "model.path=Qwen/Qwen2.5-7B-Instruct", "learner.lr=1e-6"
RANK = Layout(2, 8704, ranks=4)
LOW = "learner=lora", "learner.lora.rank=4"


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
    eight = ["cluster=node8", *SEVEN, "rollout.max_tokens=4096"]
    eight += ["learner.gradient_checkpointing=false"]
    with pytest.raises(PreflightError, match=r"learner rank: [\d.]+ GiB of 78\.8 GiB") as refused:
        memory.check_cards(*told(*eight, "learner.zero_stage=1"), 80 * NAMED)
    change = str(refused.value).rpartition("that does: ")[2].split()
    assert change == ["learner.zero_stage=2", "learner.gradient_checkpointing=true"]
    assert "GiB of 78.8" in memory.check_cards(*told(*eight, *change), 80 * NAMED)
    assert "learner rank" in memory.check_cards(*told(*eight, "learner.zero_stage=1"), 181 * NAMED)


EVERY = [
    *("cluster=gpu", "learner.ranks=8", "rollout.max_tokens=8192", "learner.gradient_checkpointing=true"),
]


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
            ["generator.engine.gpu_memory_utilization=0.95"],
        ),
        (
            ["cluster=gpu", "learner.ranks=8", "learner.gradient_checkpointing=true"],
            24,
            ["learner.zero_stage=3", "learner.ranks=32"],
        ),
        (
            [*EVERY, "learner.gradient_checkpointing_every_n_layers=14"],
            80,
            ["learner.gradient_checkpointing_every_n_layers=1"],
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


def test_what_is_proposed_is_what_the_settings_and_the_model_allow() -> None:
    compiled = memory.layout(*told("cluster=gpu", "learner.compile=true", *SEVEN))
    for s, three in ((compiled, False), (replace(compiled, compiled=False), True)):
        tried = [value for _, values in planning.learner_steps(s, 8) for _, value in values]
        assert any(value.get("zero_stage") == 3 for value in tried) is three
    shards = lambda heads: dict(planning.engine_steps(replace(QWEN["7B"], heads=heads), RANK, 8))[
        "generator.tensor_parallel"
    ]
    assert [n for n, _ in shards(28)] == ["2", "4"] and [n for n, _ in shards(32)] == ["2", "4", "8"]


def test_an_engine_alone_may_have_nearly_all_of_its_card() -> None:
    """vLLM counts contexts and what it cannot use into its share."""
    for share, fits in ((0.95, True), (0.97, True), (0.999, False)):
        s = replace(RANK, transfer="nccl", utilisation=share, checkpoint_every=1, zero_stage=2)
        assert (planning.shortages(QWEN["7B"], s, 80 * NAMED) == []) is fits, share
    held = planning.cards(QWEN["7B"], replace(RANK, kv_bytes=GIB), 80 * NAMED)["engine"]
    assert held["reserve"] == planning.RESERVE * 80 * NAMED


def test_a_sync_does_not_meet_a_step_of_the_engine() -> None:
    s = replace(RANK, ranks=1, transfer="ipc", shared=True, sleep=True, utilisation=0.5)
    found = planning.cards(QWEN["1.5B"], s, 80 * NAMED)
    assert "engine's a step" not in found["card of both, at a sync"]
    assert "engine's a step" in found["card of both, while it samples"]


def test_a_step_of_an_engine_is_as_large_as_vllm_makes_it_on_that_card() -> None:
    m = QWEN["7B"]
    step = lambda card, s=RANK: planning.engine_bytes(m, s, card * NAMED)["a step"]
    own = lambda batched, seats: batched * 2 * (3 * m.intermediate + 6 * m.width) + seats * m.vocabulary * 8
    assert step(80) == own(16_384, 1024) and step(48) == own(8192, 256)
    assert step(48, replace(RANK, batched=100, seats=10)) == own(100, 10)


def test_rows_of_evaluation_sets_are_answered_and_not_learned() -> None:
    sets = "evaluate=aime24", "evaluate.sets.aime24.max_tokens=32768"
    s = memory.layout(*told("cluster=gpu", *SEVEN, *sets))
    plain = memory.layout(*told("cluster=gpu", *SEVEN))
    assert s.longest == plain.longest == plain.served < s.served == 32_768 + configured().data.max_prompt
    assert planning.learner_work(QWEN["7B"], s) == planning.learner_work(QWEN["7B"], plain)
    assert any(short.startswith("engine: ") for short in planning.shortages(QWEN["7B"], s, 22 * NAMED))


@pytest.mark.parametrize(
    ("element", "stage", "ranks", "each"),
    [(4, 0, 1, 0), (4, 1, 1, 4), (2, 1, 8, 4), (2, 2, 1, 6), (4, 2, 8, 4)],
)
def test_deepspeeds_buckets_are_allocated_whole_however_small_the_model(
    element: int, stage: int, ranks: int, each: int
) -> None:
    m, s = ModelShape(2, 8, 16, 8, 4, 32, 1000), Layout(element, 10, ranks=ranks, zero_stage=stage)
    assert planning.learner_work(m, s)["DeepSpeed's buckets"] == each * planning.BUCKET
    own = "learner.deepspeed={zero_optimization: {reduce_bucket_size: 5e7}}"
    assert memory.layout(*told("cluster=gpu", own)).bucket == 50_000_000


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


def test_cards_that_cuda_does_not_see_are_not_asked_for(smi: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    smi("%s, 580.65.06\\n' $# #")
    asked = lambda: memory.smallest_card() / 2**20  # type: ignore[operator]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert asked() == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert asked() == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,2")
    assert asked() == 4, "-i 1,2"


def test_a_cluster_that_does_not_say_what_cards_it_has_is_gone_on_with(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def late(question: Any) -> float:
        raise InfrastructureError("a node with GPUs gave no answer within 60 s")

    config, objective = told("cluster=gpu", "cluster.address=1.2.3.4:6379", *SEVEN)
    monkeypatch.setattr(cluster, "ask_node", late)
    memory.check_cluster(config, objective)
    assert "within 60 s" in capsys.readouterr().out
    monkeypatch.setattr(cluster, "ask_node", lambda question: 8 * NAMED)
    with pytest.raises(PreflightError, match="too small"):
        memory.check_cluster(config, objective)


def test_a_model_that_cannot_be_read_is_the_models_affair(smi: Any, tmp_path: Path) -> None:
    smi("81559, 580.65.06\\n")
    for text in ("{}", "{", '{"model_type": "qwen2", "num_attention_heads": 0}'):
        (tmp_path / "config.json").write_text(text)
        config = configured("cluster=gpu", f"model.path={tmp_path}", "learner.lr=1e-6")
        assert preflight.cards(config) == "the model's shape is unknown"


def test_a_driver_before_580_is_refused(smi: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    smi("81559, 570.86.15\\n81559, 570.86.15\\n")
    with pytest.raises(PreflightError, match=r"570\.86\.15.*580.*cluster=cpu"):
        memory.check_driver(memory.cards_here())
    with pytest.raises(PreflightError, match=r"570\.86\.15"):
        preflight.resources(configured("cluster=gpu"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert "570.86.15" in memory.check_driver(memory.cards_here()), "with CUDA's package for older drivers"
    smi("81559, 580.65.06\\n")
    assert memory.check_driver(memory.cards_here()) == "580.65.06 on 1 cards"


def test_a_plan_of_a_named_card_needs_neither_card_nor_weights(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "--card=80", "cluster=node8", *SEVEN]
    assert cli.run([*command, "learner.gradient_checkpointing=false"]) == 3
    told = capsys.readouterr()
    assert "model: 7,615,616,512 parameters" in told.out and "card, learner rank: " in told.out
    assert "learner.gradient_checkpointing=true" in told.err
    assert cli.run(command) == 0
    assert "placed: node 1, taken to have 8 GPU: generators 0-3, learner ranks 0-3" in capsys.readouterr().out
    assert cli.run([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["memory"][0].startswith("model: 7,615,616,512")
    assert cli.run(["plan", "--card=80"]) == 2 and "cluster=gpu" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="--card=large"):
        memory.named_card("large")


def test_the_page_has_the_table_that_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["plan", "--table"]) == 0
    page = (Path(__file__).parents[2] / "launch" / "README.md").read_text()
    assert capsys.readouterr().out in page and len(re.findall(r"^\| (?:1\.5|7|32)B ", page, re.M)) == 24


def test_memory_is_that_of_a_frozen_base_and_a_trained_adapter() -> None:
    """7.6e9 weights in bf16; of 40.4 M of rank 16 gradients in both precisions, a copy and two moments."""
    config = configured("cluster=gpu", *SEVEN, "learner=lora", "learner.lora.rank=16", "learner.zero_stage=1")
    s = memory.layout(config, SimpleNamespace(needs={"ref_logprobs"}))  # type: ignore[arg-type]
    layer = 2 * (3584 + 3584) + 2 * (3584 + 512) + 3 * (3584 + 18_944)
    assert s.adapter == 28 * 16 * layer == 40_370_176
    states = planning.learner_states(QWEN["7B"].parameters, s)
    ranks = config.learner.ranks
    assert states == {
        "weights": 2 * (7_615_616_512 + s.adapter),
        "gradients": 6 * s.adapter,
        "float32 copy": 4 * s.adapter / ranks,
        "Adam moments": 8 * s.adapter / ranks,
    }
    assert (
        s.bucket
        == 50_000_000
        == deepspeed_config(config.learner, "bfloat16")["zero_optimization"]["reduce_bucket_size"]
    )
    assert "reduce_bucket_size" not in deepspeed_config(LearnerConfig(), "bfloat16")["zero_optimization"]
    assert planning.adapter_size(QWEN["7B"], 16, ["q_proj", "v_proj"]) == 28 * 16 * (2 * 3584 + 3584 + 512)


def test_an_engine_that_serves_adapters_has_room_for_one_on_every_matrix() -> None:
    """vLLM 0.32: of the rank it knows, for seven matrices of each layer, embedding and head."""
    alone = [*SEVEN, *LOW, "learner.lora.targets=[q_proj]", "cluster=gpu", "generator.transfer=adapter"]
    s, card = memory.layout(configured(*alone), NONE), 80 * NAMED
    layer = 2 * (3584 + 3584) + 2 * (3584 + 512) + 3 * (3584 + 18_944)
    of = lambda **how: planning.engine_bytes(QWEN["7B"], replace(s, **how), card)
    assert s.lora_rank == 8 and of(tensor_parallel=1)["adapter"] == 2 * 8 * (
        28 * layer + 2 * (152_064 + 3584)
    )
    divided = 2 * 3584 + 2 * 512 + 3 * 18_944
    assert of(tensor_parallel=1)["adapter"] - of(tensor_parallel=2)["adapter"] == 8 * 28 * divided
    assert "adapter" not in of(lora_rank=0)


def test_adapters_are_named_where_full_training_does_not_fit() -> None:
    alone = ["cluster=one_gpu", *SEVEN]
    with pytest.raises(PreflightError, match=r"learner\.lora\.rank=32 learner\.lr=1e-05") as refused:
        memory.check_cards(configured(*alone), NONE, 80 * NAMED)
    words = str(refused.value).partition("it does: ")[2].partition(". ")[0].split()
    taken = [*alone, *[word for word in words if not word.startswith("learner.lr")], "learner.lr=1e-5"]
    assert "GiB of" in memory.check_cards(configured(*taken), NONE, 80 * NAMED)
    with pytest.raises(PreflightError) as low:
        memory.check_cards(configured(*alone, "learner=lora"), NONE, 10 * NAMED)
    assert "in place of full training" not in str(low.value)
