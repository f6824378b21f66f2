"""Normalisation by vLLM's own kernels for CPUs, which vLLM without a compiler leaves for six torch calls."""

from torch import Tensor, empty_like, float32, ops

PROVIDER = "entroray"
PRIORITY = {"rms_norm": [PROVIDER], "fused_add_rms_norm": [PROVIDER]}
"""vLLM's option `ir_op_priority`: ours first, then its own."""


def register() -> None:
    """Offer them to vLLM's dispatcher, which takes them where an engine's options say so."""
    from vllm import ir
    from vllm.platforms import current_platform

    offer = {"supported": current_platform.is_cpu()}
    ir.ops.rms_norm.register_impl(PROVIDER, supports_args=_fits, **offer)(_rms_norm)
    add = ir.ops.fused_add_rms_norm
    add.register_impl(PROVIDER, supports_args=_fits_sum, inplace=True, **offer)(_fused_add_rms_norm)


def _fits(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> bool:
    if variance_size is not None or weight is None:
        return False
    return x.dtype == weight.dtype == float32  # in bf16 they round once, where learners round twice


def _fits_sum(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> bool:
    both = x.is_contiguous() and x_residual.is_contiguous() and x.dtype == x_residual.dtype
    return both and _fits(x, weight, epsilon, variance_size)


def _rms_norm(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> Tensor:
    out = empty_like(x := x.contiguous())
    ops._C.rms_norm(out, x, weight, epsilon)
    return out


def _fused_add_rms_norm(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> tuple[Tensor, Tensor]:
    ops._C.fused_add_rms_norm(x, x_residual, weight, epsilon)
    return x, x_residual
