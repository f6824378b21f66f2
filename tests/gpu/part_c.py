"""Part c: forward and backward of Qwen2.5-1.5B's shape, padded and packed: python -m tests.gpu.part_c

Its weights are random. Padded rows stand side by side without a mask; packed ones end to end, kept apart by
varlen_attn; `masked` is the mask of padding of commit 3870155's parents, which costs torch its causal kernel.
"""

import copy
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from entroray.policy import families
from entroray.policy.model import Policy, pad
from entroray.types import Batch
from tests.gpu import record, shapes
from tests.gpu.measure import largest, peak_gib, seconds, share
from tests.gpu.record import Asked, Check, Step, at_most, measured, not_here, there

LOADS = {
    "8 x 1k": (1024,) * 8,
    "4 x 2k mixed": (2048, 1500, 900, 200),
    "1 x 8k": (8192,),
    "1 x 32k": (32_768,),
}
"""Lengths of rows."""
MEAN_NATS = {torch.bfloat16: 0.03, torch.float32: 1e-5}
"""Most that log-probs of two layouts may be apart on average: on an H200 each was 0.0205 from float32."""
GRADIENT = {torch.bfloat16: 0.1, torch.float32: 1e-4}
"""Most that a gradient of two layouts may be apart, as a share of its length."""
WATCHED = "layers.0.self_attn.k_proj.weight"
"""Of this parameter: through every layer's attention."""


def dtype(asked: Asked) -> torch.dtype:
    """On the CPU one in which layouts agree to rounding."""
    return torch.float32 if asked.dry else torch.bfloat16


@cache
def policy(asked: Asked) -> Policy:
    """The one model of this part."""
    model = shapes.random_model("tiny" if asked.dry else "1.5B", asked.device, dtype(asked))
    return Policy(model).train()


def batch(asked: Asked, load: str) -> Batch:
    """The rows of a load."""
    lengths = [max(3, n // 256) for n in LOADS[load]] if asked.dry else LOADS[load]
    return shapes.rows(lengths, policy(asked).model.config.vocab_size)


def padded(asked: Asked, load: str) -> Any:
    """The layout of rows side by side, with the attention that goes with it."""
    policy(asked).model.set_attn_implementation("sdpa")
    return pad(batch(asked, load), asked.device)


def packed(asked: Asked, load: str) -> Any:
    """That of rows end to end; NotThereError without it."""
    pack, enable = there("entroray.policy.packing", "pack", "enable_packing")
    enable(policy(asked).model)
    return pack(batch(asked, load), asked.device)


LAYOUTS = {"padded": padded, "packed": packed}


def set_checkpointing(asked: Asked, on: bool) -> None:
    """Whether activations are computed a second time in place of being kept."""
    model = policy(asked).model
    if on:
        model.gradient_checkpointing_enable()
    else:
        model.gradient_checkpointing_disable()
    policy(asked).train()


def train(asked: Asked, micro: Any) -> Tensor:
    """One forward and backward pass; the log-probs."""
    own = policy(asked)
    own.zero_grad(set_to_none=True)
    stats = own(micro)
    stats["logprobs"].mean().backward()
    return stats["logprobs"].detach()


def cost(asked: Asked, label: str, tokens: int, run: Callable[[], object]) -> Iterator[Check]:
    """Tokens a second and the most memory of a pass both ways, or that the card ran out."""
    with shapes.may_run_out() as ran_out:
        memory = peak_gib(asked, run)
        took = seconds(asked, run, rounds=2, warm=0)
        found = {} if memory is None else {"peak_gib": memory}
        yield measured(label, tokens_per_s=tokens / took, ms=1e3 * took, **found)
    for said in ran_out:
        yield measured(label, said=said)


def speed(load: str, checkpointing: bool, asked: Asked) -> Iterator[Check]:
    """One load in either layout."""
    set_checkpointing(asked, checkpointing)
    tokens = int((lambda b: b.prompt_lengths.sum() + b.response_lengths.sum())(batch(asked, load)))
    for name, layout in LAYOUTS.items():
        micro = layout(asked, load)
        how = "checkpointed" if checkpointing else "kept"
        yield from cost(asked, f"{load}, {how}, {name}", tokens, partial(train, asked, micro))
    policy(asked).zero_grad(set_to_none=True)


def agreement(load: str, asked: Asked) -> Iterator[Check]:
    """Log-probs of the same tokens in both layouts, and a gradient that came through all layers."""
    set_checkpointing(asked, on=load == "1 x 32k")
    found: dict[str, tuple[Tensor, Tensor]] = {}
    watched = next(p for n, p in policy(asked).model.named_parameters() if n.endswith(WATCHED))
    for name, layout in LAYOUTS.items():
        logprobs = train(asked, layout(asked, load))
        assert watched.grad is not None
        found[name] = logprobs, watched.grad.clone()
    policy(asked).zero_grad(set_to_none=True)
    (a, da), (b, db) = found["padded"], found["packed"]
    limit = MEAN_NATS[dtype(asked)]
    yield at_most(f"{load}: mean |log-prob padded - packed|", limit, nats=float((a - b).abs().mean()))
    yield measured(f"{load}: largest", nats=largest(a, b))
    yield at_most(f"{load}: gradient of {WATCHED}", GRADIENT[dtype(asked)], apart=share(db, da))


def against_float32(asked: Asked) -> Iterator[Check]:
    """Packed log-probs are as near to those of the same weights in float32 as padded ones are."""
    load = "4 x 2k mixed"
    with torch.no_grad():
        found = {name: policy(asked)(layout(asked, load))["logprobs"] for name, layout in LAYOUTS.items()}
        wide = copy.deepcopy(policy(asked)).float()  # to and back would round the frequencies of positions
        wide.model.set_attn_implementation("sdpa")
        exact = wide(padded(asked, load))["logprobs"]
        del wide
    off = {name: float((x - exact).abs().mean()) for name, x in found.items()}
    yield measured("padded, mean from float32", nats=off["padded"])
    yield at_most("packed, mean from float32", 1.2 * off["padded"] + 1e-5, nats=off["packed"])


def masked(asked: Asked) -> Iterator[Check]:
    """What a mask of padding cost (S1-2)."""
    load = "4 x 2k mixed"
    set_checkpointing(asked, on=False)
    micro, rows = padded(asked, load), batch(asked, load)
    own = policy(asked)
    width = torch.arange(micro.ids.shape[1], device=asked.device)
    lengths = torch.from_numpy(rows.prompt_lengths + rows.response_lengths).to(asked.device)
    mask = (width < lengths[:, None]).long()

    def both_ways() -> None:
        own.zero_grad(set_to_none=True)
        states = families.body(own.model)(input_ids=micro.ids, attention_mask=mask, use_cache=False)
        hidden = states.last_hidden_state.flatten(0, 1)[micro.source]
        head = own.model.get_output_embeddings()
        head(hidden, micro.targets, micro.temperature)["logprobs"].mean().backward()

    yield from cost(asked, f"{load}, kept, masked", int(lengths.sum()), both_ways)
    own.zero_grad(set_to_none=True)


def liger(asked: Asked) -> Iterator[Check]:
    """Liger's kernels for norms, positions and gated layers; last, as they stay until the process ends."""
    use = there("entroray.policy.packing", "use_liger")
    there("liger_kernel")
    if not asked.card:
        yield not_here("liger", "its kernels are Triton's")
        return
    load = "1 x 8k"
    set_checkpointing(asked, on=False)
    with torch.no_grad():
        plain = policy(asked)(packed(asked, load))["logprobs"]
    use(policy(asked).model)
    with torch.no_grad():
        found = policy(asked)(packed(asked, load))["logprobs"]
    off = float((found - plain).abs().mean())
    yield at_most(f"{load}: mean |log-prob with liger - without|", MEAN_NATS[dtype(asked)], nats=off)
    yield from cost(
        asked, f"{load}, kept, packed, liger", LOADS[load][0], partial(train, asked, packed(asked, load))
    )


STEPS: dict[str, Step] = {
    **{f"agreement, {load}": partial(agreement, load) for load in LOADS},
    "from float32": against_float32,
    **{f"{load}, kept": partial(speed, load, False) for load in LOADS},
    **{f"{load}, checkpointed": partial(speed, load, True) for load in LOADS},
    "masked": masked,
    "liger": liger,
}

if __name__ == "__main__":
    record.main("c", "forward and backward of Qwen2.5-1.5B's shape", STEPS)
