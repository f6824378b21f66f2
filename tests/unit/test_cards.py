"""What engines and ranks do on GPUs, as far as options and stand-ins show it without any."""

import asyncio
import os
import sys
import weakref
from dataclasses import replace
from importlib.util import find_spec
from itertools import repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from entroray.config import LearnerConfig
from entroray.engine import cpu_engine
from entroray.errors import ConfigError, InfrastructureError, PreflightError
from entroray.policy.head import (
    CARD_COLUMNS,
    CARD_TILE_ELEMENTS,
    TILE_ELEMENTS,
    WHOLE_ROW_ELEMENTS,
    _kernel_tile,
    _tile,
)
from entroray.wiring import actors
from entroray.wiring.actors import learner_settings
from entroray.wiring.parts import build_parts
from entroray.workers import cluster, engine_pool, transfer, verifier_pool
from entroray.workers.cluster import Gang
from entroray.workers.deepspeed_backend import deepspeed_config
from entroray.workers.engine_pool import EnginePool
from entroray.workers.learner_rank import LearnerRank
from entroray.workers.verifier_pool import VerifierPool
from tests.composed import configured


def test_logits_of_bf16_engines_are_those_the_learner_scores_with() -> None:
    assert "hf_overrides" not in actors.engine_options(configured())
    options = actors.engine_options(configured("model=bf16"))
    assert options["hf_overrides"] == {"head_dtype": "float32"}
    told = configured("model=bf16", "generator.engine={hf_overrides: {rope_theta: 1}}")
    assert actors.engine_options(told)["hf_overrides"] == {"head_dtype": "float32", "rope_theta": 1}
    own = configured("model=bf16", "generator.engine={hf_overrides: {head_dtype: model}}")
    assert actors.engine_options(own)["hf_overrides"] == {"head_dtype": "model"}


def test_threads_are_of_the_cores_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {3, 5, 7})
    threads = {role: share.threads for role, (_, share) in actors.resource_shares(configured()).items()}
    assert threads == {"generators": 3, "learner ranks": 3, "verifiers": 1}


def test_engines_on_gpus_choose_their_threads_and_ranks_share_the_cores_of_a_node(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(192)))
    config = configured("cluster=node8")
    for found, each in ((8, 24), (2, 96), (0, 24)):
        monkeypatch.setattr("torch.cuda.device_count", lambda found=found: found)
        shares = actors.resource_shares(config)
        assert [shares[role][1].threads for role in ("generators", "learner ranks")] == [None, each]
    own = actors.resource_shares(configured("cluster=gpu", "generator.threads=3", "learner.threads=5"))
    assert [own[role][1].threads for role in ("generators", "learner ranks")] == [3, 5]
    assert cluster._threads(None) == {} and set(cluster._threads(3).values()) == {"3"}


def test_the_number_of_threads_that_ray_names_is_not_taken_for_the_users(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """vLLM leaves threads as they are where the variable is set, and else takes one to serve with."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    cpu_engine.forget_ray_threads()
    assert os.environ["OMP_NUM_THREADS"] == "1"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for own in (True, False):
        monkeypatch.setenv("MKL_NUM_THREADS", "3") if own else monkeypatch.delenv("MKL_NUM_THREADS")
        cpu_engine.forget_ray_threads()
        assert ("OMP_NUM_THREADS" in os.environ) is own


def test_ranks_on_gpus_share_their_gradients_and_engines_leave_room_for_a_sync() -> None:
    config = configured("cluster=gpu", "learner.ranks=8")
    assert config.learner.zero_stage == 2 and configured("cluster=node8").learner.zero_stage == 2
    assert actors.engine_options(config)["gpu_memory_utilization"] == 0.85
    assert configured("cluster=gpu", "learner=zero3").learner.zero_stage == 3


def test_nccl_is_told_to_pack_into_small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a field of vLLM's, whose module takes seconds to import: its text is read."""
    folders = ["vllm", "vllm.distributed", "vllm.distributed.weight_transfer"]
    found = find_spec("vllm")
    assert found and found.origin
    place = Path(found.origin).parent / "distributed/weight_transfer/nccl_engine.py"
    assert "    packed_buffer_size_bytes: int" in place.read_text().partition("class NCCLTrainerInitInfo")[2]
    for name in (*folders, f"{folders[-1]}.nccl_engine"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(NCCLTrainerInitInfo=dict))
    client: Any = SimpleNamespace(handles=[1, 2], tensor_parallel=2)
    asked = transfer._init_info("nccl", 0, client, 3 << 30, lambda: ("10.0.0.1", 4000))
    assert asked["packed_buffer_size_bytes"] == 256 << 20 and asked["world_size"] == 5


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["cluster=one_gpu", "generator.replicas=2"],
            r"generator\.transfer=ipc .*generator\.replicas=2.*cluster=gpu",
        ),
        (
            ["cluster=one_gpu", "generator.transfer=plasma", "learner.ranks=2"],
            r"generator\.sleep=true .*learner\.ranks=2.*cluster=gpu",
        ),
        (
            ["cluster=one_gpu", "generator.tensor_parallel=2"],
            r"generator\.transfer=ipc .*generator\.tensor_parallel=2, .* 1 .*cluster=gpu",
        ),
        (
            ["generator.transfer=nccl"],
            r"generator\.transfer=nccl .*cluster\.gpus_per_generator=0 .*generator\.transfer=plasma",
        ),
        (
            ["cluster=gpu", "cluster.gpus_per_learner=0.5"],
            r"generator\.transfer=nccl .*cluster\.gpus_per_learner=0\.5: .*generator\.transfer=plasma",
        ),
        (
            ["cluster.gpus_per_generator=0.5", "generator.tensor_parallel=2"],
            r"generator\.tensor_parallel=2 .*cluster\.gpus_per_generator=0\.5 .* 1 .*cluster=gpu",
        ),
    ],
)
def test_cards_that_cannot_be_held_so_are_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        configured(*overrides)


def test_cards_that_can_be_held_so_are_not() -> None:
    configured("cluster=one_gpu")
    configured("cluster=gpu", "generator.replicas=4", "generator.tensor_parallel=2", "learner.ranks=8")
    configured("generator.replicas=2", "generator.tensor_parallel=2", "learner.ranks=2")  # on CPU as ever


def test_a_rank_that_begins_anew_holds_nothing_of_what_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it loads the new model, the old one is gone from memory and its transfer is closed."""

    class Old:
        closed = 0

        def close(self) -> None:
            Old.closed += 1

        shutdown = close

    alone = LearnerRank(0, learner_settings(configured(), "/nowhere", 1), SimpleNamespace(), None)  # type: ignore[arg-type]
    alone.device = torch.device("cpu")
    alone.backend, alone.reference, alone.transfer = Old(), Old(), Old()  # type: ignore[assignment]
    old = [weakref.ref(x) for x in (alone.backend, alone.reference, alone.transfer)]
    alive: list[Any] = []
    monkeypatch.setattr(alone, "_load_model", lambda _: alive.extend(x() for x in old))
    alone.reset(alone.settings, alone.objective)
    assert alive == [None, None, None] and Old.closed == 3


def test_gradients_of_bf16_weights_are_summed_in_fp32_where_deepspeed_can() -> None:
    def sums(*told: str) -> Any:
        config = configured(*told)
        return deepspeed_config(config.learner, config.model.dtype).get("data_types")

    wide = {"grad_accum_dtype": "fp32"}
    assert [sums("model=bf16", f"learner.zero_stage={n}") for n in (1, 2, 3)] == [wide] * 3
    with pytest.raises(ConfigError, match=r"learner\.zero_stage=0 .*learner\.zero_stage=1"):
        configured("model=bf16", "learner.zero_stage=0")
    assert [sums(f"learner.zero_stage={n}") for n in range(4)] == [None] * 4
    own = "learner.deepspeed={data_types: {grad_accum_dtype: bf16}}"
    assert sums("model=bf16", own) == {"grad_accum_dtype": "bf16"}


def test_gradients_of_bf16_weights_are_summed_over_ranks_in_fp32_too() -> None:
    for stage in range(4):
        found = deepspeed_config(LearnerConfig(zero_stage=stage), "bfloat16")
        assert found["communication_data_type"] == "fp32"
    assert "communication_data_type" not in deepspeed_config(LearnerConfig(), "float32")


def test_what_is_said_to_deepspeed_is_merged_key_by_key() -> None:
    def told(**deepspeed: Any) -> dict[str, Any]:
        return deepspeed_config(LearnerConfig(zero_stage=2, lr=0.5, deepspeed=deepspeed), "bfloat16")

    plain, adam = told(), {"lr": 0.5, "weight_decay": 0.0, "betas": [0.9, 0.95]}
    assert plain["optimizer"] == {"type": "AdamW", "params": {**adam, "torch_adam": True}}
    moved = told(zero_optimization={"offload_optimizer": {"device": "cpu"}})
    assert moved["zero_optimization"] == {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    assert moved["optimizer"]["params"] == adam, "DeepSpeed's CPUAdam, which torch's would come before"
    kept = told(zero_optimization={"offload_optimizer": {"device": "none"}, "overlap_comm": True})
    assert kept["optimizer"] == plain["optimizer"] and kept["zero_optimization"]["overlap_comm"]
    assert told(optimizer={"params": {"eps": 1e-6}})["optimizer"]["params"]["lr"] == 0.5
    assert told(optimizer={"type": "Lion", "params": {"betas": [0.9, 0.99]}})["optimizer"] == {
        "type": "Lion",
        "params": {"lr": 0.5, "weight_decay": 0.0, "betas": [0.9, 0.99]},
    }
    assert told(bf16={"immediate_grad_update": False})["bf16"] == {
        "enabled": True,
        "immediate_grad_update": False,
    }
    assert told(gradient_clipping=3)["gradient_clipping"] == 3 and told(prescale_gradients=True)


def test_the_stage_of_zero_is_said_in_one_place() -> None:
    with pytest.raises(ConfigError, match=r"learner\.deepspeed .*learner\.zero_stage"):
        configured("learner.deepspeed={zero_optimization: {stage: 2}}")


def test_a_section_of_null_is_ours() -> None:
    for section in ("zero_optimization", "optimizer", "bf16", "data_types"):
        config = configured("model=bf16", "learner.zero_stage=2", f"learner.deepspeed={{{section}: null}}")
        plain = replace(config.learner, deepspeed={})
        assert deepspeed_config(config.learner, "bfloat16") == deepspeed_config(plain, "bfloat16")
    inner = "learner.deepspeed={optimizer: {params: null}, zero_optimization: {offload_optimizer: null}}"
    found = deepspeed_config(configured(inner).learner, "float32")
    assert found["optimizer"]["params"]["torch_adam"] and found["zero_optimization"]["stage"] == 1


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("optimizer: AdamW", "optimizer=AdamW"),
        ("zero_optimization: 2", "zero_optimization=2"),
        ("bf16: false", "bf16=False"),
    ],
)
def test_a_section_of_deepspeed_that_is_none_is_refused(given: str, named: str) -> None:
    with pytest.raises(ConfigError, match=rf"learner\.deepspeed .*{named}.*a dictionary"):
        configured(f"learner.deepspeed={{{given}}}")


def test_parts_of_weights_that_deepspeed_keeps_for_one_model_alone_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"zero_hpz_partition_size.*drop it"):
        configured("learner=zero3", "learner.deepspeed={zero_optimization: {zero_hpz_partition_size: 8}}")


def test_tiles_are_larger_on_a_card_and_hold_whole_rows() -> None:
    cpu, card = torch.device("cpu"), torch.device("cuda", 0)
    assert _tile((2048, 256), 32_000, cpu, False) == (TILE_ELEMENTS // 1024, 1024, False)
    assert _tile((2048, 256), 32_000, cpu, True) == (WHOLE_ROW_ELEMENTS // 32_000, 32_000, False), (
        "a statistic sorts"
    )
    for whole in (False, True):
        assert _tile((2048, 256), 32_000, card, whole) == (CARD_TILE_ELEMENTS // 32_000, 32_000, False)
    assert _tile((2048, 256), 32, cpu, False).columns == 32, "no more than there are"
    few = _tile((8, 256), 152_000, cpu, False)
    assert few.columns == TILE_ELEMENTS // 256, "few rows: wider, but not the whole weight"


def test_tiles_for_kernels_hold_all_rows_and_some_columns() -> None:
    """Of 151,936 columns by 8,192 tokens a tile has 16,384, 32,768 tokens fill one of 4,096."""
    assert _kernel_tile(8192, 151_936, CARD_TILE_ELEMENTS) == (8192, 16_384, True)
    assert _kernel_tile(32_768, 151_936, CARD_TILE_ELEMENTS) == (32_768, CARD_COLUMNS, True)
    assert _kernel_tile(100_000, 151_936, CARD_TILE_ELEMENTS) == (32_768, CARD_COLUMNS, True)
    assert _kernel_tile(0, 151_936, CARD_TILE_ELEMENTS) == (883, 151_936, True)
    assert _kernel_tile(5000, 151_936, CARD_TILE_ELEMENTS).columns % CARD_COLUMNS == 0


def introduced(
    monkeypatch: pytest.MonkeyPatch, cards: str, facts: list[dict[str, Any]]
) -> tuple[dict[str, list[str]], dict[str, Any]]:
    """Who was ready before each actor started, and what is known then of ranks that say `facts`."""
    ready: list[str] = []
    before: dict[str, list[str]] = {}

    async def sleep() -> None:
        ready.append("asleep")

    def actor(name: str, **found: Any) -> Any:
        async def start(*_: Any) -> dict[str, Any]:
            before.setdefault(name, list(ready))
            await asyncio.sleep(0.01)
            ready.append(name)
            return found

        answer = lambda *_: asyncio.sleep(0, ("here", 1))
        ask = {name: SimpleNamespace(remote=answer) for name in ("address", "warm_up")}
        described = {"runner": "V2", "vocabulary": "v"}
        ask["describe"] = SimpleNamespace(remote=lambda: asyncio.sleep(0, described))
        ask |= {"sleep": SimpleNamespace(remote=sleep)}
        return SimpleNamespace(start=SimpleNamespace(remote=start), **ask)

    async def settle(ref: Any, **_: Any) -> Any:
        return await ref

    def report(kind: str, **fields: Any) -> None:
        raise AssertionError(f"{kind}: all of them start")

    async def sync(version: int) -> dict[str, float]:
        return {}

    for module in (cluster, engine_pool, verifier_pool):
        monkeypatch.setattr(module, "settle", settle)
    limits: dict[str, Any] = {"start_deadline": 1.0, "report": report}
    pools: dict[str, Any] = {
        "engines": EnginePool([actor("engine")], list, SimpleNamespace(), restarts=0, **limits),  # type: ignore[arg-type]
        "learner": Gang("learner", [actor("rank", **each) for each in facts]),
        "verifiers": VerifierPool(1, lambda: actor("judge"), **limits),
    }
    made = actors.Actors(configured(f"cluster={cards}"), **pools, sync=sync, facts={})  # type: ignore[arg-type]
    known = asyncio.run(actors._introduce(made, None))
    return before, known


@pytest.mark.parametrize(("cards", "alone"), [("one_gpu", True), ("gpu", False)])
def test_a_rank_waits_for_the_engine_it_shares_a_card_with(
    monkeypatch: pytest.MonkeyPatch, cards: str, alone: bool
) -> None:
    """vLLM measures the memory of the card as it starts, and then leaves it for the rank to be built."""
    before, _ = introduced(monkeypatch, cards, [{}])
    assert ("engine" in before["rank"]) is alone and ("asleep" in before["rank"]) is alone


@pytest.mark.parametrize("fails", ["spawning", "starting"])
def test_nothing_of_a_start_that_fails_holds_a_card(monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    """A lab goes on to the next cell, whose actors would wait for the cards of this one."""
    released, killed = list[str](), list[str]()

    def spawn(kind: type, *_: Any, **__: Any) -> str:
        if (fails, kind) == ("spawning", LearnerRank):
            raise TypeError("cannot pickle an objective")
        return kind.__name__

    async def introduce(*_: Any) -> dict[str, Any]:
        raise InfrastructureError("learner rank 0: its process died")

    places = SimpleNamespace(of=lambda role: repeat("DEFAULT"), release=lambda: released.append("places"))
    monkeypatch.setattr(actors.nodes, "find_places", lambda *_, **__: places)
    monkeypatch.setattr(cluster, "spawn", spawn)
    monkeypatch.setattr(cluster, "kill_actors", killed.extend)
    monkeypatch.setattr(actors, "_introduce", introduce)
    config = configured("cluster=one_gpu")
    made = actors.start_actors(config, "m", build_parts(config), {}, (1,), total_updates=1)
    with pytest.raises((TypeError, InfrastructureError)):
        asyncio.run(made)
    assert released == ["places"]
    assert killed == ([] if fails == "spawning" else ["Generator", "LearnerRank", "Verifier"])


def test_ranks_that_lay_rows_out_differently_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them have one plan, of micro-batches that fit only rows laid out as it says."""
    end, padded = {"packed": True, "rows": "end to end"}, {"packed": False, "rows": "padded, for no kernel"}
    engine = {"runner": "V2", "vocabulary": "v", "vocabularies": {"generator 0": "v"}}
    assert introduced(monkeypatch, "gpu", [end, end])[1] == end | engine
    assert introduced(monkeypatch, "gpu", [padded])[1] == padded | engine
    with pytest.raises(PreflightError, match=r"rows lie end to end and padded, for no kernel"):
        introduced(monkeypatch, "gpu", [end, end, padded])
