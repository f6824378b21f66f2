"""The default policy: a small Qwen3 built from nothing, because no hub is always reachable."""

from pathlib import Path
from typing import Any

from entroray.config import ModelSize
from entroray.policy.tokenizer import byte_tokenizer


def build_tiny_model(folder: Path, size: ModelSize, seed: int) -> int:
    """Write a freshly initialised model and its byte tokenizer to `folder`; returns its parameter count."""
    from transformers import Qwen3Config, Qwen3ForCausalLM, set_seed  # more than a second of imports

    set_seed(seed)
    tokenizer = byte_tokenizer()
    model: Any = Qwen3ForCausalLM(Qwen3Config(**_sizes(size, tokenizer)))
    model.generation_config.update(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.num_parameters()


def count_parameters(size: ModelSize) -> int:
    """Parameters of the model that `build_tiny_model` would write; takes no memory for them."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    with torch.device("meta"):
        return int(Qwen3ForCausalLM(Qwen3Config(**_sizes(size, byte_tokenizer()))).num_parameters())


def _sizes(size: ModelSize, tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": size.width,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "head_dim": size.width // size.heads,
        "intermediate_size": size.mlp,
        "max_position_embeddings": size.context,
        "tie_word_embeddings": True,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "dtype": "float32",
    }
