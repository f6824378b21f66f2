"""What an engine on CPUs does otherwise than vLLM: normalisation, and threads by the size of a step."""

import os
from typing import Any

from torch import Tensor, cuda, empty_like, float32, get_num_threads, ops
from torch import set_num_threads as use_threads  # as it is before vLLM puts one there that does nothing

from entroray.policy.first_calls import settle

PROVIDER = "entroray"
PRIORITY = {"rms_norm": [PROVIDER], "fused_add_rms_norm": [PROVIDER]}
"""vLLM's option `ir_op_priority`: ours first, then its own."""
VECTOR = 8
"""Floats that vLLM's kernel takes at once: it refuses a width that is no multiple of them, as 12 or 50."""
SMALL = 6e7
"""Multiply-adds of a step up to which one thread is quicker: 64 samples of the tiny model."""


def register() -> None:
    """Offer them to vLLM's dispatcher, which takes them where an engine's options say so."""
    from vllm import ir
    from vllm.platforms import current_platform

    settle()
    offer = {"supported": current_platform.is_cpu()}
    ir.ops.rms_norm.register_impl(PROVIDER, supports_args=_fits, **offer)(_rms_norm)
    add = ir.ops.fused_add_rms_norm
    add.register_impl(PROVIDER, supports_args=_fits_sum, inplace=True, **offer)(_fused_add_rms_norm)


def _fits(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> bool:
    if variance_size is not None or weight is None or x.shape[-1] % VECTOR:
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


def forget_ray_threads() -> None:
    """Leave threads to vLLM on a GPU if `generator.threads` is null: Ray names a number, of OpenMP alone."""
    if cuda.is_available() and "MKL_NUM_THREADS" not in os.environ:
        os.environ.pop("OMP_NUM_THREADS", None)


class StepThreads:
    """Numbers of threads by the samples under way; steps of an engine on a GPU are left alone."""

    def __init__(self, llm: Any):
        from vllm.platforms import current_platform

        config = llm.model_config
        layers = config.get_num_layers(llm.llm_engine.vllm_config.parallel_config)
        width = config.get_hidden_size()
        self.work = 12 * layers * width**2 + width * config.get_vocab_size()
        """About the multiply-adds of one token."""
        self.llm, self.cpu = llm, current_platform.is_cpu()
        self.most = self.now = get_num_threads()

    def fit(self, samples: int) -> None:
        """Take as many threads as a step with `samples` samples is worth; in the thread that steps."""
        self.take(self.most if samples * self.work > SMALL else 1)

    def take(self, wanted: int) -> None:
        """Go on with `wanted` threads."""
        if wanted != self.now and self.cpu:
            self.now = wanted
            self.llm.collective_rpc(_take_threads, args=(wanted,))


def _take_threads(worker: Any, number: int) -> None:
    use_threads(number)
