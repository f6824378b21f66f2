"""LoRA: what is trained, merged, sent, written and refused, on small random models of every family."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from entroray.config import LearnerConfig, Lora
from entroray.engine.adapter import AdapterWeights, adapter_options
from entroray.engine.weight_bytes import pack
from entroray.errors import ConfigError, PreflightError, SyncError
from entroray.policy import lora, proof
from entroray.policy.model import Policy, load_policy, pad
from entroray.wiring import actors, compose, constraints, memory, preflight, reused_actors, run_directory
from entroray.wiring.parts import build_parts
from tests.composed import configured
from tests.families.models import FAMILIES, configuration, folder

LOW = ["learner=lora", "learner.lora.rank=4"]


class Whole:
    """A backend whose parameters are whole on the one rank there is."""

    def __init__(self, policy: Policy):
        self.policy = policy

    def full_shape(self, parameter: nn.Parameter) -> tuple[int, ...]:
        return tuple(parameter.shape)

    def gather(self, parameter: nn.Parameter) -> torch.Tensor:
        return parameter.detach()

    def forward(self, layout: Any, statistics: tuple[str, ...]) -> dict[str, torch.Tensor]:
        return self.policy(layout, statistics)


def adapted(place: Path, dtype: torch.dtype = torch.float32, size: float = 0.05, **how: Any) -> Policy:
    """A policy whose adapter has been trained: B is no longer 0."""
    policy = load_policy(str(place), dtype)
    lora.add_adapter(policy, Lora(**{"rank": 4, **how}), seed=0)
    torch.manual_seed(1)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=size)
    return policy


@torch.no_grad()
def logprobs(policy: Any) -> torch.Tensor:
    return policy(pad(proof._batch(proof._texts()), torch.device("cpu")))["logprobs"]


def sent(policy: Policy, base: str | None = None) -> dict[str, torch.Tensor]:
    out = lora.outgoing(policy, Whole(policy), base)
    return {name: out.backend.gather(parameter) for name, parameter in out.named}


def exported(policy: Policy, place: Path, base: str | None = None) -> Path:
    out = lora.outgoing(policy, Whole(policy), base)
    out.write(place, ((name, out.backend.gather(parameter)) for name, parameter in out.named))
    return place


@pytest.mark.parametrize("name", FAMILIES)
def test_merged_weights_have_the_names_of_the_files_and_compute_what_the_adapter_does(
    name: str, tmp_path: Path
) -> None:
    source = folder(name, tmp_path / "read")
    policy, first = adapted(source), load_policy(str(source), torch.float32)
    before = [p.clone() for p in policy.parameters()]
    merged = load_policy(str(exported(policy, tmp_path / "merged")), torch.float32)
    names = {file: tensor.shape for file, tensor in first.named_weights()}
    assert {file: tensor.shape for file, tensor in merged.named_weights()} == names
    assert (
        load_file(tmp_path / "merged/model.safetensors").keys()
        == load_file(source / "model.safetensors").keys()
    )
    torch.testing.assert_close(logprobs(merged), logprobs(policy), rtol=0, atol=1e-4)
    assert (logprobs(first) - logprobs(policy)).abs().max() > 1e-3, "the adapter does something"
    assert all(map(torch.equal, before, policy.parameters())), "nothing was merged in place"


@pytest.mark.parametrize("name", ["qwen3", "gpt2", "gemma2"])
def test_a_new_adapter_changes_nothing_and_alone_is_trained(name: str, tmp_path: Path) -> None:
    source = folder(name, tmp_path / "read")
    policy, first = load_policy(str(source), torch.float32), load_policy(str(source), torch.float32)
    lora.add_adapter(policy, Lora(rank=4), seed=0)
    assert torch.equal(logprobs(policy), logprobs(first))
    loss = policy(pad(proof._batch(proof._texts()), torch.device("cpu")))["logprobs"].sum()
    loss.backward()
    trained = {n for n, p in policy.named_parameters() if p.grad is not None}
    assert trained and all(".lora_" in n for n in trained)
    assert trained == {n for n, p in policy.named_parameters() if p.requires_grad}


def test_an_update_is_that_of_w_plus_scale_b_a(tmp_path: Path) -> None:
    policy = adapted(folder("qwen3", tmp_path / "read"), alpha=12.0, targets=["q_proj"])
    base = load_policy(str(tmp_path / "read"), torch.float32)
    layer = policy.model.model.layers[0].self_attn.q_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    found, own = sent(policy), dict(base.named_weights())
    name = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(found[name], own[name] + 3.0 * (b @ a), rtol=0, atol=1e-6)
    assert [n for n in own if not torch.equal(found[n], own[n])] == [
        f"model.layers.{i}.self_attn.q_proj.weight" for i in range(len(policy.model.model.layers))
    ]


def test_all_ranks_and_stages_begin_with_the_same_a_and_an_alpha_of_twice_the_rank(tmp_path: Path) -> None:
    made = []
    for drawn in (0, 1):
        policy = load_policy(str(folder("qwen3", tmp_path / "read")), torch.float32)
        torch.manual_seed(drawn)
        state = torch.get_rng_state()
        lora.add_adapter(policy, Lora(rank=4), seed=7)
        assert torch.equal(state, torch.get_rng_state()), "nothing else draws otherwise than without"
        made.append({n: p for n, p in policy.named_parameters() if ".lora_A" in n})
        assert policy.model.model.layers[0].mlp.up_proj.scaling == {"default": 2.0}
    assert all(torch.equal(p, made[1][n]) for n, p in made[0].items())


def test_the_base_is_the_reference_without_a_second_copy(tmp_path: Path) -> None:
    policy = adapted(folder("llama", tmp_path / "read"))
    first = logprobs(load_policy(str(tmp_path / "read"), torch.float32))
    layout = pad(proof._batch(proof._texts()), torch.device("cpu"))
    ours = policy(layout)["logprobs"]
    with torch.no_grad():
        reference = lora.BasePolicy(Whole(policy)).forward(layout)["logprobs"]
    assert torch.equal(reference, first)
    assert torch.equal(logprobs(policy), ours.detach()), "the adapter is on again"
    ours.sum().backward()
    assert all(p.grad is not None for p in policy.parameters() if p.requires_grad)


def test_a_bfloat16_merge_rounds_each_weight_once(tmp_path: Path) -> None:
    """It is no further from the exact numbers than bfloat16 itself, weights and adapter apart."""
    policy = adapted(folder("qwen3", tmp_path / "read"), torch.bfloat16)
    assert {p.dtype for p in policy.parameters()} == {torch.bfloat16}
    wide = adapted(folder("qwen3", tmp_path / "wide"))
    for (_, narrow), (_, other) in zip(policy.named_parameters(), wide.named_parameters(), strict=True):
        other.data.copy_(narrow.data)
    for name, tensor in sent(wide).items():
        assert torch.equal(sent(policy)[name], tensor.to(torch.bfloat16)), name
    merged = load_policy(str(exported(policy, tmp_path / "merged")), torch.bfloat16)
    exact, apart, once = logprobs(wide), logprobs(policy), logprobs(merged)
    gaps = {"apart": apart - exact, "merged": once - exact, "merged from apart": once - apart}
    mean = {name: float(gap.abs().mean()) for name, gap in gaps.items()}
    print(f"bf16, mean nats: {mean}, largest {float(gaps['merged from apart'].abs().max()):.2g}")
    assert mean["merged"] < 1.5 * mean["apart"] and mean["merged from apart"] < 0.1


def test_peft_reads_an_exported_adapter(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    source = folder("qwen3", tmp_path / "read")
    policy = adapted(source)
    place = exported(policy, tmp_path / "adapter", str(source))
    assert sorted(f.name for f in place.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    described = json.loads((place / "adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == str(source) and described["r"] == 4
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(source), place)
    (ids,) = [t for t in proof._texts()][:1]
    with torch.no_grad():
        theirs = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
    torch.testing.assert_close(theirs, logprobs(policy)[: len(theirs)], rtol=0, atol=1e-5)
    assert lora.read_config(str(place)) == described and lora.read_config(str(source)) is None


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens", "q_prj", "norm"])
def test_targets_that_have_no_matrix_are_refused(name: str, tmp_path: Path) -> None:
    place = folder("qwen3", tmp_path / "read")
    policy = load_policy(str(place), torch.float32)
    with pytest.raises(PreflightError, match=rf"learner\.lora\.targets=.*{name}.*all-linear"):
        lora.add_adapter(policy, Lora(rank=4, targets=["q_proj", name]), seed=0)
    config = configuration("qwen3")
    with pytest.raises(PreflightError, match=r"learner\.lora\.targets="):
        proof.check_architecture("some/model", config, targets=[name])
    proof.check_architecture("some/model", config, targets=["q_proj"])


@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_a_rank_as_large_as_a_matrix_is_refused(name: str, tmp_path: Path) -> None:
    policy = load_policy(str(folder(name, tmp_path / "read")), torch.float32)
    width = policy.model.config.hidden_size
    with pytest.raises(PreflightError, match=rf"learner\.lora\.rank={width} .*{width} columns.*rank=0"):
        lora.add_adapter(policy, Lora(rank=width), seed=0)


def test_an_adapter_cut_short_is_no_whole_model(tmp_path: Path) -> None:
    place = exported(adapted(folder("qwen3", tmp_path / "read")), tmp_path / "adapter", "some/base")
    assert run_directory._is_whole(place)
    weights = place / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert not run_directory._is_whole(place)
    weights.unlink()
    assert not run_directory._is_whole(place)


def test_the_configuration_of_an_adapter_comes_after_its_weights(tmp_path: Path) -> None:
    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        yield "one", torch.zeros(2)
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        lora.write_adapter(tmp_path, {"r": 4}, weights())
    assert not (tmp_path / "adapter_config.json").exists()


def test_an_engine_loads_what_was_sent_in_place_and_every_request_goes_through_it(tmp_path: Path) -> None:
    policy = adapted(folder("qwen3", tmp_path / "read"))
    weights, config = sent(policy, "base"), lora.outgoing(policy, Whole(policy), "base").adapter
    loaded, versions = [], []

    def add_lora(request: Any) -> bool:
        files = {f.name: f.read_bytes() for f in Path(request.lora_path).iterdir()}
        loaded.append((request.lora_int_id, request.load_inplace, files))
        return True

    served = AdapterWeights()
    served.llm_engine, served.update_weight_version = SimpleNamespace(add_lora=add_lora), versions.append
    assert served.adapter is None, "the base answers until the first sync"
    manifest, payload = pack(list(weights.items()))
    served.init_weight_transfer_engine({"init_info": {"manifest": manifest, "config": config}})
    for version in ("0", "1"):
        served.start_weight_update()
        served.update_weights({"update_info": {"manifest": manifest, "payload": payload}})
        served.finish_weight_update(weight_version=version)
    assert [(number, inplace) for number, inplace, _ in loaded] == [(1, True)] * 2 and versions == ["0", "1"]
    assert served.adapter.lora_int_id == 1 and not served.adapter.load_inplace, "else each request reloads it"
    exported(policy, tmp_path / "own", "base")
    assert loaded[0][2] == {f.name: f.read_bytes() for f in (tmp_path / "own").iterdir()}
    with pytest.raises(SyncError, match="parameters differ"):
        served.update_weights({"update_info": {"manifest": {}, "payload": []}})
    served.llm_engine = SimpleNamespace(add_lora=lambda request: False)
    with pytest.raises(SyncError, match=r"generator\.transfer=plasma"):
        served.update_weights({"update_info": {"manifest": manifest, "payload": payload}})


@pytest.mark.parametrize(("rank", "most"), [(1, 1), (2, 8), (32, 32), (33, 64), (512, 512)])
def test_an_engine_is_started_for_the_next_rank_that_vllm_knows(rank: int, most: int) -> None:
    assert adapter_options(rank) == {"enable_lora": True, "max_lora_rank": most}


def test_ranks_are_those_of_the_pinned_vllm() -> None:
    text = proof._engine_source("../../config/lora")
    assert "MaxLoRARanks = Literal[1, 8, 16, 32, 64, 128, 256, 320, 512]" in text
    assert adapter_options(500)["max_lora_rank"] == 512


def test_engines_get_the_adapter_alone_only_where_the_transfer_says_so() -> None:
    merged, alone = configured(*LOW), configured(*LOW, "generator.transfer=adapter")
    assert "enable_lora" not in actors.engine_options(merged)
    assert actors.engine_options(merged)["weight_transfer_config"] == {"backend": "plasma"}
    options = actors.engine_options(alone)
    assert options["max_lora_rank"] == 8 and "weight_transfer_config" not in options
    parts = build_parts(merged)
    assert reused_actors.lasting(merged, parts) == reused_actors.lasting(configured(), parts), (
        "a lab keeps its machine"
    )
    assert reused_actors.lasting(alone, parts) != reused_actors.lasting(merged, parts)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["generator.transfer=adapter"], r"generator\.transfer=adapter.*learner\.lora\.rank"),
        (["learner.lora.alpha=3"], r"learner\.lora.*learner\.lora\.rank=0"),
        (
            [*LOW, "learner.lora.rank=1024", "generator.transfer=adapter"],
            r"rank=1024.*512.*plasma and learner\.lora\.export=merged",
        ),
        ([*LOW, "learner.lora.rank=513"], r"rank=513.*512.*set learner\.lora\.export=merged"),
        ([*LOW, "learner.lora.targets=[]"], r"learner\.lora\.targets=\[\].*rank=4.*all-linear"),
        ([*LOW, "learner.reset_after=2", "evaluate.every=1"], r"learner\.reset_after=2.*set"),
        (
            [*LOW, "cluster=one_gpu", "generator.transfer=adapter"],
            r"generator\.sleep=true.*generator\.transfer=ipc",
        ),
        ([*LOW, "learner.lora.export=both"], r"learner\.lora\.export=both: choose adapter or merged"),
        ([*LOW, "learner.lora.rank=-1"], r"learner\.lora\.rank=-1"),
        (["+generator.engine.enable_lora=true"], r"enable_lora.*learner\.lora"),
        ([*LOW, "model.path=/m", "learner.lr=0.003"], r"learner\.lr=0\.003.*0\.002.*LoRA.*lr_high"),
    ],
)
def test_what_lora_cannot_do_is_refused_with_the_remedy(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        compose.load_config(overrides)


def test_rates_up_to_20_times_those_of_full_training_are_taken() -> None:
    config, _ = compose.load_config([*LOW, "model.path=/m", "learner.lr=2e-3"])
    assert config.learner.lora == Lora(rank=4) and config.learner.lora.targets == ["all-linear"]
    named, _ = compose.load_config([*LOW, "learner.lora.targets=[q_proj,v_proj]"])
    assert named.learner.lora.targets == ["q_proj", "v_proj"]


@pytest.mark.parametrize(
    ("architecture", "served"),
    [
        *(("Qwen3ForCausalLM", True), ("MistralForCausalLM", True), ("Phi3ForCausalLM", True)),
        *(("Olmo2ForCausalLM", True), ("MiniCPM3ForCausalLM", True), ("GPT2LMHeadModel", False)),
        ("Starcoder2ForCausalLM", True),
    ],
)
def test_whether_vllm_takes_adapters_is_read_in_its_source(architecture: str, served: bool) -> None:
    def config(words: int) -> Any:
        text = SimpleNamespace(architectures=[architecture], vocab_size=words)
        text.get_text_config = lambda **_: text
        return text

    with pytest.raises(PreflightError, match=r"262,144.*generator\.transfer=plasma"):
        proof.check_adapters_served("some/model", config(262_144))
    if served:
        proof.check_adapters_served("some/model", config(1000))
    else:
        with pytest.raises(PreflightError, match=rf"{architecture}.*generator\.transfer=plasma"):
            proof.check_adapters_served("some/model", config(1000))


def test_an_adapter_is_no_model_to_train(tmp_path: Path) -> None:
    policy = adapted(folder("qwen3", tmp_path / "read"))
    place = exported(policy, tmp_path / "adapter", "some/base")
    with pytest.raises(PreflightError, match=r"some/base.*learner\.lora\.export=merged"):
        preflight.model(configured(f"model.path={place}", "learner.lr=1e-6"))
    (place / "adapter_config.json").write_text("{}")
    with pytest.raises(PreflightError, match=r"adapter_config\.json"):
        lora.read_config(str(place))


def test_a_dry_run_says_what_is_trained() -> None:
    line = memory.lora_lines(configured(*LOW, "generator.transfer=adapter"), 12_345)
    assert line == ["LoRA of rank 4 on all-linear, 12,345 parameters, served as an adapter"]
    assert memory.lora_lines(configured(), 12_345) == []
    known = configured("model.path=Qwen/Qwen2.5-7B-Instruct", "learner.lr=1e-6", *LOW)
    (said,) = [x for x in memory.memory_lines(known, SimpleNamespace(needs=())) if x.startswith("trained")]
    assert "about 10,092,544 parameters" in said, "of a model's shape, not of its matrices"
    constraints.check_lora(LearnerConfig(), configured().generator)
