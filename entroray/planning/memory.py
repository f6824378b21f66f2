"""Bytes on each card by what they hold, and the smallest change of settings that makes a run fit."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from math import ceil
from typing import Any

GIB = 2**30
NAMED = 0.985 * GIB
"""Bytes of a card by each GB of its name: an H100 of 80 has 79.1 GiB, an H200 of 141 has 139.8."""
RESERVE = 0.06
"""Of every card: contexts of CUDA, NCCL and cuBLAS, and what the allocator cannot use."""
TILE = 1 << 29
"""Bytes of a tile of FP32 logits on a card."""
TILES = 5
"""Tiles alive at once in the head's passes."""
BUCKET = 500_000_000
"""Elements of DeepSpeed's reduce_bucket_size by default, and half of stage3_max_live_parameters."""
LORA_BUCKET = 50_000_000
"""The same with LoRA, whose gradients are few."""
PACKED = 256 << 20
"""Bytes at which a packed buffer of NCCL is sent; vLLM's own 1 GiB is outside every budget of its engine."""
IPC = 1 << 30
"""Bytes of the buffer that CUDA IPC shares."""
GRAPHS = 3 * GIB // 2
"""Of an engine's CUDA graphs, which vLLM counts into its share, and which stay when it sleeps."""
OFFLOAD = "{{zero_optimization:{{offload_optimizer:{{device:cpu}}}}}} learner.zero_stage={}"
"""Value of learner.deepspeed that puts the optimizer into the host's memory, which ZeRO 2 and 3 can."""
LARGE = 70 * GIB
"""Bytes of a card from which vLLM takes the larger of these; of an A100 it takes the smaller all the same."""
BATCHED, SEATS = (8192, 16_384), (256, 1024)
"""vLLM's max_num_batched_tokens and max_num_seqs, on a smaller card and on a larger."""


@dataclass(frozen=True)
class ModelShape:
    """What a decoder's memory follows from, of its config.json; MLPs are gated."""

    layers: int
    width: int
    intermediate: int
    """Columns of an MLP that one token passes through; of all its experts."""
    queries: int
    """Columns: heads x size of a head."""
    keys: int
    """Columns of keys, and as many of values."""
    vocabulary: int
    parameters: int
    heads: int = 0
    """Of queries, which shards of an engine divide; 0: unknown."""


QWEN = {
    "1.5B": ModelShape(28, 1536, 8960, 1536, 256, 151_936, 1_543_714_304, 12),
    "7B": ModelShape(28, 3584, 18_944, 3584, 512, 152_064, 7_615_616_512, 28),
    "32B": ModelShape(64, 5120, 27_648, 5120, 1024, 152_064, 32_763_876_352, 40),
}
"""Qwen2.5, by the sizes in its names."""


@dataclass(frozen=True)
class Layout:
    """The settings that decide what a card holds."""

    element: int
    """Bytes of a weight: 4 or 2."""
    longest: int
    """Tokens of a prompt and its response, in training."""
    served: int = 0
    """As `longest`, of what engines answer, if that is more: evaluation sets too."""
    ranks: int = 1
    zero_stage: int = 1
    token_budget: int = 8192
    checkpoint_every: int = 0
    """Layers; 0: no gradient checkpointing."""
    host_activations: bool = False
    """Whether what a checkpointed layer begins with lies in the host's memory."""
    host_optimizer: bool = False
    bucket: int = BUCKET
    """DeepSpeed's reduce_bucket_size."""
    compiled: bool = False
    """Whether layers are compiled, which ZeRO 3 excludes."""
    reference: bool = False
    adapter: int = 0
    """Parameters of LoRA's adapter, which alone is trained; 0: all are."""
    lora_rank: int = 0
    """vLLM's max_lora_rank, where engines serve adapters."""
    transfer: str = "nccl"
    tensor_parallel: int = 1
    utilisation: float = 0.92
    """vLLM's gpu_memory_utilization."""
    kv_bytes: int | None = None
    """vLLM's kv_cache_memory_bytes, in place of a share of the card."""
    batched: int | None = None
    seats: int | None = None
    graphs: bool = True
    shared: bool = False
    """Whether an engine and a rank are on one card."""
    sleep: bool = False


def learner_states(count: int, s: Layout) -> dict[str, float]:
    """Bytes that a rank holds between updates, for a model of `count` parameters.

    What DeepSpeed 0.19 divides: stage 1 the optimizer's, stage 2 gradients too, stage 3 weights too. Its
    optimizers keep a float32 copy, but for float32 weights in stages 0 and 3. Gradients of bfloat16 weights
    are summed in float32: in stage 1 beside their own, in 2 and 3 in their place, in 0 not at all. With LoRA
    all that is of the adapter, and the model itself is the reference.
    """
    held, count = count + s.adapter, s.adapter or count
    divided = lambda n, stage: n / (s.ranks if s.zero_stage >= stage else 1)
    share = lambda stage: divided(count, stage)
    copied = s.element < 4 or s.zero_stage in (1, 2)
    host = 0.0 if s.host_optimizer else 1.0
    parts = {
        "weights": s.element * divided(held, 3),
        "gradients": _gradients(s, count, share(2)) * (host if s.zero_stage > 1 else 1),
        **({"float32 copy": 4 * share(1) * host} if copied else {}),
        "Adam moments": 8 * share(1) * host,
        **({"reference": s.element * share(3)} if s.reference and not s.adapter else {}),
    }
    return {name: float(size) for name, size in parts.items()}


def _gradients(s: Layout, count: int, share: float) -> float:
    if s.element == 4 or s.zero_stage == 0:
        return s.element * share
    return (s.element + 4) * count if s.zero_stage == 1 else 4 * share


def adapter_size(m: ModelShape, rank: int, targets: Sequence[str]) -> int:
    """Parameters of LoRA's adapters on `targets`, by their usual names; of other names on all matrices."""
    sizes = {
        **{"q_proj": m.width + m.queries, "o_proj": m.queries + m.width},
        **dict.fromkeys(("k_proj", "v_proj"), m.width + m.keys),
        **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), m.width + m.intermediate),
    }
    chosen = targets if set(targets) <= sizes.keys() else sizes
    return m.layers * rank * sum(sizes[name] for name in set(chosen))


def layer_bytes(m: ModelShape, element: int) -> float:
    """What one layer keeps of a token for its backward pass, with attention that keeps no scores.

    Of each norm its input in float32, itself and the product; queries, keys, values and what attention
    gives; of the MLP gate, its activation, up and their product.
    """
    norms = 2 * (4 + 2 * element) * m.width
    return norms + element * (2 * m.queries + 2 * m.keys + 4 * m.intermediate)


def learner_work(m: ModelShape, s: Layout) -> dict[str, float]:
    """Bytes that a micro-batch takes besides, at its peak; a row longer than the budget stands alone."""
    tokens, layer = max(s.token_budget, s.longest), layer_bytes(m, s.element)
    checkpointed = ceil(m.layers / s.checkpoint_every) if s.checkpoint_every else 0
    kept = (m.layers - checkpointed) * layer
    kept += checkpointed * (0 if s.host_activations else s.element * m.width)
    again = layer * (1.5 if checkpointed else 0.5)  # a layer run again, and gradients of what it keeps
    weight = m.vocabulary * m.width
    live = min(2 * BUCKET, m.parameters) + weight if s.zero_stage == 3 and s.ranks > 1 else 0
    copied = s.zero_stage == 2 and s.element < 4  # into FP32, to be sent; stage 1 has it in FP32 at once
    copies = 6 if copied else 4 if s.ranks > 1 or s.zero_stage else 0
    return {
        "activations": tokens * (kept + again + 4 * s.element * m.width),
        "head": TILES * TILE + (0.0 if s.adapter else weight * (4.0 + s.element)),
        "DeepSpeed's buckets": float(s.bucket * copies + live * s.element),
    }


def sync_bytes(m: ModelShape, s: Layout) -> tuple[float, float]:
    """Of buffers that weights are packed in, on rank 0 and on an engine; a buffer is sent once it is full."""
    largest = float(m.vocabulary * m.width * s.element)  # LoRA's merged matrices are smaller
    if s.transfer == "nccl":
        two = 2 * PACKED + largest
        return 2 * two, two  # what is packed is alive beside its pieces
    return (2 * max(IPC, largest), 0.0) if s.transfer == "ipc" else (0.0, 0.0)


def save_bytes(m: ModelShape, s: Layout) -> float:
    """Of the largest parameter, whole in float32 on every rank as it is saved; less than `learner_work`."""
    return 4.0 * m.vocabulary * m.width if s.zero_stage and not s.adapter else 0.0


def engine_bytes(m: ModelShape, s: Layout, card: float) -> dict[str, float]:
    """Bytes of one shard of an engine; keys and values are what is left of its share of the card."""
    tp, large = s.tensor_parallel, card >= LARGE
    logits = (s.seats or SEATS[large]) * m.vocabulary * 8  # and their probabilities, in FP32
    parts = {
        "weights": m.parameters * s.element / tp,
        **({"adapter": lora_slots(m, s) * s.element} if s.lora_rank else {}),
        "a step": (s.batched or BATCHED[large]) * s.element * (3 * m.intermediate / tp + 6 * m.width)
        + logits,
        "graphs": float(GRAPHS if s.graphs else 0),
    }
    left = s.utilisation * card - sum(parts.values())
    return {**parts, "keys and values": float(left if s.kv_bytes is None else s.kv_bytes)}


def lora_slots(m: ModelShape, s: Layout) -> float:
    """Numbers of A and B that vLLM 0.32 holds on one shard: for every matrix, whatever the adapter's targets.

    Embedding and head too, as of Llama and Qwen3. Shards divide B of q, k, v, gate and up, and A of o and
    down; they have the others whole.
    """
    whole, divided = 7 * m.width, 2 * m.queries + 2 * m.keys + 3 * m.intermediate
    layer = whole + divided / s.tensor_parallel
    return s.lora_rank * (m.layers * layer + 2 * (m.vocabulary + m.width))


def token_bytes(m: ModelShape, s: Layout) -> float:
    """Keys and values of one token on one shard."""
    return 2 * m.layers * m.keys * s.element / s.tensor_parallel


def cards(m: ModelShape, s: Layout, card: float) -> dict[str, dict[str, float]]:
    """Bytes by what they hold, of every kind of card at its fullest; vLLM's share has its own reserve."""
    states, work, engine = learner_states(m.parameters, s), learner_work(m, s), engine_bytes(m, s, card)
    sending, taking = sync_bytes(m, s)
    own = {"reserve": RESERVE * card}
    syncing = {"sync buffers": sending}
    busy = max(work, syncing, key=lambda parts: sum(parts.values()))
    engine_parts = {f"engine's {name}": size for name, size in engine.items()}
    if not s.shared:
        return {
            "learner rank": {**states, **busy, **own},
            "engine": {**engine, "sync buffers": taking, **({} if s.kv_bytes is None else own)},
        }
    if not s.sleep:
        return {"card of both": {**states, **busy, **engine_parts, **own}}
    graphs = {"engine's graphs": engine["graphs"]}
    busy_parts = ("engine's a step", "engine's keys and values")
    loaded = {name: size for name, size in engine_parts.items() if name not in busy_parts}
    return {
        "card of both, while it learns": {**states, **work, **graphs, **own},
        "card of both, at a sync": {**states, **syncing, **loaded, **own},
        "card of both, while it samples": {**states, "a save": save_bytes(m, s), **engine_parts, **own},
    }


def shortages(m: ModelShape, s: Layout, card: float) -> list[str]:
    """What does not fit, with its sizes."""
    found = [
        f"{name}: {gib(sum(parts.values()))} of {gib(card)}"
        for name, parts in cards(m, s, card).items()
        if sum(parts.values()) > card
    ]
    served = max(s.longest, s.served)
    have, need = engine_bytes(m, s, card)["keys and values"], served * token_bytes(m, s)
    if have < need:
        found.append(
            f"engine: {gib(max(0.0, have))} for keys and values, and {served:,} tokens take {gib(need)}"
        )
    return found


def gib(size: float) -> str:
    return f"{size / GIB:,.1f} GiB"


Step = tuple[str, list[tuple[str, dict[str, Any]]]]
"""A setting, and values of it, the smallest change first: as they are written, and what they replace."""


def learner_steps(s: Layout, most_ranks: int) -> list[Step]:
    """What a rank may try, in order; a micro-batch is no smaller than the longest row."""
    budgets = [s.token_budget >> n for n in range(1, 8) if s.token_budget >> n >= max(s.longest, 512)]
    budgets += [s.longest] if s.longest < s.token_budget and s.longest not in budgets else []
    stage = lambda n: [(f"{n}", {"zero_stage": n})] if n > s.zero_stage and most_ranks > 1 else []
    stages = (2,) if s.compiled else (2, 3)
    how, now = ("_every_n_layers", "1") if s.checkpoint_every else ("", "true")
    every = [] if s.checkpoint_every == 1 else [(now, {"checkpoint_every": 1})]
    grown = [s.ranks << n for n in range(1, 7) if s.ranks << n <= most_ranks]
    held = {n: {"zero_stage": n, "host_optimizer": True} for n in stages if n >= s.zero_stage}
    host = [] if s.host_optimizer else [(OFFLOAD.format(n), fields) for n, fields in held.items()]
    return [
        ("learner.zero_stage", stage(2)),
        (f"learner.gradient_checkpointing{how}", every),
        ("learner.token_budget", [(f"{n}", {"token_budget": n}) for n in budgets]),
        ("learner.zero_stage", stage(3) if 3 in stages else []),
        ("learner.ranks", [(f"{n}", {"ranks": n}) for n in grown]),
        ("learner.deepspeed", host),
    ]


def engine_steps(m: ModelShape, s: Layout, most_parallel: int) -> list[Step]:
    """What an engine may try, in order: less of its card, more cards, more of its card."""
    engine = "generator.engine."
    share = lambda percent: (f"{percent / 100:g}", {"utilisation": percent / 100})
    shares = [share(n) for n in range(95, 10, -5)]
    less = [each for each in shares if each[1]["utilisation"] < s.utilisation]
    more = [each for each in reversed(shares) if each[1]["utilisation"] > s.utilisation]
    sizes = [(f"{n << 30}", {"kv_bytes": n << 30}) for n in (64, 32, 16, 8, 4, 2)]
    parallel = [n for n in (2, 4, 8) if s.tensor_parallel < n <= most_parallel and m.heads % n == 0]
    kept = s.shared or s.kv_bytes is not None
    return [
        (f"{engine}gpu_memory_utilization", [] if kept else less),
        (f"{engine}kv_cache_memory_bytes", sizes if kept else []),
        ("generator.tensor_parallel", [(f"{n}", {"tensor_parallel": n}) for n in parallel]),
        (f"{engine}gpu_memory_utilization", [] if kept else more),
    ]


def smallest_change(
    m: ModelShape, s: Layout, card: float, *, ranks: int = 64, parallel: int = 8, apart: bool = True
) -> tuple[list[str], Layout] | None:
    """The settings with which nothing is short, and the layout they make; None if none do.

    A setting is tried only where those before it in their order, alone and together, do not do. Up to
    `ranks` and `parallel` shards of an engine are tried; with `apart` a shared card becomes two.
    """
    if s.shared:
        *cheap, host = learner_steps(s, s.ranks)
        found = _first(m, s, card, [*cheap, *engine_steps(m, s, 1), host], "")
        if found or not apart:
            return found
        two = replace(s, shared=False, sleep=False, transfer="nccl", kv_bytes=None, utilisation=0.85)
        beyond = smallest_change(m, replace(two, ranks=1, lora_rank=0), card, ranks=ranks, parallel=parallel)
        return beyond and (["cluster=gpu", *beyond[0]], beyond[1])
    learner = _first(m, s, card, learner_steps(s, ranks), "learner")
    both = learner and _first(m, learner[1], card, engine_steps(m, s, parallel), "engine")
    return (learner[0] + both[0], both[1]) if learner and both else None


def _first(
    m: ModelShape, s: Layout, card: float, steps: Sequence[Step], role: str
) -> tuple[list[str], Layout] | None:
    """The first change with which nothing whose name begins with `role` is short."""
    changes = _changes(s, [step for step in steps if step[1]])
    fits = lambda tried: not any(short.startswith(role) for short in shortages(m, tried, card))
    return next(((words, tried) for words, tried in changes if fits(tried)), None)


def _changes(s: Layout, steps: Sequence[Step]) -> Iterator[tuple[list[str], Layout]]:
    """Nothing; then the first setting; the second, alone and with the first; the third, and so on."""
    yield [], s
    for last, step in enumerate(steps):
        for number in range(last + 1):
            for before in combinations(steps[:last], number):
                names, values = zip(*before, step, strict=True)
                for chosen in product(*values):
                    words = [f"{name}={text}" for name, (text, _) in zip(names, chosen, strict=True)]
                    yield words, replace(s, **{k: v for _, fields in chosen for k, v in fields.items()})


_DEALT = Layout(2, 0, checkpoint_every=1, utilisation=0.8)
_SHARED = replace(_DEALT, transfer="ipc", utilisation=0.1, kv_bytes=16 * GIB, shared=True, sleep=True)
TABLE = {
    "one_gpu": (1, _SHARED),
    "node8": (8, replace(_DEALT, ranks=4, zero_stage=2)),
    "node8_shared": (8, replace(_SHARED, ranks=8, zero_stage=2)),
    "nodes4x8": (
        32,
        replace(_DEALT, ranks=16, zero_stage=3, token_budget=16_384, tensor_parallel=2, utilisation=0.85),
    ),
}
"""By the `cluster` that deals them out: how many cards, and their layout."""


def table() -> Iterator[str]:
    """The table of `launch/README.md`: Qwen2.5 on the cards of each `cluster`, prompts of 512 tokens."""
    lengths = {"8k": 8192, "32k": 32_768}
    yield "| model | cards | " + " | ".join(f"responses of {name} tokens" for name in lengths) + " |"
    yield "|---" * (2 + len(lengths)) + "|"
    for size, m in QWEN.items():
        for cluster, (number, empty) in TABLE.items():
            for gigabytes in (80, 141):
                longest = [replace(empty, longest=512 + n) for n in lengths.values()]
                cells = " | ".join(_cell(m, s, gigabytes * NAMED) for s in longest)
                yield f"| {size} | {number} x {gigabytes} GB, `cluster={cluster}` | {cells} |"


def _cell(m: ModelShape, s: Layout, card: float) -> str:
    """The change that fits, with as many cards, and the GiB of each kind of card at its fullest then."""
    found = smallest_change(m, s, card, ranks=s.ranks, apart=False)
    if found is None:
        return "no"
    words, changed = found
    full = [f"{sum(parts.values()) / GIB:.0f}" for parts in cards(m, changed, card).values()]
    said = max(full, key=int) if s.shared else " + ".join(full)
    return f"{', '.join(f'`{word}`' for word in words) or 'as it is'}: {said}"
