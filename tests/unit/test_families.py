"""The learner's half of every family: head and the model's own logits, names in files, what is written."""

import json
import os
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from entroray.errors import PreflightError
from entroray.policy import families, proof, small_copy
from entroray.policy.head import Readout
from entroray.policy.model import Policy, load_policy, pad
from entroray.types import Batch
from tests.families import models, table
from tests.families.models import FAMILIES


def batch(*lengths: int) -> Batch:
    """Texts of which all but the first three tokens are the response, at two temperatures."""
    rows = [models.text(n, start=7 * i).numpy().astype(np.int32) for i, n in enumerate(lengths)]
    counts = lambda parts: np.array([len(p) for p in parts], dtype=np.int32)
    before, after = [r[:3] for r in rows], [r[3:] for r in rows]
    hot = np.linspace(0.5, 1.0, len(rows)).astype(np.float32)
    return Batch(np.concatenate(before), counts(before), np.concatenate(after), counts(after), hot)


def own_statistics(model, b: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies of the responses by the model's own logits, row by row, without padding."""
    found, at = [], 0
    for i in range(b.num_rows):
        one = b.rows(np.array([i]))
        ids = torch.from_numpy(np.concatenate([one.prompt_ids, one.response_ids])).long()
        logits = model(input_ids=ids[None], use_cache=False).logits[0, 2:-1] / float(one.temperatures[0])
        logp = logits.log_softmax(-1)
        found.append((logp.gather(-1, ids[3:, None])[:, 0], -(logp.exp() * logp).sum(-1)))
        at += len(ids)
    return torch.cat([f[0] for f in found]), torch.cat([f[1] for f in found])


@pytest.mark.parametrize("name", FAMILIES)
def test_values_and_gradients_are_those_of_the_models_own_logits(name):
    """In float64 (norms apart), longer than the window, padded, whatever dropout a configuration asks for."""
    model, b = models.build(name).double(), batch(models.PROMPT_TOKENS, 21)
    logp, entropy = own_statistics(model, b)
    (logp.sum() + entropy.square().sum()).backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    policy = Policy(model).train()
    stats = policy(pad(b, torch.device("cpu")))
    torch.testing.assert_close(stats["logprobs"], logp.detach(), rtol=0, atol=1e-9)
    torch.testing.assert_close(stats["entropy"], entropy.detach(), rtol=0, atol=1e-9)
    (stats["logprobs"].sum() + stats["entropy"].square().sum()).backward()
    for n, p in policy.model.named_parameters():
        torch.testing.assert_close(p.grad, wanted[n], rtol=1e-5, atol=2e-7, msg=lambda m, n=n: f"{n}: {m}")


READ_OUT = {
    "llama": Readout(),
    "gemma2": Readout(softcap=3.0),
    "granite": Readout(scale=0.125),
    "cohere": Readout(scale=0.0625),
    "cohere2": Readout(scale=0.25),
    "minicpm3": Readout(hidden=0.25),
    "phi": Readout(),
}


@pytest.mark.parametrize("name", READ_OUT)
def test_what_stands_behind_the_head_is_measured_to_the_bit(name):
    assert families.stream_head(models.build(name)) == READ_OUT[name]


def behind(model, change):
    """`model` with logits changed by `change` in its own forward."""
    forward = type(model).forward

    class Changed(type(model)):
        def forward(self, **given):
            out = forward(self, **given)
            out.logits = change(out.logits)
            return out

    model.__class__ = Changed
    return model


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (lambda z: z * -3.0, Readout(scale=-3.0)),
        (lambda z: torch.tanh(z * 0.7 / 20) * 20, Readout(scale=0.7, softcap=20.0)),  # scale, then softcap
        (lambda z: torch.tanh(z / 20) * 20 * 0.7, Readout(scale=0.7, softcap=14.0)),  # softcap, then scale
    ],
)
def test_scale_and_softcap_in_either_order_are_computed(change, wanted):
    model, b = behind(models.build("llama").double(), change), batch(12)
    logp, entropy = own_statistics(model, b)
    policy = Policy(model)
    assert policy.readout.scale == pytest.approx(wanted.scale, rel=1e-12)
    assert policy.readout.softcap == (wanted.softcap and pytest.approx(wanted.softcap, rel=1e-12))
    stats = policy(pad(b, torch.device("cpu")))
    torch.testing.assert_close(stats["logprobs"], logp, rtol=0, atol=1e-9)
    torch.testing.assert_close(stats["entropy"], entropy, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "change",
    [
        lambda z: z + 1.0,
        lambda z: z.square(),
        lambda z: z.clamp(max=3.0),
        lambda z: z - z.mean(-1, keepdim=True),
        lambda z: torch.zeros_like(z),
    ],
)
def test_what_is_neither_scale_nor_softcap_is_refused_by_the_class(change):
    with pytest.raises(PreflightError, match=r"model\.path=.*\(Changed\)"):
        Policy(behind(models.build("llama"), change))


def test_a_change_of_single_words_is_found_by_the_proof():
    """Planted logits do not show what is done to one row of the vocabulary alone."""
    only = torch.zeros(small_copy.VOCABULARY)
    only[5] = 1.0
    small = small_copy.build_small_copy(models.configuration("llama"))
    model = behind(small, lambda z: z + (only if z.shape[-1] == len(only) else 0.0))
    assert proof.learner_gap(model, proof.own_statistics(model)) > proof.TOLERANCE


@pytest.mark.parametrize("name", FAMILIES)
def test_a_small_copy_proves_every_family(name):
    config = models.configuration(name)
    config.architectures = [class_name(name)]
    assert "nats off" in proof.check_architecture("some/model", config)


def class_name(name: str) -> str:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    return MODEL_FOR_CAUSAL_LM_MAPPING[type(models.configuration(name))].__name__


# --- what is read, sent and written ---


def folder(name: str, place: Path) -> Path:
    """A family's model as `save_pretrained` writes it."""
    models.build(name).save_pretrained(place)
    return place


def rename(place: Path, change) -> None:
    """Other names for the tensors of a model's file; those called None are left out."""
    file = place / "model.safetensors"
    renamed = {change(name): t for name, t in load_file(file).items()}
    save_file({n: t for n, t in renamed.items() if n}, file, metadata={"format": "pt"})


def stored(place: Path) -> dict[str, torch.Tensor]:
    return load_file(place / "model.safetensors")


def written(policy: Policy, place: Path) -> Path:
    """The policy with each of its parameters moved by 0.5, as a run exports it."""
    policy.write(place, {name: p.detach() + 0.5 for name, p in policy.named_weights()})
    return place


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_written_has_the_names_and_shapes_of_what_was_read(name, tmp_path):
    source = folder(name, tmp_path / "read")
    policy = load_policy(str(source), torch.float32)
    before, after = stored(source), stored(written(policy, tmp_path / "written"))
    assert before.keys() == after.keys() == {name for name, _ in policy.named_weights()}
    for key, tensor in before.items():
        torch.testing.assert_close(after[key], tensor + 0.5, rtol=0, atol=0)


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


def test_tensors_that_a_language_model_has_not_are_written_as_they_were(tmp_path):
    source = folder("llama", tmp_path / "read")
    more = stored(source) | {"visual.patch.weight": torch.arange(6.0).reshape(2, 3).bfloat16()}
    save_file(more, source / "model.safetensors", metadata={"format": "pt"})
    after = stored(written(load_policy(str(source), torch.float32), tmp_path / "written"))
    assert after["visual.patch.weight"].dtype == torch.bfloat16
    torch.testing.assert_close(after["visual.patch.weight"], more["visual.patch.weight"], rtol=0, atol=0)


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
    policy.write(tmp_path / "written", {name: p.detach() for name, p in policy.named_weights()})
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


# --- after loading ---


@pytest.mark.parametrize("name", ["gemma2", "cohere", "minicpm3", "phi", "opt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_model_gives_the_log_probs_of_its_own_logits(name, dtype, tmp_path):
    policy = load_policy(str(folder(name, tmp_path)), dtype)
    assert proof.check_loaded(str(tmp_path), policy) < 1e-4


def test_a_head_that_gives_other_log_probs_is_refused_with_the_number(tmp_path):
    policy = load_policy(str(folder("cohere", tmp_path)), torch.float32)
    policy.model.get_output_embeddings().readout = Readout()
    with pytest.raises(PreflightError, match=rf"model\.path={tmp_path} \(CohereForCausalLM\).* nats"):
        proof.check_loaded(str(tmp_path), policy)


def test_dropout_is_off_wherever_a_model_keeps_its_rate(tmp_path):
    rates = {"resid_pdrop": 0.3, "embd_pdrop": 0.2, "attn_pdrop": 0.1}
    config = models.configuration("gpt2")
    for name, rate in rates.items():
        setattr(config, name, rate)
    from transformers import GPT2LMHeadModel

    policy = Policy(GPT2LMHeadModel(config)).train()
    assert not any(m.p for m in policy.modules() if isinstance(m, nn.Dropout))
    assert not policy.model.config.attn_pdrop and not policy.training


def test_layers_that_are_checkpointed_train_and_give_the_same(tmp_path):
    b, found = batch(20, 12), []
    for again in (False, True):
        policy = Policy(models.build("opt"))
        if again:
            policy.model.gradient_checkpointing_enable()
        policy.train()
        assert policy.model.get_decoder().layers[0].training == again
        stats = policy(pad(b, torch.device("cpu")))
        stats["logprobs"].sum().backward()
        found.append((stats["logprobs"].detach(), policy.model.get_decoder().layers[0].fc1.weight.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


# --- before anything is read ---


@pytest.mark.parametrize("name", models.COMPOSITE)
def test_a_checkpoint_of_text_and_images_is_refused_by_its_name(name):
    _, architecture, alone = models.COMPOSITE[name]
    with pytest.raises(PreflightError, match=rf"model\.path=some/model \({architecture}\).*{alone}"):
        proof.check_architecture("some/model", models.composite(name))


def test_a_model_of_no_language_is_refused_by_its_name():
    from transformers import ViTConfig

    with pytest.raises(PreflightError, match=r"model\.path=some/model \(ViTForImageClassification\)"):
        proof.check_architecture("some/model", ViTConfig(architectures=["ViTForImageClassification"]))


def test_an_architecture_that_vllm_has_not_is_refused_by_its_name():
    from transformers import XLNetConfig

    with pytest.raises(PreflightError, match=r"model\.path=some/model \(XLNetLMHeadModel\): vLLM"):
        proof.check_architecture("some/model", XLNetConfig(architectures=["XLNetLMHeadModel"]))


def test_a_mixture_of_experts_is_refused_before_its_weights_are_read():
    from transformers import Qwen3MoeConfig

    with pytest.raises(PreflightError, match=r"model\.path=some/model \(Qwen3MoeForCausalLM\).*experts"):
        proof.check_architecture("some/model", Qwen3MoeConfig(architectures=["Qwen3MoeForCausalLM"]))


def test_texts_longer_than_a_window_that_engines_read_otherwise_are_refused():
    config = models.configuration("cohere2")
    families.check_window(config, 512)
    with pytest.raises(
        PreflightError, match=r"data\.max_prompt \+ rollout\.max_tokens = 513 .*cohere2.*512.*0\.033"
    ):
        families.check_window(config, 513)
    families.check_window(models.configuration("gemma2"), 10_000)


BIG = {
    "Qwen2Config": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}},
    "Phi3Config": {
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0] * 48,
            "long_factor": [2.0] * 48,
            "original_max_position_embeddings": 4096,
        },
        "max_position_embeddings": 131072,
    },
    "Gemma3TextConfig": {"num_hidden_layers": 62, "hidden_size": 5376, "num_attention_heads": 32},
    "LlamaConfig": {"num_hidden_layers": 126, "hidden_size": 16384, "num_attention_heads": 128},
    "MiniCPM3Config": {},
    "SmolLM3Config": {},
    "OPTConfig": {"word_embed_proj_dim": 512, "hidden_size": 1024, "do_layer_norm_before": False},
    "Cohere2Config": {},
    "Exaone4Config": {},
}


@pytest.mark.parametrize("config", BIG)
def test_a_small_copy_of_the_real_sizes_is_made_in_no_time(config):
    import transformers

    small = small_copy.build_small_copy(getattr(transformers, config)(**BIG[config]))
    assert small.num_parameters() < 1e6
    assert proof.learner_gap(small, proof.own_statistics(small)) < 1e-4


def test_the_readme_shows_the_rows_that_are_kept():
    """`python -m tests.families.table` writes them there."""
    assert table.README.read_text() == table.shown()
    assert not [
        wrong for row in table.kept().values() if "refused" not in row for wrong in table.complaints(row)
    ]
