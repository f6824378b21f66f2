"""Time, memory and error of the head beside chunks of rows: python -m tests.bench.head_cost

Chunks of 128 rows in plain torch are how TRL and verl compute log-probs and entropies. Both take turns in one
process, and every round has its own ratio, so that a machine that drifts does not show as one of them.
"""

import argparse
import re
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from entroray.data.large import release_memory
from entroray.policy.head import token_stats

SHAPES = ((2048, 256, 32_000), (2048, 128, 32), (2048, 128, 1_000), (2048, 512, 16_384), (512, 256, 152_000))
"""Rows, width, vocabulary."""
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
Head = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def inputs(rows: int, width: int, vocabulary: int, dtype: torch.dtype = torch.float32) -> Inputs:
    """States, weight, tokens and temperatures; logits have a standard deviation of about 2."""
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=random).to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, width, generator=random) * 2 * width**-0.5).to(dtype).requires_grad_()
    ids = torch.randint(0, vocabulary, (rows,), generator=random)
    return hidden, weight, ids, torch.rand(rows, generator=random) + 0.5


def tiles(hidden: Tensor, weight: Tensor, ids: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """Ours, which computes the varentropy too."""
    stats = token_stats(hidden, weight, ids, temperature)
    return stats["logprobs"], stats["entropy"]


def row_chunks(hidden: Tensor, weight: Tensor, ids: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """Log-prob, entropy and varentropy of 128 rows at a time, gradients of the first two by autograd."""
    logprobs, entropy = [], []
    for rows in torch.arange(len(hidden)).split(128):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        logp = (hidden[part] @ weight.T / temperature[part, None]).log_softmax(-1)
        logprobs.append(logp.gather(-1, ids[part, None])[:, 0])
        p = logp.exp()
        entropy.append(-(p * logp).sum(-1))
        with torch.no_grad():
            (p * (logp + entropy[-1][:, None]).square()).sum(-1)
    return torch.cat(logprobs), torch.cat(entropy)


def forward(head: Head, given: Inputs) -> None:
    """A pass that scores."""
    with torch.no_grad():
        head(*given)


def both_ways(head: Head, given: Inputs) -> list[Tensor]:
    """A pass that trains: gradients of the states and of the weight."""
    logprobs, entropy = head(*given)
    return list(torch.autograd.grad(logprobs.mean() - 0.01 * entropy.mean(), given[:2]))


def ratio(way: Callable[[Head, Inputs], object], given: Inputs, rounds: int) -> tuple[float, float, float]:
    """Median over rounds of our time over that of row chunks, and both medians in seconds."""
    found: dict[Head, list[float]] = {tiles: [], row_chunks: []}
    for turn in range(rounds + 1):
        for head in (tiles, row_chunks) if turn % 2 else (row_chunks, tiles):
            began = time.perf_counter()
            way(head, given)
            found[head].append(time.perf_counter() - began)
    ours, theirs = (found[head][1:] for head in (tiles, row_chunks))  # the first round warms up
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return statistics.median(ratios), statistics.median(ours), statistics.median(theirs)


def resident(name: str) -> int:
    """VmRSS or VmHWM of this process, in KiB."""
    found = re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found
    return int(found[1])


def megabytes(run: Callable[[], object]) -> float:
    """By how much more than before this process was resident while it ran."""
    release_memory()  # what the allocator kept of earlier runs would hide what this one takes
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the high-water mark
    before = resident("VmRSS")
    run()
    return (resident("VmHWM") - before) * 1024 / 1e6


def error(given: Inputs) -> float:
    """Largest difference, in nats, of log-prob, entropy and varentropy (nats^2) from float64."""
    hidden, weight, ids, temperature = (x.detach() for x in given)
    ours = token_stats(hidden, weight, ids, temperature)
    worst = 0.0
    for part in range(0, len(ids), 128):
        rows = slice(part, part + 128)
        logp = (hidden[rows].double() @ weight.double().T / temperature[rows, None].double()).log_softmax(-1)
        entropy = -(logp.exp() * logp).sum(-1)
        exact = {
            "logprobs": logp.gather(-1, ids[rows, None])[:, 0],
            "entropy": entropy,
            "varentropy": (logp.exp() * (logp + entropy[:, None]).square()).sum(-1),
        }
        worst = max(worst, *(float((ours[k][rows] - v).abs().max()) for k, v in exact.items()))
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    print(
        "rows, width, vocabulary: forward and both ways, of chunks; MB of both ways, ours and theirs; error"
    )
    for shape in SHAPES:
        print(shape, *row(inputs(*shape), asked.rounds), sep="   ", flush=True)


def row(given: Inputs, rounds: int) -> list[str]:
    """What is printed of one shape."""
    memory = [megabytes(partial(both_ways, head, given)) for head in (tiles, row_chunks)]
    times = [ratio(way, given, rounds) for way in (forward, both_ways)]
    columns = [f"{of:.2f} ({ours:.4f} s / {theirs:.4f} s)" for of, ours, theirs in times]
    return [*columns, *(f"{mb:.0f}" for mb in memory), f"{error(given):.1e}"]


if __name__ == "__main__":
    main()
