"""Random models of the shapes that people train, and rows of tokens for them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from entroray.policy.tokenizer import byte_tokenizer
from entroray.types import Batch
from tests.gpu.record import SEED

SIZES: dict[str, dict[str, int]] = {
    "1.5B": {
        "hidden_size": 1536,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "intermediate_size": 8960,
        "vocab_size": 151_936,
    },
    "0.5B": {
        "hidden_size": 896,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "intermediate_size": 4864,
        "vocab_size": 151_936,
    },
    "tiny": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "vocab_size": 128,
    },
    "served": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 128,
        "vocab_size": 272,
    },
}
"""Of Qwen2.5, by its names; and two for the CPU, of which an engine can serve the second."""


def configuration(size: str) -> Any:
    """Of a Qwen2 with a tied head."""
    from transformers import Qwen2Config

    return Qwen2Config(**SIZES[size], max_position_embeddings=32_768, tie_word_embeddings=True)


def random_model(size: str, device: torch.device, dtype: torch.dtype) -> Any:
    """Initialised on the device, in its data type."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(SEED)
    with device:
        return AutoModelForCausalLM.from_config(configuration(size), dtype=dtype, attn_implementation="sdpa")


def served_folder(size: str, folder: Path, *, weights: bool, device: torch.device | str = "cpu") -> str:
    """A model as an engine reads it, with a tokenizer of bytes; without weights where it makes its own."""
    tokenizer = byte_tokenizer()
    if weights:
        model = random_model(size, torch.device(device), torch.bfloat16)
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.save_pretrained(folder)
    else:
        configured = configuration(size)
        configured.update({"architectures": ["Qwen2ForCausalLM"], "dtype": "bfloat16"})
        configured.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def rows(lengths: Sequence[int], vocabulary: int) -> Batch:
    """Random rows of these lengths; the first eighth of each, and at least a token, is its prompt."""
    random = np.random.default_rng(SEED)
    prompts = np.array([max(1, n // 8) for n in lengths], dtype=np.int32)
    responses = np.array(lengths, dtype=np.int32) - prompts
    ids = lambda n: random.integers(0, vocabulary, int(n)).astype(np.int32)
    hot = np.ones(len(lengths), dtype=np.float32)
    return Batch(ids(prompts.sum()), prompts, ids(responses.sum()), responses, hot)


@contextmanager
def may_run_out() -> Iterator[list[str]]:
    """Within it a card may run out of memory, which is then said in the list."""
    said: list[str] = []
    try:
        yield said
    except torch.OutOfMemoryError:
        said.append("out of memory")
    if said:  # only here nothing holds on to what it had
        torch.cuda.empty_cache()
