"""Part a: the card itself, and what torch does on it that entroray relies on: python -m tests.gpu.part_a"""

import inspect
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from tests.gpu import record
from tests.gpu.measure import largest, peak_gib, row_by_row, seconds, share
from tests.gpu.record import Asked, Check, at_most, holds, measured, not_here, there

OLDEST_DRIVER = 580
"""What CUDA 13 asks for."""
LENGTHS = (1, 17, 128, 511, 1024, 300)
"""Of rows laid end to end: one of a single token, none of which fills its blocks."""
HEADS, SHARED, WIDTH = 12, 2, 128
"""Of Qwen2.5-1.5B."""


def versions(asked: Asked) -> Iterator[Check]:
    """The driver is new enough for CUDA 13, and the card computes in bf16."""
    if not asked.card:
        yield not_here("driver", f"CUDA {torch.version.cuda or 13} asks for {OLDEST_DRIVER} or later")
        return
    driver = str(record.identity(asked)["driver"])
    number = int(driver.partition(".")[0]) if driver[:1].isdigit() else 0
    yield holds("driver", number >= OLDEST_DRIVER, f"{OLDEST_DRIVER} or later, for CUDA 13", driver=driver)
    yield holds("bf16", torch.cuda.is_bf16_supported(), "computed by the card itself")


def rates(asked: Asked) -> Iterator[Check]:
    """How fast the card copies, and multiplies in bf16 and in FP32, which the deadlines and times assume."""
    elements = 1 << (12 if asked.dry else 30)
    source = torch.zeros(elements, dtype=torch.uint8, device=asked.device)
    to = torch.empty_like(source)
    took = seconds(asked, lambda: to.copy_(source), rounds=10)
    yield measured("copy on the card", gb_per_s=2 * elements / took / 1e9)
    for dtype, size in ((torch.bfloat16, 8192), (torch.float32, 4096)):
        n = 16 if asked.dry else size
        a, b = (torch.randn(n, n, device=asked.device, dtype=dtype) for _ in range(2))
        took = seconds(asked, lambda a=a, b=b: a @ b, rounds=10, warm=3)
        yield measured(f"product {n}^3 {str(dtype)[6:]}", tflops=2 * n**3 / took / 1e12)


def products(asked: Asked) -> Iterator[Check]:
    """addmm of bf16 factors into the FP32 tensor it adds to, which is how the head sums its gradient."""
    rows, inner, columns = (32, 8, 16) if asked.dry else (16_384, 1024, 1536)
    a = torch.randn(rows, inner, device=asked.device, dtype=torch.bfloat16)
    b = torch.randn(inner, columns, device=asked.device, dtype=torch.bfloat16)
    before = torch.randn(rows, columns, device=asked.device)
    wanted = before.double() + a.double() @ b.double()
    if not asked.card:
        total = before.clone()
        torch.addmm(total, a.float(), b.float(), out=total)
        yield at_most("addmm into what it adds to, FP32", 1e-5, error=largest(total, wanted))
        yield not_here("addmm(out=, out_dtype=)", "torch has it for CUDA alone")
        return
    total = before.clone()
    grown = peak_gib(asked, lambda: torch.addmm(total, a, b, out_dtype=torch.float32, out=total))
    limit = 1e-5 * inner**0.5
    yield at_most("addmm(out=, out_dtype=) into what it adds to", limit, error=largest(total, wanted))
    half = before.clone()
    part = half[: rows // 2]  # a slice of a larger one, as a tile's columns of the weight's gradient are
    torch.addmm(part, a[: rows // 2], b, out_dtype=torch.float32, out=part)
    yield at_most("the same into a slice", limit, error=largest(part, wanted[: rows // 2]))
    yield measured("what that takes besides", gib=grown, result_gib=total.nbytes / 2**30)
    plain = torch.mm(a, b, out_dtype=torch.float32)
    yield at_most("mm(out_dtype=)", limit, error=largest(plain, a.double() @ b.double()))
    took = [
        seconds(asked, lambda: torch.addmm(total, a, b, out_dtype=torch.float32, out=total)),
        seconds(asked, lambda: total.addmm_(a.float(), b.float())),
    ]
    yield measured("bf16 factors beside FP32 ones", bf16_ms=took[0] * 1e3, fp32_ms=took[1] * 1e3)


def attention(asked: Asked) -> Iterator[Check]:
    """varlen_attn, forward and backward, as near to float64 as torch's SDPA of each row is."""
    varlen_attn = there("torch.nn.attention.varlen", "varlen_attn")
    takes = inspect.signature(varlen_attn).parameters
    yield measured("varlen_attn takes enable_gqa", said="yes" if "enable_gqa" in takes else "no")
    lengths = (1, 5, 3) if asked.dry else LENGTHS
    bounds = [0, *itertools.accumulate(lengths)]
    shape = (4, 2, 8) if asked.dry else (HEADS, SHARED, WIDTH)
    inputs = _attention_inputs(asked, bounds[-1], shape)
    exact = _with_gradients([x.double() for x in inputs], bounds)
    plain = _with_gradients(inputs, bounds)
    if not asked.card:
        yield at_most("SDPA a row in bf16", 0.05, **_apart(plain, exact))
        yield not_here("varlen_attn", "its kernels are for CUDA alone")
        return
    extra = {"enable_gqa": True} if "enable_gqa" in takes else {}
    at = torch.tensor(bounds, dtype=torch.int32, device=asked.device)

    def packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        longest = max(lengths)
        return varlen_attn(q, k, v, at, at, longest, longest, window_size=(-1, 0), **extra)

    found = _with_gradients(inputs, bounds, packed)
    rows = _apart(plain, exact)
    limits = {name: 1.5 * value + 1e-3 for name, value in rows.items()}
    errors = _apart(found, exact)
    held = all(errors[name] <= limits[name] for name in errors)
    yield measured("SDPA a row, from float64", **rows)
    yield holds("varlen_attn, from float64", held, "at most 1.5 times as far as SDPA a row", **errors)


def own_check(asked: Asked) -> Iterator[Check]:
    """What a rank tries before it packs rows."""
    check_kernel = there("entroray.policy.packing", "check_kernel")
    if not asked.card:
        yield not_here("check_kernel", "it calls varlen_attn")
        return
    from tests.gpu.shapes import configuration

    check_kernel(configuration("1.5B"), torch.bfloat16, asked.device)
    yield holds("check_kernel passes", True, "varlen_attn is near SDPA at the sizes of Qwen2.5-1.5B")


def _attention_inputs(asked: Asked, tokens: int, shape: tuple[int, int, int]) -> list[Tensor]:
    """Query, key, value, and the gradient that comes back."""
    heads, shared, width = shape
    each = [(tokens, n, width) for n in (heads, shared, shared, heads)]
    return [torch.randn(size, device=asked.device, dtype=torch.bfloat16) for size in each]


def _with_gradients(inputs: list[Tensor], bounds: list[int], attend: object = None) -> list[Tensor]:
    """Output and the gradients of query, key and value."""
    given = [x.detach().requires_grad_() for x in inputs[:3]]
    out = attend(*given) if callable(attend) else row_by_row(*given, bounds)
    return [out, *torch.autograd.grad(out, given, inputs[3].to(out.dtype))]


def _apart(found: list[Tensor], exact: list[Tensor]) -> dict[str, float]:
    names = ("out", "dq", "dk", "dv")
    return {name: share(a, b) for name, a, b in zip(names, found, exact, strict=True)}


STEPS = {f.__name__: f for f in (versions, rates, products, attention, own_check)}

if __name__ == "__main__":
    record.main("a", "the card and torch", STEPS)
