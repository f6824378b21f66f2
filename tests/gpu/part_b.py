"""Part b: the head at the sizes of real models, beside float64 and what it was: python -m tests.gpu.part_b

Three ways take the same tokens: `before` is that of commit 3870155, whose weight gradient is an FP32 product;
`torch` has that product in bf16 with FP32 sums; `triton` is the kernels. What a checkout has not is said.
"""

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from entroray.policy import head
from tests.gpu import record
from tests.gpu.measure import largest, peak_gib, seconds, share
from tests.gpu.record import Asked, Check, NotThereError, Step, at_most, holds, measured, not_here

WIDTHS = (1536, 3584, 5120)
"""Of Qwen2.5 with 1.5B, 7B and 32B parameters."""
WAYS = ("before", "torch", "triton")
NATS, NATS_SQUARED, GRADIENT = 2e-4, 2e-3, 1e-2
"""Most that log-prob and entropy at width 1,536, varentropy, and a gradient may be off, the last as a share.

A logit of more products is larger and less exact: an H200 had 1.5, 3.9 and 5.0e-4 nats in all ways alike.
"""


class Size(NamedTuple):
    """Tokens that are timed, tokens that are compared, vocabulary."""

    timed: int = 8192
    compared: int = 512
    vocabulary: int = 151_936


class Inputs(NamedTuple):
    """Of a head."""

    hidden: Tensor
    weight: Tensor
    ids: Tensor
    temperature: Tensor


def size(asked: Asked) -> Size:
    """Tiny ones on the CPU."""
    return Size(24, 10, 200) if asked.dry else Size()


def inputs(asked: Asked, width: int, rows: int) -> Inputs:
    """Logits of standard deviation 2, of every other token 8; temperatures of 0.5 to 1.5."""
    drawn = torch.Generator(asked.device).manual_seed(record.SEED)
    noise = lambda *shape: torch.randn(*shape, generator=drawn, device=asked.device)
    dtype = torch.float32 if asked.dry else torch.bfloat16  # on the CPU no product of bf16 has FP32 sums
    hidden, vocabulary = noise(rows, width), size(asked).vocabulary
    hidden[::2] *= 4
    weight = (noise(vocabulary, width) * 2 * width**-0.5).to(dtype)
    ids = torch.randint(0, vocabulary, (rows,), generator=drawn, device=asked.device)
    temperature = torch.rand(rows, generator=drawn, device=asked.device) + 0.5
    return Inputs(hidden.to(dtype).requires_grad_(), weight.requires_grad_(), ids, temperature)


def sent(asked: Asked, rows: int) -> Tensor:
    """[2, rows] what a loss sends back to log-probs and entropies."""
    drawn = torch.Generator(asked.device).manual_seed(record.SEED + 1)
    return torch.randn(2, rows, generator=drawn, device=asked.device)


def way(name: str, asked: Asked) -> Callable[..., dict[str, Tensor]]:
    """`token_stats` that way; NotThereError where this checkout or this machine has not got it."""
    has_kernels = "kernels" in inspect.signature(head.token_stats).parameters
    if name == "before":
        return partial(head.token_stats, **({"kernels": False} if has_kernels else {}))
    if not has_kernels:
        raise NotThereError("entroray.policy.head.token_stats takes no `kernels`: one way is there, `before`")
    if name == "triton" and asked.dry and os.environ.get("TRITON_INTERPRET") != "1":
        raise NotThereError("kernels on the CPU: TRITON_INTERPRET=1 is not set")
    return partial(head.token_stats, kernels=name == "triton")


def as_before(name: str) -> AbstractContextManager[object]:
    """Within it the weight's gradient is the FP32 product that it was."""
    return patch.object(head, "_add_product", _fp32_product) if name == "before" else nullcontext()


def _fp32_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    if a.stride(0) == 1 and a.stride(-1) != 1:  # what is sent back, transposed
        total.addmm_(a.float(), b.float())
    else:
        total += a @ b


@cache
def exact(asked: Asked, width: int) -> dict[str, Tensor]:
    """Statistics and gradients in float64, from the same inputs."""
    given = inputs(asked, width, size(asked).compared)
    hidden, weight = (x.detach().double().requires_grad_() for x in given[:2])
    return in_float64(hidden, weight, given.ids, given.temperature, sent(asked, len(given.ids)))


def in_float64(
    hidden: Tensor, weight: Tensor, ids: Tensor, temperature: Tensor, back: Tensor, bias: Tensor | None = None
) -> dict[str, Tensor]:
    """By the book: every logit at once."""
    logits = torch.nn.functional.linear(hidden, weight, bias) / temperature.double()[:, None]
    logp = logits.log_softmax(-1)
    p = logp.exp()
    safe = logp.masked_fill(p == 0, 0.0)
    entropy = -(p * safe).sum(-1)
    with torch.no_grad():
        varentropy = (p * (safe + entropy[:, None]).square()).sum(-1)
    stats = {"logprobs": logp.gather(-1, ids[:, None])[:, 0], "entropy": entropy, "varentropy": varentropy}
    loss = (back[0] * stats["logprobs"] + back[1] * stats["entropy"]).sum()
    gradients = torch.autograd.grad(loss, (hidden, weight))
    return {k: v.detach() for k, v in stats.items()} | dict(zip(("dh", "dW"), gradients, strict=True))


def as_trained(run: Callable[..., dict[str, Tensor]], given: Inputs, back: Tensor) -> dict[str, Tensor]:
    """Statistics, and the gradients that training takes of them."""
    stats = run(*given)
    loss = (back[0] * stats["logprobs"] + back[1] * stats["entropy"]).sum()
    gradients = torch.autograd.grad(loss, given[:2])
    return stats | dict(zip(("dh", "dW"), gradients, strict=True))


def errors(
    found: dict[str, Tensor], wanted: dict[str, Tensor], label: str, width: int = 1536
) -> Iterator[Check]:
    """From float64: in nats, nats squared, and shares of a gradient's length."""
    nats = {name: largest(found[name], wanted[name]) for name in ("logprobs", "entropy")}
    yield at_most(f"{label}: nats from float64", NATS * max(1.0, width / 1536), **nats)
    apart = largest(found["varentropy"], wanted["varentropy"])
    yield at_most(f"{label}: varentropy from float64", NATS_SQUARED, nats2=apart)
    yield at_most(
        f"{label}: gradients from float64",
        GRADIENT,
        **{name: share(found[name], wanted[name]) for name in ("dh", "dW") if name in found},
    )


def at_width(name: str, width: int, asked: Asked) -> Iterator[Check]:
    """One way at one width: values, gradients, seconds, the most memory it takes."""
    run, label = way(name, asked), f"{name}, width {width:,}"
    width = 16 if asked.dry else width
    compared = inputs(asked, width, size(asked).compared)
    with as_before(name):
        found = as_trained(run, compared, sent(asked, len(compared.ids)))
        yield from errors(found, exact(asked, width), label, width)
        del found
        given = inputs(asked, width, size(asked).timed)
        back = sent(asked, len(given.ids))
        train = lambda: as_trained(run, given, back)

        @torch.no_grad()
        def score() -> object:
            return run(*given)

        took = {"score_ms": seconds(asked, score, rounds=3), "train_ms": seconds(asked, train, rounds=3)}
        memory = {"score_gib": peak_gib(asked, score), "train_gib": peak_gib(asked, train)}
        yield measured(
            f"{label}, {len(given.ids):,} tokens",
            **{k: 1e3 * v for k, v in took.items()},
            **{k: v for k, v in memory.items() if v is not None},
        )


def impossible(name: str, asked: Asked) -> Iterator[Check]:
    """Logits of -inf: some of a tile, and more than a whole tile; they are outcomes of probability 0."""
    run, width = way(name, asked), 16 if asked.dry else WIDTHS[0]
    given = inputs(asked, width, size(asked).compared)
    vocabulary = len(given.weight)
    gone = torch.zeros(vocabulary, dtype=torch.bool, device=asked.device)
    gone[3:7], gone[vocabulary // 4 : vocabulary * 3 // 4] = True, True
    ids = (~gone).nonzero()[:, 0][given.ids % int((~gone).sum())]
    bias = torch.zeros(vocabulary, device=asked.device).masked_fill(gone, -torch.inf)
    back = sent(asked, len(ids))
    hidden, weight = (x.detach().double().requires_grad_() for x in given[:2])
    wanted = in_float64(hidden, weight, ids, given.temperature, back, bias.double())
    with as_before(name):
        found = as_trained(partial(run, bias=bias.to(given.weight.dtype)), given._replace(ids=ids), back)
    wanted["dW"] = wanted["dW"].nan_to_num()
    yield from errors(found, wanted, f"{name}, logits of -inf")
    yield at_most(f"{name}, what reaches them", 0.0, largest=float(found["dW"][gone].abs().max()))


def edges(name: str, asked: Asked) -> Iterator[Check]:
    """No token at all; and rows that nothing is sent back to, which the backward pass leaves out."""
    run, width = way(name, asked), 16 if asked.dry else WIDTHS[0]
    with as_before(name):
        none = inputs(asked, width, 0)
        stats = as_trained(run, none, sent(asked, 0))
        empty = all(stats[key].shape == (0,) for key in ("logprobs", "entropy", "varentropy"))
        yield holds(f"{name}, no token", empty and not stats["dW"].any(), "no statistics, a gradient of 0")
        given = inputs(asked, width, size(asked).timed)
        back = sent(asked, len(given.ids))
        half = back.clone()
        half[:, torch.arange(len(given.ids)) % 2 == 1] = 0.0
        took = [seconds(asked, lambda s=s: as_trained(run, given, s), rounds=3) for s in (back, half)]
    yield measured(f"{name}, half of the rows silent", all_ms=took[0] * 1e3, half_ms=took[1] * 1e3)


def repeated(name: str, asked: Asked) -> Iterator[Check]:
    """The same bits twice, and in a pass without gradients: the first ratio of a step is then 1."""
    run, width = way(name, asked), 16 if asked.dry else WIDTHS[0]
    given = inputs(asked, width, size(asked).compared)
    with torch.no_grad():
        scored = run(*given)
    again = run(*given)
    same = all(torch.equal(scored[key], again[key]) for key in scored)
    yield holds(f"{name}, scored and trained on", same, "the same bits")


def ratio(asked: Asked) -> Iterator[Check]:
    """What a softmax over 128 rows at a time takes, as TRL and verl compute it, at the smallest width."""
    if not asked.card:
        yield not_here("rows of 128", "a time of a card")
        return
    given = inputs(asked, WIDTHS[0], size(asked).timed)
    back = sent(asked, len(given.ids))
    run = partial(as_trained, row_chunks, given, back)
    yield measured(
        "rows of 128", train_ms=1e3 * seconds(asked, run, rounds=3), train_gib=peak_gib(asked, run)
    )


def row_chunks(hidden: Tensor, weight: Tensor, ids: Tensor, temperature: Tensor) -> dict[str, Tensor]:
    """Log-probs and entropies of 128 rows at a time, in FP32 from bf16 logits, with autograd's gradients."""
    found = []
    for rows in torch.arange(len(hidden), device=hidden.device).split(128):
        logp = ((hidden[rows] @ weight.T).float() / temperature[rows, None]).log_softmax(-1)
        entropy = -(logp.exp() * logp).sum(-1)
        found.append(torch.stack([logp.gather(-1, ids[rows, None])[:, 0], entropy]))
    return dict(zip(("logprobs", "entropy"), torch.cat(found, -1), strict=True))


STEPS: dict[str, Step] = {
    **{f"{name}, {w}": partial(at_width, name, w) for w in WIDTHS for name in WAYS},
    **{f"{f.__name__}, {name}": partial(f, name) for f in (impossible, edges, repeated) for name in WAYS},
    "rows of 128": ratio,
}

if __name__ == "__main__":
    record.main("b", "the head: values, gradients, seconds and memory", STEPS)
