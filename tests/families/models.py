"""Every dense text architecture that vLLM and transformers both load, as a tiny random model.

Windows are shorter than the prompts that the models are tried on; scales, softcaps and biases are on.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

VOCABULARY, WINDOW, END = 272, 16, 257
PROMPT_TOKENS = 30
"""Longer than the window."""

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 512,
}
WIDE = {name: size for name, size in SIZES.items() if name != "head_dim"}
"""Of a family whose heads divide the width."""
ALL_HEADS = {name: size for name, size in WIDE.items() if name != "num_key_value_heads"}
FOUR = {**SIZES, "num_hidden_layers": 4}


@dataclass(frozen=True)
class Family:
    """A configuration of transformers, and how far apart its logits shall be."""

    config: str
    settings: dict[str, Any] = field(default_factory=dict)
    spread: float = 2.0
    """Standard deviation of the logits."""
    special: str = ""
    """What makes it different, in words."""


FAMILIES = {
    "llama": Family("LlamaConfig", SIZES, special="plain, untied head"),
    "qwen2": Family("Qwen2Config", {**WIDE, "tie_word_embeddings": True}, special="biases, tied head"),
    "qwen3": Family(
        "Qwen3Config", {**SIZES, "tie_word_embeddings": True}, special="norms of queries and keys"
    ),
    "mistral": Family("MistralConfig", {**SIZES, "sliding_window": WINDOW}, special="window"),
    "gemma2": Family(
        "Gemma2Config",
        {**SIZES, "sliding_window": WINDOW, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 32},
        spread=2.0,
        special="window, softcaps of logits and attention",
    ),
    "gemma3_text": Family(
        "Gemma3TextConfig",
        {
            **SIZES,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 32,
        },
        special="window, two rotary bases",
    ),
    "phi": Family("PhiConfig", ALL_HEADS, special="bias of the head, parallel layers"),
    "phi3": Family(
        "Phi3Config",
        {**WIDE, "sliding_window": WINDOW, "pad_token_id": 0},
        special="window, joined projections",
    ),
    "granite": Family(
        "GraniteConfig",
        {
            **WIDE,
            "logits_scaling": 8.0,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.2,
        },
        special="logits divided by 8",
    ),
    "cohere": Family(
        "CohereConfig", {**WIDE, "logit_scale": 0.0625}, spread=0.7, special="logits times 0.0625"
    ),
    "cohere2": Family(
        "Cohere2Config",
        {
            **SIZES,
            "logit_scale": 0.25,
            "sliding_window": 512,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        special="logits times 0.25, window longer than its texts",
    ),
    "olmo2": Family("Olmo2Config", WIDE, special="norms behind each part"),
    "olmo3": Family(
        "Olmo3Config", {**WIDE, "num_hidden_layers": 4, "sliding_window": WINDOW}, special="window"
    ),
    "smollm3": Family(
        "SmolLM3Config",
        {**WIDE, "num_hidden_layers": 4, "pad_token_id": 0},
        special="each fourth layer without positions",
    ),
    "gpt2": Family(
        "GPT2Config",
        {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 512},
        special="learned positions, dropout 0.1, body called transformer",
    ),
    "gpt_neox": Family("GPTNeoXConfig", ALL_HEADS, special="head called embed_out in its files"),
    "opt": Family(
        "OPTConfig",
        {
            "hidden_size": 64,
            "ffn_dim": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 512,
            "word_embed_proj_dim": 64,
            "pad_token_id": 0,
        },
        special="learned positions, dropout 0.1",
    ),
    "stablelm": Family("StableLmConfig", WIDE, special="part of each head rotated"),
    "starcoder2": Family("Starcoder2Config", {**WIDE, "sliding_window": WINDOW}, special="window, biases"),
    "exaone4": Family(
        "Exaone4Config", {**FOUR, "sliding_window": WINDOW}, special="window of three layers in four"
    ),
    "ernie4_5": Family("Ernie4_5Config", SIZES, special="rotates pairs of neighbours"),
    "seed_oss": Family("SeedOssConfig", SIZES, special="dropout 0.1, biases"),
    "nemotron": Family("NemotronConfig", SIZES, special="squared relu, norms with 1 added"),
    "minicpm3": Family(
        "MiniCPM3Config",
        {
            **ALL_HEADS,
            "num_key_value_heads": 2,
            "q_lora_rank": 32,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 16,
            "v_head_dim": 32,
            "dim_model_base": 16,
        },
        special="hidden states divided by 4, latent attention",
    ),
}
FEW = ("gemma2", "opt")
"""Of the default lane: softcap and window; dropout and another body."""


OUTPUTS = ("o_proj", "out_proj", "down_proj", "c_proj", "fc2", "dense_4h_to_h", "dense.weight", "post_")
LOUD = 6.0
"""How loud layers are beside the embedding: a tied head would else repeat the token it has just read."""


def configuration(name: str) -> Any:
    """Of a family, with the vocabulary of the tiny models' byte tokenizer and some rows more."""
    import transformers

    family = FAMILIES[name]
    ends = {"vocab_size": VOCABULARY, "eos_token_id": END, "bos_token_id": END}
    return getattr(transformers, family.config)(**{**ends, **family.settings})


def build(name: str, seed: int = 0) -> Any:
    """A model in float32 of which every part moves the logits."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(configuration(name), dtype=torch.float32).eval()
        for label, parameter in model.named_parameters():
            loud = any(part in label for part in OUTPUTS)
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=(LOUD if loud else 1) / math.sqrt(parameter.shape[-1]))
            else:
                parameter += 0.2 * torch.randn_like(parameter) + (LOUD if loud else 0)
        for _ in range(3):  # a tied head is read at the other end too
            model.get_output_embeddings().weight *= FAMILIES[name].spread / _spread(model)
    return model


def _spread(model: Any) -> float:
    """Standard deviation of what the head gives, before any softcap."""
    seen: list[torch.Tensor] = []
    hook = model.get_output_embeddings().register_forward_hook(lambda module, given, out: seen.append(out))
    final = model(input_ids=text()[None], use_cache=False).logits
    hook.remove()
    capped = getattr(model.config, "final_logit_softcapping", None)
    return float((seen[0] if capped else final).std())


def text(length: int = PROMPT_TOKENS, start: int = 0) -> torch.Tensor:
    """Token ids of the tiny models' vocabulary, no two neighbours alike."""
    return (torch.arange(start, start + length) * 37 + 11) % 250


def folder(name: str, place: Path) -> Path:
    """A family's model as `save_pretrained` writes it."""
    build(name).save_pretrained(place)
    return place


def write(name: str, place: Path) -> Path:
    """The model and the byte tokenizer as a folder of Hugging Face."""
    from entroray.policy.tokenizer import byte_tokenizer

    byte_tokenizer().save_pretrained(folder(name, place))
    return place


COMPOSITE = {
    "gemma3": ("Gemma3Config", "Gemma3ForConditionalGeneration", "Gemma3ForCausalLM"),
    "qwen2_5_vl": ("Qwen2_5_VLConfig", "Qwen2_5_VLForConditionalGeneration", "text"),
    "mistral3": ("Mistral3Config", "Mistral3ForConditionalGeneration", "MistralForCausalLM"),
    "llama4": ("Llama4Config", "Llama4ForConditionalGeneration", "Llama4ForCausalLM"),
    "qwen3_5": ("Qwen3_5Config", "Qwen3_5ForConditionalGeneration", "Qwen3_5ForCausalLM"),
}
"""Checkpoints of text and images: configuration, architecture, what their text part alone is called."""
UNPROVED = ("qwen3_5",)
"""Those whose text part the learner trains; on an engine, which needs torchvision, it was not tried."""


def composite(name: str) -> Any:
    """Its configuration, with the sizes that transformers gives it."""
    import transformers

    config, architecture, _ = COMPOSITE[name]
    return getattr(transformers, config)(architectures=[architecture])
