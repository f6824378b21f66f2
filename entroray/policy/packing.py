"""Rows end to end on one axis of tokens, with no padding, and the attention that keeps them apart.

On a GPU it is torch's varlen_attn, whose kernels are FlashAttention-2 (Dao 2023), elsewhere SDPA of each row,
and SDPA of a batch where all rows are of one length. Liger's kernels and torch's compiler are here too: what
makes a model quicker, not another.
"""

import inspect
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from entroray.errors import PreflightError
from entroray.policy.model import Layout, lay_out
from entroray.types import Batch

QKV = tuple[Tensor, ...]
"""[N, heads, D], [N, shared, D] and again; `window` tokens are seen before each, -1: all."""
ATTENTION = "packed"
"""What transformers knows `attend` by."""
_UNSAID = ("softcap", "s_aux", "position_bias")
"""What models ask of their attention that varlen_attn has no argument for."""
_STARTS, _WINDOW = (0, 70, 71, 200), 8
"""Of the rows that the kernel is tried on, one of them of a single token; and the shorter window."""
_KERNEL_TOLERANCE = 0.03
"""Share of the largest value: bfloat16 keeps eight bits."""


def pack(batch: Batch, device: torch.device) -> Layout:
    """Lay a micro-batch out end to end: ids [1, N] of its N tokens, positions from 0 in every row."""
    lengths = batch.prompt_lengths + batch.response_lengths
    ends = np.cumsum(lengths, dtype=np.int64)
    positions = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
    in_prompt = (positions < np.repeat(batch.prompt_lengths, lengths))[None]
    bounds = torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32)).to(device)
    longest = int(lengths.max())
    further = {
        "position_ids": torch.from_numpy(positions)[None].to(device),
        **dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), bounds),
        **dict.fromkeys(("max_length_q", "max_length_k"), longest),
    }
    return lay_out(batch, in_prompt, ~in_prompt, further, device)


def enable_packing(model: Any) -> None:
    """Have a transformers model take layouts of `pack`, and no others any more.

    Raises ValueError for a model that does not leave its attention to transformers' AttentionInterface.
    """
    from transformers import AttentionInterface

    # With no mask function of that name transformers makes no mask; one that returned None would be asked
    # only after a look at all positions, for which the host waits.
    AttentionInterface.register(ATTENTION, attend)
    model.set_attn_implementation(ATTENTION)
    if model.config._attn_implementation != ATTENTION:
        raise ValueError(f"{type(model).__name__} computes its attention itself")


def attend(
    module: nn.Module,
    query: Float[Tensor, "1 heads N D"],
    key: Float[Tensor, "1 shared N D"],
    value: Float[Tensor, "1 shared N D"],
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Int[Tensor, " bounds"] | None = None,
    max_length_q: int = 0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **asked: Any,
) -> tuple[Float[Tensor, "1 N heads D"], None]:
    """Causal attention within each row, as transformers' AttentionInterface calls it; without bounds, of one.

    Raises ValueError when the model asks for more than the kernel has.
    """
    if cu_seq_lens_q is None:
        max_length_q = query.shape[2]
        cu_seq_lens_q = torch.tensor([0, max_length_q], dtype=torch.int32, device=query.device)
    found = [name for name in _UNSAID if asked.get(name) is not None]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    found += ["rows side by side"] if len(query) > 1 else []
    found += ["values of another width"] if value.shape[-1] != query.shape[-1] else []
    if found or not causal or attention_mask is not None:
        raise ValueError(f"attention with {', '.join(found) or 'a mask of its own'}, which no kernel has")
    window = sliding_window - 1 if sliding_window else -1  # the kernel does not count the token itself
    rows, seen = len(cu_seq_lens_q) - 1, max_length_q - 1
    even = rows * max_length_q == query.shape[2] and not 0 <= window < seen
    attention = _side_by_side if even else _varlen if query.is_cuda else _row_by_row
    qkv = tuple(x[0].transpose(0, 1) for x in (query, key, value))
    return attention(qkv, cu_seq_lens_q, max_length_q, scaling, window)[None], None


def _varlen(qkv: QKV, bounds: Tensor, longest: int, scale: float | None, window: int) -> Tensor:
    """[N, heads, D], by the kernel."""
    from torch.nn.attention import varlen  # Triton comes with it where there is one

    q, k, v = qkv
    new = "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters  # torch 2.11 shares heads unasked
    shared: dict[str, Any] = {"enable_gqa": q.shape[1] != k.shape[1]} if new else {}
    out = varlen.varlen_attn(
        q, k, v, bounds, bounds, longest, longest, scale=scale, window_size=(window, 0), **shared
    )
    assert isinstance(out, Tensor)  # a pair only where the log-sum-exp is asked for
    return out


def _side_by_side(qkv: QKV, bounds: Tensor, longest: int, scale: float | None, window: int) -> Tensor:
    """As `_varlen`, for rows of one length: 32k tokens of 1.5B train in 1.33 s on an H200, there in 1.73."""
    q, k, v = (x.unflatten(0, (-1, longest)).transpose(1, 2) for x in qkv)
    sdpa = nn.functional.scaled_dot_product_attention
    out = sdpa(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    return out.transpose(1, 2).flatten(0, 1)


def _row_by_row(qkv: QKV, bounds: Tensor, longest: int, scale: float | None, window: int) -> Tensor:
    """As `_varlen`, by SDPA of each row."""
    rows = []
    for start, end in pairwise(bounds.tolist()):
        q, k, v = (x[None, start:end].transpose(1, 2) for x in qkv)
        seen = torch.ones(end - start, end - start, dtype=torch.bool, device=bounds.device).tril()
        mask = seen.triu(-window) if 0 <= window < end - start else None
        sdpa = nn.functional.scaled_dot_product_attention
        out = sdpa(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True)
        rows.append(out[0].transpose(0, 1))
    return torch.cat(rows)


def check_kernel(text: Any, dtype: torch.dtype, device: torch.device) -> None:
    """ValueError unless `_varlen` has the values and gradients of SDPA, at the sizes of the config `text`.

    What the kernel itself raises on this device is raised.
    """
    heads = text.num_attention_heads
    shared = getattr(text, "num_key_value_heads", None) or heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    drawn = torch.Generator(device).manual_seed(0)
    noise = lambda n: torch.randn(_STARTS[-1], n, width, generator=drawn, device=device, dtype=dtype)
    q, k, v = (noise(n).requires_grad_() for n in (heads, shared, shared))
    flow = noise(heads)
    bounds = torch.tensor(_STARTS, dtype=torch.int32, device=device)
    longest = max(b - a for a, b in pairwise(_STARTS))
    for window in (-1, _WINDOW - 1):
        outs = [f((q, k, v), bounds, longest, width**-0.5, window) for f in (_varlen, _row_by_row)]
        kernel, plain = ([out, *torch.autograd.grad(out, (q, k, v), flow)] for out in outs)
        for found, wanted in zip(kernel, plain, strict=True):
            apart = float(((found - wanted).abs().max() / wanted.abs().max()).detach())
            if not apart <= _KERNEL_TOLERANCE:
                raise ValueError(f"torch's varlen_attn is {apart:.1%} from SDPA on this device")


def use_liger(model: Any) -> None:
    """Liger's Triton kernels for norms, rotary positions and gated layers in a model, never for its loss.

    They replace functions of the model's module too, and so stay until the process ends. PreflightError
    where liger-kernel is missing or does not know the model.
    """
    if find_spec("liger_kernel") is None:
        raise PreflightError(
            "learner.liger=true needs liger-kernel beside CUDA: pip install 'entroray[liger]', or set "
            "learner.liger=false"
        )
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    from transformers.integrations.liger import apply_liger_kernel

    if model.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise PreflightError(
            f"learner.liger=true: liger-kernel has no kernels for {model.config.model_type}: set "
            "learner.liger=false"
        )
    apply_liger_kernel(model, {"cross_entropy": False, "fused_linear_cross_entropy": False})


def compile_layers(model: Any) -> None:
    """Have torch compile the layers of a transformers model: once for all of a kind and for all lengths."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):  # as transformers marks the layers of a decoder
            layer.compile(dynamic=True)
