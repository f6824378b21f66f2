"""What a run needs of memory, by role and by card, from the model's shape alone: nothing is loaded."""

import math
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from entroray.config import Config, share_cards
from entroray.engine.adapter import ADAPTER
from entroray.errors import ConfigError, InfrastructureError, PreflightError
from entroray.objective import Objective
from entroray.planning import memory
from entroray.planning.memory import NAMED, QWEN, Layout, ModelShape
from entroray.policy import families, safetensors_header
from entroray.policy.tiny_model import count_parameters, tiny_config
from entroray.wiring import actors, warm_start
from entroray.workers import cluster

BYTES = {"float32": 4, "bfloat16": 2}
DRIVER = 580
"""The least driver that CUDA 13 runs on, which the pinned builds of torch and vLLM are made for."""
PROPOSED = 32
"""Rank of the adapters that are proposed where full training does not fit."""
QUERY = ("nvidia-smi", "--query-gpu=memory.total,driver_version", "--format=csv,noheader,nounits")


def memory_lines(config: Config, objective: Objective, card: float | None = None) -> list[str]:
    """A line for each role, and for each kind of card where GPUs are asked for and a card's bytes known."""
    found = parameter_count(config)
    if found is None:
        return [f"memory: unknown until {config.model.path} is in the cache of the hub or a folder here"]
    e, g, v = BYTES[config.model.dtype], config.generator, config.verifier
    parts = memory.learner_states(found, layout(config, objective))
    cache = actors.engine_options(config).get("kv_cache_memory_bytes")
    kept = f"keys and values {_mib(cache)}" if cache else "keys and values by vLLM's share"
    limit = f"at most {v.memory_mb:,} MiB" if v.memory_mb else "no limit"
    return [
        f"model: {found:,} parameters, {config.model.dtype}",
        *(f"trained: {line}" for line in lora_lines(config, adapter_size(config), "about ")),
        f"memory of a learner rank between updates, {_mib(sum(parts.values()))}: "
        + ", ".join(f"{name} {_mib(size)}" for name, size in parts.items()),
        f"memory of a generator's shard: weights {_mib(found * e / g.tensor_parallel)}, {kept}",
        f"memory of a verifier: {v.slots} processes, {limit} each beyond its start",
        *card_lines(config, objective, card),
    ]


def lora_lines(config: Config, trained: int, about: str = "") -> list[str]:
    """What LoRA trains, and how it is served; nothing without it. `trained` are parameters, 0: unknown."""
    of, alone = config.learner.lora, config.generator.transfer == ADAPTER
    how = "as an adapter" if alone else "merged into the weights"
    size = f"{about}{trained:,} parameters" if trained else "few parameters"
    return [f"LoRA of rank {of.rank} on {', '.join(of.targets)}, {size}, served {how}"] if of.rank else []


def card_lines(config: Config, objective: Objective, card: float | None) -> list[str]:
    """What each kind of card holds at its fullest; none for a run on CPUs, of no known shape, or no card."""
    if actors.cpu_only(config.cluster) or card is None or (shape := model_shape(config)) is None:
        return []
    s = layout(config, objective)
    rows = memory.cards(shape, s, card)
    fits = int(memory.engine_bytes(shape, s, card)["keys and values"] // memory.token_bytes(shape, s))
    return [
        *(
            f"card, {name}: {memory.gib(sum(parts.values()))} of {memory.gib(card)}: "
            + ", ".join(f"{what} {memory.gib(size)}" for what, size in parts.items() if size)
            for name, parts in rows.items()
        ),
        f"keys and values of an engine: {max(0, fits):,} tokens, {max(0, fits) // s.served} sequences of "
        f"{s.served:,}",
    ]


def check_cards(config: Config, objective: Objective, card: float) -> str:
    """What the cards hold; PreflightError naming the smallest change, if it is more than there is."""
    shape = model_shape(config)
    if shape is None:
        return f"unknown until {config.model.path} is in the cache of the hub or a folder here"
    s = layout(config, objective)
    if short := memory.shortages(shape, s, card):
        change = memory.smallest_change(shape, s, card)
        remedy = f"The smallest change that does: {' '.join(change[0])}" if change else NOTHING
        low = _with_lora(shape, s, card, config.learner.lr or 0.0)
        raise PreflightError(f"the cards are too small. {'; '.join(short)}. {low}{remedy}")
    full = {name: sum(parts.values()) for name, parts in memory.cards(shape, s, card).items()}
    return ", ".join(f"{name} {memory.gib(size)}" for name, size in full.items()) + f" of {memory.gib(card)}"


def _with_lora(shape: ModelShape, s: Layout, card: float, lr: float) -> str:
    """What fits if adapters are trained, at ten times the learning rate; empty if they are, or none fit."""
    adapter = memory.adapter_size(shape, PROPOSED, ())
    low = replace(s, adapter=adapter, bucket=min(s.bucket, memory.LORA_BUCKET))
    change = None if s.adapter else memory.smallest_change(shape, low, card)
    words = [f"learner.lora.rank={PROPOSED}", f"learner.lr={10 * lr:g}", *change[0]] if change else []
    return f"With adapters in place of full training it does: {' '.join(words)}. " if words else ""


def adapter_size(config: Config) -> int:
    """Parameters that LoRA trains with these settings; 0 without LoRA, and for a model of no known shape."""
    lora = config.learner.lora
    shape = model_shape(config) if lora.rank else None
    return memory.adapter_size(shape, lora.rank, lora.targets) if shape else 0


NOTHING = (
    "Neither learner.gradient_checkpointing, token_budget, zero_stage, up to 64 ranks or an optimizer in the "
    "host's memory do, nor generator.tensor_parallel up to 8 or another share of the card: lower "
    "rollout.max_tokens, or take a smaller model or larger cards"
)


def check_cluster(config: Config, objective: Objective) -> None:
    """As `check_cards`, of a cluster that was joined by its address and whose cards can be asked for."""
    if not config.cluster.address or actors.cpu_only(config.cluster):
        return
    try:
        card = cluster.ask_node(smallest_card)
    except InfrastructureError as error:  # it only advises: whether a run fits is seen once it starts
        print(f"memory: the cluster's cards could not be asked for ({error})", flush=True)
        return
    if card:
        check_cards(config, objective, card)


def layout(config: Config, objective: Objective) -> Layout:
    """The settings that decide what a card holds."""
    n, g, c, engine = config.learner, config.generator, config.cluster, actors.engine_options(config)
    zero = n.deepspeed.get("zero_optimization") or {}
    host = (zero.get("offload_optimizer") or {}).get("device", "none") != "none"
    return Layout(
        element=BYTES[config.model.dtype],
        longest=config.data.max_prompt + config.rollout.max_tokens,
        served=actors.sequence_length(config),
        ranks=n.ranks,
        zero_stage=n.zero_stage,
        token_budget=n.token_budget,
        checkpoint_every=n.gradient_checkpointing_every_n_layers if n.gradient_checkpointing else 0,
        host_activations=n.gradient_checkpointing_offload,
        host_optimizer=host,
        bucket=int(zero.get("reduce_bucket_size", memory.LORA_BUCKET if n.lora.rank else memory.BUCKET)),
        compiled=n.compile,
        reference=n.reference or "ref_logprobs" in objective.needs,
        adapter=adapter_size(config),
        lora_rank=engine.get("max_lora_rank", 0),
        transfer=g.transfer,
        tensor_parallel=g.tensor_parallel,
        utilisation=float(engine.get("gpu_memory_utilization", Layout.utilisation)),
        kv_bytes=engine.get("kv_cache_memory_bytes"),
        batched=engine.get("max_num_batched_tokens"),
        seats=engine.get("max_num_seqs"),
        graphs=not engine.get("enforce_eager"),
        shared=share_cards(c),
        sleep=g.sleep,
    )


def named_card(text: str) -> float:
    """Bytes of a card of `text` GB; ConfigError for what is no number."""
    try:
        size = float(text)
    except ValueError:
        size = 0.0
    if not 0 < size < 10_000:
        raise ConfigError(f"--card={text}: give the GB of a card's name, such as 80 or 141")
    return size * NAMED


def cards_here() -> list[tuple[float, str]]:
    """Bytes and driver of every card that CUDA_VISIBLE_DEVICES leaves, by NVML; none where there is none."""
    if not shutil.which(QUERY[0]):
        return []
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    query = [*QUERY, *(["-i", seen] if seen else [])]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
        rows = [line.split(",") for line in found.splitlines() if line.strip()]
        return [(float(size) * 2**20, driver.strip()) for size, driver in rows]
    except (OSError, subprocess.SubprocessError, ValueError):  # no driver, or one that does not answer
        return []


def smallest_card() -> float | None:
    """Bytes of the smallest card of this machine; None without any."""
    return min((size for size, _ in cards_here()), default=None)


def check_driver(found: Sequence[tuple[float, str]]) -> str:
    """The driver of these cards; PreflightError if CUDA 13 does not run on it."""
    drivers = sorted({driver for _, driver in found}, key=lambda name: int(name.partition(".")[0]))
    if not drivers:
        return "nvidia-smi lists no card here"
    if int(drivers[0].partition(".")[0]) < DRIVER and not torch.cuda.is_available():
        raise PreflightError(
            f"the driver is {drivers[0]}, and torch and vLLM are pinned to CUDA 13, which needs {DRIVER} or "
            "newer: update the driver, or use cluster=cpu"
        )
    return f"{drivers[0]} on {len(found)} cards"


def model_shape(config: Config) -> ModelShape | None:
    """Of the model of these settings, as `parameter_count` finds it."""
    count = parameter_count(config)
    if count is None:
        return None
    if warm_start.is_missing(config):
        return _shape(tiny_config(config.model.warm_start.size), count)
    folder = safetensors_header.model_folder(warm_start.resolve_model(config))
    if folder is None:
        return _known(config.model.path)
    if not (folder / "config.json").is_file():
        return None
    from transformers import AutoConfig

    return _shape(AutoConfig.from_pretrained(folder, trust_remote_code=False), count)


def _shape(described: Any, count: int) -> ModelShape | None:
    """Of a config.json as transformers reads it; None for one without the sizes of a decoder."""
    text = families.text_config(described)
    try:
        layers, width, heads = text.num_hidden_layers, text.hidden_size, text.num_attention_heads
    except AttributeError:
        return None
    size = getattr(text, "head_dim", None) or width // heads
    keys = (getattr(text, "num_key_value_heads", None) or heads) * size
    inner = getattr(text, "intermediate_size", None) or 4 * width
    return ModelShape(layers, width, inner, heads * size, keys, text.vocab_size, count, heads)


def parameter_count(config: Config) -> int | None:
    """Of the model of these settings, each counted once; None for a hub id that is not in the cache and
    not of `QWEN`.

    Raises PreflightError for a damaged file of weights, ValueError for a config.json of no known model.
    """
    if warm_start.is_missing(config):
        return count_parameters(config.model.warm_start.size)
    folder = safetensors_header.model_folder(warm_start.resolve_model(config))
    if folder is None:
        return known.parameters if (known := _known(config.model.path)) else None
    return sum(map(math.prod, safetensors_header.tensor_shapes(folder).values())) or _declared(folder)


def _known(path: str) -> ModelShape | None:
    """The shape of a hub id of Qwen2.5, such as Qwen/Qwen2.5-7B-Instruct."""
    named = {size: path.lower().startswith(f"qwen/qwen2.5-{size.lower()}") for size in QWEN}
    return next((QWEN[size] for size, it_is in named.items() if it_is), None)


def _declared(folder: Path) -> int | None:
    """As the architecture in config.json has them, built without memory; None without one."""
    if not (folder / "config.json").is_file():
        return None
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return int(model.num_parameters())


def _mib(size: float) -> str:
    return f"{size / 2**20:,.1f} MiB"
