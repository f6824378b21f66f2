"""The head's two Triton kernels: what is done to a tile of logits on a card, reading and writing it once.

cuBLAS makes the tile and takes its gradient (`head.py`). A program has one block of one row: BLOCK logits,
16 FP32 numbers a thread in four loads of 16 bytes, which stay in registers for all its sums. No program waits
for another, and blocks are joined behind the kernel. Triton 3.7.1 assembles 48 registers a thread (moments)
and 34 (slopes) for A100, 48 and 32 for H100, and spills none: five programs or more share a multiprocessor,
so that one loads while another sums. Values are tested in Triton's interpreter (`tests/interpreter`), and
were seen with their speed on an H200 (`tests/gpu/README.md`, part b).
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
"""Logits of one program: 16 KiB in FP32."""
EVEN = 16
"""Rows begin at multiples of it, wherever the last ends: tensor cores and loads take 16 bytes at once."""
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}
"""No fused multiply-add: a row's largest logit less itself is then 0, as in torch and in the interpreter."""


def moments(z: Tensor, factor: Tensor) -> Tensor:
    """Top, total, mean, variance, [4, blocks, n], as `head._Moments`, of each BLOCK of logits z factor.

    `z` is [n, k], each row at the next multiple of EVEN; `factor` is [n, 1].
    """
    out = z.new_empty(len(z), triton.cdiv(z.shape[1], BLOCK), 4)
    _launch(_moments_kernel, z, factor, out, z.shape[1])
    return out.permute(2, 1, 0)


def slopes(z: Tensor, factor: Tensor, out: Tensor, ids: Tensor, *rows: Tensor, capped: bool) -> None:
    """Write to `out` what a loss sends back to the product behind `z`, both [n, k] laid out as in `moments`.

    `ids` [n] are places of tokens, some outside of these k columns. `rows` are log-sum-exp, entropy and what
    is sent to log-prob and entropy, [n, 1], the latter two times d (z factor) / d product; where `capped`,
    `z` is the tanh of the product, whose slope is added here.
    """
    _launch(_slopes_kernel, z, factor, out, ids, *rows, CAPPED=capped)


def _launch(kernel: Any, z: Tensor, *args: Tensor | int, **constants: Any) -> None:
    """One program for each row and block; rows come first, as only that axis may be longer than 65,535."""
    grid = len(z), triton.cdiv(z.shape[1], BLOCK)
    assert z.stride(0) == triton.cdiv(z.shape[1], EVEN) * EVEN
    if len(z):
        kernel[grid](z, *args, z.stride(0), BLOCK=BLOCK, **constants, **OPTIONS)


@triton.jit
def _moments_kernel(z, factor, out, columns, pitch, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(z + row * pitch + at, mask=at < pitch, other=0.0) * tl.load(factor + row)
    x = tl.where(at < columns, x, float("-inf"))
    top = tl.maximum(tl.max(x, 0), -3.0e38)  # a block may hold no possible token
    gap = x - top
    p = tl.exp(gap)
    gap = tl.where(p == 0.0, 0.0, gap)  # 0 * -inf were not a number; what is not one stays so
    total = tl.sum(p, 0)
    share = 1.0 / tl.maximum(total, 1e-30)
    mean = tl.sum(p * gap, 0) * share
    gap -= mean
    out += (row * tl.num_programs(1) + block) * 4
    tl.store(out, top)
    tl.store(out + 1, total)
    tl.store(out + 2, mean)
    tl.store(out + 3, tl.sum(p * gap * gap, 0) * share)


@triton.jit
def _slopes_kernel(  # type: ignore[no-untyped-def]
    z, factor, out, ids, logsumexp, entropy, to_logprob, to_entropy, pitch,
    BLOCK: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """d log p_a / dx = onehot - p;  dH / dx = -p (log p + H), of x = z factor."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = at < pitch  # no one reads what is written behind the last column
    raw = tl.load(z + row * pitch + at, mask=here, other=0.0)
    logp = raw * tl.load(factor + row) - tl.load(logsumexp + row)
    p = tl.exp(logp)
    logp = tl.where(p == 0.0, 0.0, logp)
    sent = tl.load(to_logprob + row)
    slope = -p * (sent + tl.load(to_entropy + row) * (logp + tl.load(entropy + row)))
    slope += tl.where(at == tl.load(ids + row), sent, 0.0)
    if CAPPED:
        slope *= 1.0 - raw * raw
    tl.store(out + row * pitch + at, slope.to(out.dtype.element_ty), mask=here)
