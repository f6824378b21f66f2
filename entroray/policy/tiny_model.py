"""The default policy: a small Qwen3 built from nothing, because no hub is always reachable."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from entroray.policy.tokenizer import byte_tokenizer


def build_tiny_model(folder: Path, size: Mapping[str, int], seed: int) -> int:
    """Write a freshly initialised model and its byte tokenizer to `folder`; returns its parameter count.

    `size` holds arguments of transformers' Qwen3Config.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM, set_seed  # more than a second of imports

    set_seed(seed)
    tokenizer = byte_tokenizer()
    model: Any = Qwen3ForCausalLM(Qwen3Config(**_sizes(size, tokenizer)))
    model.generation_config.update(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.num_parameters()


def count_parameters(size: Mapping[str, int]) -> int:
    """Parameters of the model that `build_tiny_model` would write; takes no memory for them."""
    import torch
    from transformers import Qwen3ForCausalLM

    with torch.device("meta"):
        return int(Qwen3ForCausalLM(tiny_config(size)).num_parameters())


def tiny_config(size: Mapping[str, int]) -> Any:
    """What `build_tiny_model` builds from, as transformers has it."""
    from transformers import Qwen3Config

    return Qwen3Config(**_sizes(size, byte_tokenizer()))


def _sizes(size: Mapping[str, int], tokenizer: Any) -> dict[str, Any]:
    ours = {
        "vocab_size": len(tokenizer),
        "tie_word_embeddings": True,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "dtype": "float32",
    }
    return {"head_dim": size["hidden_size"] // size["num_attention_heads"], **size, **ours}
