"""Seconds and bytes of something that runs on a card, and errors against float64."""

import statistics
import time
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from tests.gpu.record import Asked


def seconds(asked: Asked, run: Callable[[], object], *, rounds: int = 5, warm: int = 2) -> float:
    """Median of `rounds` runs behind `warm` that are not counted; on a card by its own events."""
    rounds, warm = (1, 0) if asked.dry else (rounds, warm)
    for _ in range(warm):
        run()
    return statistics.median(_once(asked, run) for _ in range(rounds))


def _once(asked: Asked, run: Callable[[], object]) -> float:
    if not asked.card:
        began = time.perf_counter()
        run()
        return time.perf_counter() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def peak_gib(asked: Asked, run: Callable[[], object]) -> float | None:
    """By how much more than before the card was allocated while it ran; None without one."""
    if not asked.card:
        run()
        return None
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def largest(found: Tensor, wanted: Tensor) -> float:
    """Largest difference; NaN if there is one."""
    return float((found.detach().double() - wanted.detach().double()).abs().max()) if found.numel() else 0.0


def share(found: Tensor, wanted: Tensor) -> float:
    """Length of the difference over that of what is wanted."""
    return float(
        (found.detach().double() - wanted.detach().double()).norm() / wanted.detach().double().norm()
    )


def row_by_row(query: Tensor, key: Tensor, value: Tensor, bounds: list[int]) -> Tensor:
    """Causal attention of rows end to end, [N, heads, D], each on its own by torch's SDPA."""
    rows = []
    for start, end in pairwise(bounds):
        q, k, v = (x[start:end].transpose(0, 1)[None] for x in (query, key, value))
        sdpa = torch.nn.functional.scaled_dot_product_attention
        rows.append(sdpa(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(rows)
