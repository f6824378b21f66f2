"""What torch asks of cuBLAS on a card, answered on a CPU, which has no product of bf16 with FP32 sums."""

from typing import Any

import pytest
import torch
from torch import Tensor


def products_with_fp32_sums(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Stand-ins of `torch.mm` and `torch.addmm` where `out_dtype` is given; what they were asked for.

    Each call is its name and three types: of both factors and of the sums. As on a card, `out` has that type,
    its shape and columns side by side; `addmm` may add to what it writes to.
    """
    calls: list[tuple[Any, ...]] = []

    def noted(name: str, a: Tensor, b: Tensor, sums: torch.dtype, out: Tensor) -> tuple[Tensor, Tensor]:
        calls.append((name, a.dtype, b.dtype, sums))
        assert a.dtype == b.dtype and sums in (a.dtype, torch.float32)
        assert out.dtype == sums and out.shape == (len(a), b.shape[1]) and out.stride(1) == 1
        return a.to(sums), b.to(sums)

    def mm(*given: Tensor, out_dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
        if out_dtype is None:
            return torch_mm(*given, out=out)
        assert out is not None
        return out.copy_(torch_mm(*noted("mm", *given, out_dtype, out)))

    def addmm(total: Tensor, a: Tensor, b: Tensor, *, out_dtype: torch.dtype, out: Tensor) -> Tensor:
        assert out is total, "no copy of it"
        return out.copy_(torch_addmm(total, *noted("addmm", a, b, out_dtype, out)))

    torch_mm, torch_addmm = torch.mm, torch.addmm
    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch, "addmm", addmm)
    return calls
