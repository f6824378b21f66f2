"""A model's folder: names in memory against names in files, and what is written of what was read."""

import json
import os
import stat
import weakref
from contextlib import nullcontext
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from entroray.errors import PreflightError
from entroray.policy import divided, model_files
from entroray.policy.model import Policy, load_policy
from entroray.policy.safetensors_header import tensor_shapes
from entroray.wiring import preflight
from tests.families import models
from tests.families.models import FAMILIES, folder


def rename(place: Path, change) -> None:
    """Other names for the tensors of a model's file; those called None are left out."""
    file = place / "model.safetensors"
    renamed = {change(name): t for name, t in load_file(file).items()}
    save_file({n: t for n, t in renamed.items() if n}, file, metadata={"format": "pt"})


def stored(place: Path) -> dict[str, torch.Tensor]:
    return load_file(place / "model.safetensors")


def written(policy: Policy, place: Path) -> Path:
    """The policy with each of its parameters moved by 0.5, as a run exports it."""
    policy.write(place, ((name, p.detach() + 0.5) for name, p in policy.named_weights()))
    return place


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_written_has_the_names_and_shapes_of_what_was_read(name, tmp_path):
    source = folder(name, tmp_path / "read")
    policy = load_policy(str(source), torch.float32)
    before, after = stored(source), stored(written(policy, tmp_path / "written"))
    assert before.keys() == after.keys() == {name for name, _ in policy.named_weights()}
    for key, tensor in before.items():
        torch.testing.assert_close(after[key], tensor + 0.5, rtol=0, atol=0)


@pytest.mark.parametrize("limit", [1, 20_000, 150_000])
def test_an_export_in_several_files_is_read_as_it_was_in_one(limit, tmp_path, monkeypatch):
    monkeypatch.setattr(model_files, "SHARD_BYTES", limit)
    policy = load_policy(str(folder("qwen3", tmp_path / "read")), torch.float32)
    place = written(policy, tmp_path / "written")
    files = sorted(place.glob("*.safetensors"))
    assert len(files) > 1 and [f.name for f in files] == [
        f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))
    ]
    sizes = [sum(t.nbytes for t in load_file(f).values()) for f in files]
    assert all(size <= limit or len(load_file(f)) == 1 for f, size in zip(files, sizes, strict=True))
    index = json.loads((place / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(sizes)}
    assert index["weight_map"] == {name: f.name for f in files for name in load_file(f)}
    again = dict(load_policy(str(place), torch.float32).named_weights())
    for name, tensor in policy.named_weights():
        torch.testing.assert_close(again[name], tensor + 0.5, rtol=0, atol=0)


def test_no_more_is_held_than_goes_into_one_file(tmp_path, monkeypatch):
    """Four tensors of 4,000 bytes, two to a file: the third finds at most one before it."""
    monkeypatch.setattr(model_files, "SHARD_BYTES", 8_000)
    policy, alive, most = load_policy(str(folder("llama", tmp_path / "read")), torch.float32), [], []

    def gathered():
        for name in "abcd":
            most.append(sum(ref() is not None for ref in alive))
            tensor = torch.zeros(1000)
            alive.append(weakref.ref(tensor))
            yield name, tensor

    model_files.write_model(tmp_path / "written", policy.model, gathered(), {})
    assert most == [0, 1, 2, 1]


def test_the_head_of_gpt_neox_goes_by_its_name_in_files(tmp_path):
    policy = load_policy(str(folder("gpt_neox", tmp_path)), torch.float32)
    assert {"embed_out.weight", "gpt_neox.embed_in.weight"} <= {name for name, _ in policy.named_weights()}


def test_files_without_the_prefix_of_the_body_keep_their_names(tmp_path):
    """As GPT-2 on the hub, whose names begin with h.0 and not with transformer.h.0."""
    source = folder("gpt2", tmp_path / "read")
    rename(source, lambda name: name.removeprefix("transformer."))
    policy = load_policy(str(source), torch.float32)
    assert "h.0.attn.c_attn.weight" in stored(written(policy, tmp_path / "written"))
    again = load_policy(str(tmp_path / "written"), torch.float32)
    torch.testing.assert_close(again.model.transformer.wte.weight, policy.model.transformer.wte.weight + 0.5)


def test_a_tied_head_that_is_in_the_files_too_is_not_written_as_it_was(tmp_path):
    source = folder("qwen3", tmp_path / "read")
    tensors = stored(source)
    double = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file(double, source / "model.safetensors", metadata={"format": "pt"})
    policy = load_policy(str(source), torch.float32)
    again = load_policy(str(written(policy, tmp_path / "written")), torch.float32)
    head = again.model.get_output_embeddings().weight
    torch.testing.assert_close(head, tensors["model.embed_tokens.weight"] + 0.5, rtol=0, atol=0)


def test_a_head_that_only_the_configuration_calls_tied_is_sent_on_its_own(tmp_path):
    """transformers and vLLM both take the head that the files have where it differs from the embedding."""
    source = folder("qwen3", tmp_path / "read")
    tensors = stored(source)
    other = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] * 2}
    save_file(other, source / "model.safetensors", metadata={"format": "pt"})
    policy = load_policy(str(source), torch.float32)
    sent = dict(policy.named_weights())
    torch.testing.assert_close(sent["lm_head.weight"].detach(), other["lm_head.weight"], rtol=0, atol=0)


@pytest.mark.parametrize("lost", ["lm_head.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_parameter_that_no_file_holds_is_refused_not_drawn_at_random(lost, tmp_path):
    source = folder("llama", tmp_path)
    rename(source, lambda name: None if name == lost else name)
    with pytest.raises(PreflightError, match=rf"model\.path={tmp_path} .*{lost}"):
        load_policy(str(source), torch.float32)


def test_files_of_pytorch_are_read_whole_and_written_as_safetensors(tmp_path):
    source = folder("gpt_neox", tmp_path / "read")
    tensors = stored(source)
    (source / "model.safetensors").unlink()
    torch.save(tensors, source / "pytorch_model.bin")
    policy = load_policy(str(source), torch.float32)
    assert stored(written(policy, tmp_path / "written")).keys() == tensors.keys()
    torch.save({n: t for n, t in tensors.items() if n != "embed_out.weight"}, source / "pytorch_model.bin")
    with pytest.raises(PreflightError, match=rf"model\.path={source} .*lm_head\.weight"):
        load_policy(str(source), torch.float32)


def test_tensors_that_a_language_model_has_not_are_written_as_they_were(tmp_path):
    source = folder("llama", tmp_path / "read")
    more = stored(source) | {"visual.patch.weight": torch.arange(6.0).reshape(2, 3).bfloat16()}
    save_file(more, source / "model.safetensors", metadata={"format": "pt"})
    after = stored(written(load_policy(str(source), torch.float32), tmp_path / "written"))
    assert after["visual.patch.weight"].dtype == torch.bfloat16
    torch.testing.assert_close(after["visual.patch.weight"], more["visual.patch.weight"], rtol=0, atol=0)


def config_with(place: Path, **values) -> None:
    file = place / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_shapes_that_the_configuration_does_not_have_are_refused_by_name(tmp_path):
    source = folder("llama", tmp_path)
    config_with(source, vocab_size=300)
    with pytest.raises(
        PreflightError, match=rf"model\.path={tmp_path} .*lm_head.*\(272, 64\), not \(300, 64\)"
    ):
        load_policy(str(source), torch.float32)


def test_a_model_of_the_hub_is_on_this_machine_before_ranks_divide_it(tmp_path, monkeypatch):
    """So that its shapes can be compared, which transformers does not do for ZeRO 3."""
    cache, asked = tmp_path / "models--of--someone" / "snapshots" / ("0" * 40), []
    ref = cache.parents[1] / "refs" / "main"
    ref.parent.mkdir(parents=True)
    ref.write_text(cache.name)

    def download(name, allow_patterns):
        asked.append(name)
        folder("llama", cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert divided.fetch("of/someone") == cache and asked == ["of/someone"]
    assert divided.fetch(str(cache)) == cache and asked == ["of/someone"]
    (cache / "model.safetensors").rename(cache / "weights.bin")
    for path in ("of/someone", str(cache)):
        monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: None)
        with pytest.raises(PreflightError, match=rf"model\.path={path} has no safetensors.*zero_stage=2"):
            load_policy(path, torch.float32, division=nullcontext())


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", b""),
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1"),
        ("config.json", b"[]"),
        ("config.json", b'{"model_type": "llama", "hidden_size": "64"}'),
        ("generation_config.json", b"null"),
    ],
)
def test_a_folder_that_transformers_cannot_read_is_refused_by_its_path(name, content, tmp_path):
    source = folder("llama", tmp_path)
    (source / name).write_bytes(content)
    with pytest.raises(PreflightError, match=rf"model\.path={tmp_path} cannot be loaded"):
        load_policy(str(source), torch.float32)


GENERATION = [
    {"do_sample": False, "temperature": 0.9, "top_p": 0.6},
    {"num_beams": 1, "early_stopping": True, "length_penalty": 2.0},
    {"temperature": 0.0, "do_sample": True},
    {"suppress_tokens": [5], "of_our_own": {"a": 1}, "eos_token_id": [257, 256]},
]


@pytest.mark.parametrize("settings", GENERATION)
def test_generation_settings_are_written_as_they_were_read(settings, tmp_path):
    source = folder("llama", tmp_path / "read")
    (source / "generation_config.json").write_text(json.dumps(settings))
    written(load_policy(str(source), torch.float32), tmp_path / "written")
    assert json.loads((tmp_path / "written" / "generation_config.json").read_text()) == settings


@pytest.mark.parametrize(
    "settings", [{"temperature": 0.7, "do_sample": True}, {"max_length": 99}, {"of_our_own": 1}]
)
def test_a_configuration_that_transformers_would_not_write_is_written(settings, tmp_path):
    source = folder("seed_oss", tmp_path / "read")
    read = json.loads((source / "config.json").read_text()) | settings
    (source / "config.json").write_text(json.dumps(read))
    policy = load_policy(str(source), torch.float32)
    found = json.loads((written(policy, tmp_path / "written") / "config.json").read_text())
    assert found == read and found["attention_dropout"] == 0.1, "dropout is off in the learner alone"


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_files_get_the_mode_that_umask_gives(umask, mode, tmp_path):
    policy = load_policy(str(folder("llama", tmp_path / "read")), torch.float32)
    before = os.umask(umask)
    try:
        written(policy, tmp_path / "written")
    finally:
        os.umask(before)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "written").iterdir()}
    assert modes == dict.fromkeys(("config.json", "generation_config.json", "model.safetensors"), mode)


def test_the_data_type_written_is_that_of_the_weights(tmp_path):
    source = folder("llama", tmp_path / "read")
    policy = load_policy(str(source), torch.bfloat16)
    policy.write(tmp_path / "written", policy.named_weights())
    assert json.loads((tmp_path / "written" / "config.json").read_text())["dtype"] == "bfloat16"
    assert {t.dtype for t in stored(tmp_path / "written").values()} == {torch.bfloat16}


def test_the_text_part_of_a_checkpoint_with_images_is_read_sent_and_written_under_its_names(tmp_path):
    """Qwen 3.5's learner half: engines of this machine cannot serve it, for want of torchvision."""
    import transformers

    heads = dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2)
    text = {
        **models.SIZES,
        **heads,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "vocab_size": 272,
    }
    seen = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
    config = transformers.Qwen3_5Config(text_config=text, vision_config=seen)
    whole = transformers.Qwen3_5ForConditionalGeneration(config)
    whole.save_pretrained(tmp_path / "read")
    policy = load_policy(str(tmp_path / "read"), torch.float32)
    before, after = stored(tmp_path / "read"), stored(written(policy, tmp_path / "written"))
    sent = {name for name, _ in policy.named_weights()}
    assert "model.language_model.embed_tokens.weight" in sent and before.keys() == after.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor + (0.5 if name in sent else 0.0), rtol=0, atol=0)
    assert {n for n in before if ".visual." in n} == before.keys() - sent != set()
    read = json.loads((tmp_path / "written" / "config.json").read_text())
    assert read["architectures"] == ["Qwen3_5ForConditionalGeneration"]


@pytest.mark.parametrize("harm", ["cut", "longer", "empty index", "{} index", "index of a file not there"])
def test_weights_that_are_not_whole_are_refused_by_their_file(tmp_path: Path, harm: str) -> None:
    save_file({"w": torch.zeros(4)}, tmp_path / "model.safetensors")
    whole, index = tmp_path / "model.safetensors", tmp_path / "model.safetensors.index.json"
    assert tensor_shapes(tmp_path) == {"w": [4]}
    if harm in ("cut", "longer"):
        raw = whole.read_bytes()
        whole.write_bytes(raw[:-1] if harm == "cut" else raw + b"0")
    else:
        text = {"empty index": "", "{} index": "{}"}.get(harm, '{"weight_map": {"w": "gone.safetensors"}}')
        index.write_text(text)
    if harm.startswith("index"):
        assert tensor_shapes(tmp_path) == {}
    with pytest.raises(PreflightError, match=r"model"):
        preflight._check_weights(str(tmp_path))
