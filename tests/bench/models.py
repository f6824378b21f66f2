"""Random Qwen3 models whose responses have the lengths that a benchmark asks for, whoever draws them.

A model has one coordinate that is the same large number in every embedding but that of the end token, so the
last hidden state has it large too, and the end token's logit is moved by a constant. The same folder is
given to both sides, and neither is told when to end.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, set_seed

from entroray.policy.tokenizer import ASSISTANT, END, PAD, TEMPLATE, USER

SIZES: Mapping[str, tuple[int, Mapping[str, int]]] = {
    "0.8 M": (
        260,
        {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4, "num_key_value_heads": 2},
    ),
    "19 M": (
        16_384,
        {"hidden_size": 512, "intermediate_size": 1152, "num_attention_heads": 8, "num_key_value_heads": 4},
    ),
}
"""Vocabulary, and what of Qwen3Config differs; each has 4 layers and a tied head."""
QUESTIONS = 512


def tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """entroray's byte tokenizer, with as many tokens more as `vocabulary` asks for, which no text uses."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = (PAD, END, USER, ASSISTANT)
    more = [f"<{i}>" for i in range(vocabulary - len(alphabet) - len(special))]
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate([*alphabet, *more])}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token=END,
        pad_token=PAD,
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def make(folder: Path, size: str, mean: float | None) -> None:
    """A model folder with the file questions.jsonl; responses end by chance after `mean` tokens, or never."""
    vocabulary, shape = SIZES[size]
    set_seed(0)
    words = tokenizer(vocabulary)
    end, pad = words.eos_token_id, words.pad_token_id
    config = Qwen3Config(
        vocab_size=len(words),
        num_hidden_layers=4,
        head_dim=shape["hidden_size"] // shape["num_attention_heads"],
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        eos_token_id=end,
        pad_token_id=pad,
        dtype="float32",
        **shape,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config.update(eos_token_id=end, pad_token_id=pad)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 1.0
        model.model.embed_tokens.weight[end, 0] = -1.0 if mean is None else _end_weight(model, end, mean)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    rows = [{"question": f"{i:04d} + {i * 7919 % 10_000:04d} = ", "answer": "0"} for i in range(QUESTIONS)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _end_weight(model: Qwen3ForCausalLM, end: int, mean: float) -> float:
    """The weight with which the end token has probability 1/`mean`, over random text."""
    ids = torch.randint(0, 256, (32, 64), generator=torch.Generator().manual_seed(0))
    hidden = model.model(ids).last_hidden_state
    logits = model.lm_head(hidden)
    low, high = -1.0, 3.0
    for _ in range(40):
        weight = (low + high) / 2
        logits[..., end] = hidden[..., 1:] @ model.lm_head.weight[end, 1:] + weight * hidden[..., 0]
        if float(logits.softmax(-1)[..., end].mean()) < 1 / mean:
            low = weight
        else:
            high = weight
    return low
