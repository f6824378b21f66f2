"""A model of the same family that fits anywhere: few layers, small widths, all that makes the family special.

Scales, softcaps, biases, kinds of layers, tied or untied weights stay; a sliding window gets shorter than
the texts that the copy is tried on.
"""

import math
from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import nn

VOCABULARY, WINDOW = 128, 8
HEAD, HEADS = 32, 2
LOGITS = 4.0
"""Standard deviation of the head's own logits: a softcap shows, and words keep their share."""

_SIZES: Mapping[str, int] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HEAD * HEADS,
    "num_attention_heads": HEADS,
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "moe_intermediate_size"), 96),
    **dict.fromkeys(("sliding_window", "attention_window_size", "attention_chunk_size"), WINDOW),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "n_group", "topk_group"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim"), 16),
    "v_head_dim": HEAD,
    "rotary_dim": HEAD // 2,
    "qk_head_dim": HEAD,
}
"""Settings that a configuration may have, by transformers' names for them."""


def shrink_config(config: Any) -> Any:
    """A copy of a language model's configuration with small sizes."""
    small = deepcopy(config)
    heads, shared = _number(config, "num_attention_heads"), _number(config, "num_key_value_heads")
    width, embedded = _number(config, "hidden_size"), _number(config, "word_embed_proj_dim")
    rotated = _number(config, "qk_rope_head_dim")
    rotary = rotated is not None and _number(config, "head_dim") == rotated
    _set(small, _SIZES)
    _set(small, {"num_key_value_heads": HEADS if shared == heads else 1, "head_dim": 16 if rotary else HEAD})
    _set(small, {"word_embed_proj_dim": HEAD * HEADS if embedded == width else HEAD})
    _set(small, {"max_position_embeddings": min(_number(config, "max_position_embeddings") or 4096, 4096)})
    _keep_layers(small, _number(config, "num_hidden_layers") or 1)
    for name in [n for n in vars(small) if n.endswith("_token_id") and getattr(small, n) is not None]:
        setattr(small, name, 0)
    for rope in _ropes(getattr(small, "rope_parameters", None)):
        _shorten_rope(rope, 16 if rotary else HEAD)
    return small


def _number(config: Any, name: str) -> int | None:
    value = getattr(config, name, None)
    return value if isinstance(value, int) else None


def _set(config: Any, sizes: Mapping[str, int]) -> None:
    for name, size in sizes.items():
        if _number(config, name) is not None and not isinstance(getattr(type(config), name, None), property):
            setattr(config, name, size)


def _keep_layers(config: Any, number: int) -> None:
    """One layer of each kind that the configuration's lists tell apart, and two at least."""
    lists = {n: v for n, v in vars(config).items() if isinstance(v, list) and len(v) == number > 1}
    kinds = [repr([v[layer] for v in lists.values()]) for layer in range(number)]
    kept = sorted({kinds.index(kind) for kind in kinds} | set(range(min(2, number))))[:8]
    config.num_hidden_layers = len(kept)
    for name, value in lists.items():
        setattr(config, name, [value[layer] for layer in kept])


def _ropes(parameters: Any) -> Iterator[dict[str, Any]]:
    """The settings of rotary positions, which some models have for each kind of layer."""
    if isinstance(parameters, dict):
        yield parameters
        for inner in parameters.values():
            yield from _ropes(inner)


def _shorten_rope(rope: dict[str, Any], width: int) -> None:
    """Lists that hold a number for each pair of rotated dimensions, or their shares of them."""
    pairs = int(width * rope.get("partial_rotary_factor", 1.0)) // 2
    for name in ("short_factor", "long_factor"):
        if isinstance(rope.get(name), list):
            rope[name] = rope[name][:pairs]
    if sections := rope.get("mrope_section"):
        shares = [pairs * s // sum(sections) for s in sections]
        rope["mrope_section"] = [pairs - sum(shares[1:]), *shares[1:]]


@torch.no_grad()
def build_small_copy(config: Any) -> Any:
    """A model of random float32 weights and eager attention, whose every part moves its logits."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        small = shrink_config(config)
        model = AutoModelForCausalLM.from_config(
            small, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=1 / math.sqrt(parameter.shape[-1]))
            else:
                parameter += 0.2 * torch.randn_like(parameter)
        head = model.get_output_embeddings()
        if isinstance(head, nn.Linear):
            nn.init.normal_(head.weight, std=LOGITS / math.sqrt(head.in_features))
    return model
