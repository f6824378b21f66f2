"""The learner's half of every family: head and the model's own logits, before, at and after loading."""

import numpy as np
import pytest
import torch

from entroray.errors import PreflightError
from entroray.policy import families, proof, small_copy
from entroray.policy.head import Readout
from entroray.policy.model import Policy, load_policy, pad
from entroray.types import Batch
from tests.families import models, table
from tests.families.models import FAMILIES, folder


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
        one = b.cut([np.array([i])])[0]
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


@pytest.mark.parametrize("name", FAMILIES)
def test_dropout_is_off_wherever_a_family_keeps_its_rates(name):
    """In train mode, which only checkpointed layers need, with every rate of the configuration at 0.5."""
    from transformers import AutoModelForCausalLM

    config = models.configuration(name)
    rates = [r for r in vars(config) if "drop" in r]
    for rate in rates:
        setattr(config, rate, 0.5)
    model, b = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval(), batch(20)
    logp, entropy = own_statistics(model, b)
    model.gradient_checkpointing_enable()
    policy = Policy(model).train()
    stats = policy(pad(b, torch.device("cpu")))
    assert policy.training and (rates or name == "ernie4_5")
    torch.testing.assert_close(stats["logprobs"], logp, rtol=0, atol=1e-5)
    torch.testing.assert_close(stats["entropy"], entropy, rtol=0, atol=1e-5)


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


def test_quantised_weights_are_refused_before_they_are_read():
    config = models.configuration("llama")
    config.architectures = ["LlamaForCausalLM"]
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(PreflightError, match=r"model\.path=some/model \(LlamaForCausalLM\) is quantised"):
        proof.check_architecture("some/model", config)


def test_texts_longer_than_a_window_that_engines_read_otherwise_are_refused():
    config = models.configuration("cohere2")
    families.check_window(config, 512)
    with pytest.raises(
        PreflightError, match=r"data\.max_prompt \+ rollout\.max_tokens = 513 .*cohere2.*512.*0\.033"
    ):
        families.check_window(config, 513)
    families.check_window(models.configuration("gemma2"), 10_000)


def test_a_softcap_of_attention_is_computed_whatever_attention_is_asked_for(tmp_path):
    """torch's own attention leaves it out: engines, which do not, would sample from another policy."""
    policy = load_policy(str(folder("gemma2", tmp_path)), torch.float32, "sdpa")
    whole, b = models.build("gemma2"), batch(models.PROMPT_TOKENS)
    whole.set_attn_implementation("eager")
    logp, _ = own_statistics(whole, b)
    torch.testing.assert_close(policy(pad(b, torch.device("cpu")))["logprobs"], logp, rtol=0, atol=1e-5)
    assert families.attention(models.configuration("llama"), "sdpa") == "sdpa"


def test_an_attention_that_leaves_something_out_is_refused_with_the_number(monkeypatch):
    monkeypatch.setattr(families, "attention", lambda config, asked: asked)
    config = models.configuration("gemma2")
    config.attn_logit_softcapping = 1.0
    with pytest.raises(PreflightError, match=r"\(Gemma2ForCausalLM\).* nats .*model\.attention=eager"):
        proof.check_architecture("some/model", config)


def test_an_attention_that_a_model_has_not_is_refused_before_it_is_loaded():
    from transformers import GptOssConfig

    with pytest.raises(PreflightError, match=r"model\.path=some/model .*model\.attention=sdpa.*=eager"):
        proof.check_architecture("some/model", GptOssConfig(), "sdpa")


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
