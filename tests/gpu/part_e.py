"""Part e: engines alone, without Ray and without a learner: python -m tests.gpu.part_e

Qwen2.5-1.5B's shape, weights that vLLM makes up. Every engine has a process of its own; all import vLLM at
once, then each has the card to itself.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from entroray.config import GeneratorConfig
from entroray.engine.vllm_request import PROCESSOR
from entroray.rollout import reshape
from entroray.types import Draw
from tests.gpu import record, shapes
from tests.gpu.engine import prompt
from tests.gpu.measure import share
from tests.gpu.processes import Process
from tests.gpu.record import Asked, Check, NotThereError, Step, at_most, holds, measured, not_here, there

SEQUENCES = (64, 256, 512)
TOKENS, PROMPT = 256, 128
"""Of a response and of the one prompt that a rate is measured with."""
GRAPHS: dict[str, Any] = {
    "compilation_config": {
        "mode": 0,
        "cudagraph_mode": "FULL_DECODE_ONLY",
        "cudagraph_capture_sizes": [1, 8, 64, 128, 256, 512],
    }
}
"""CUDA graphs of whole decoding steps, without torch's compiler: seconds to start instead of a minute."""
EAGER = {"enforce_eager": True}
HELD: dict[str, Any] = {}
"""Processes by the name of their engine, and the folder of the model."""


@dataclass(frozen=True)
class Kind:
    """One engine to measure."""

    options: Mapping[str, Any]
    environment: Mapping[str, str] = field(default_factory=dict)
    sequences: Sequence[int] = (256,)
    rule: Mapping[str, Any] = field(default_factory=dict)
    """Of the sampler."""
    setting: str = ""
    """Of `generator`, without which a checkout cannot do it."""


KINDS = {
    "eager": Kind({**EAGER, "enable_sleep_mode": True}, sequences=SEQUENCES),
    "graphs": Kind(GRAPHS, sequences=SEQUENCES),
    "overlapped": Kind({**GRAPHS, "async_scheduling": True}, sequences=SEQUENCES, setting="overlap"),
    "runner V1": Kind(GRAPHS, {"VLLM_USE_V2_MODEL_RUNNER": "0"}),
    "shaped": Kind({**GRAPHS, "logits_processors": [PROCESSOR]}, rule=reshape.FIXED),
    "16 threads": Kind(GRAPHS, {"OMP_NUM_THREADS": "16"}),
    "compiled": Kind({}),
}
"""The last as vLLM starts unless it is told otherwise."""


@cache
def folder(asked: Asked) -> str:
    HELD["temporary"] = tempfile.TemporaryDirectory()
    size = "served" if asked.dry else "1.5B"
    place = Path(HELD["temporary"].name, "model")
    return shapes.served_folder(size, place, weights=False)


def process(name: str, asked: Asked) -> Process:
    """That of an engine; the first call begins those of all, which import vLLM meanwhile."""
    if name not in HELD:
        names = [name] if asked.dry else [n for n in KINDS if n not in HELD]
        HELD.update({n: Process("tests.gpu.engine:Engine", environment(KINDS[n], asked)) for n in names})
    return HELD[name]


def environment(kind: Kind, asked: Asked) -> dict[str, str]:
    """As a run sets it, `cluster.environment`, but for what belongs to Ray."""
    cpu = {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_WAIT_POLICY": "passive",
        "TORCHDYNAMO_DISABLE": "1",
    }
    return {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        **({} if asked.card else cpu),
        **kind.environment,
    }


def options(kind: Kind, asked: Asked) -> dict[str, Any]:
    """vLLM's, of a run with one engine on a card, and those of this kind."""
    small = {"enforce_eager": True, "kv_cache_memory_bytes": 16 << 20, "max_num_batched_tokens": 4096}
    sized = {**small, "enable_chunked_prefill": False} if asked.dry else {"gpu_memory_utilization": 0.6}
    own = {} if asked.dry else {**kind.options, "max_num_seqs": max(SEQUENCES)}
    return {"load_format": "dummy", "disable_log_stats": True, **sized, **own}


def kernels(asked: Asked) -> Iterator[Check]:
    """vLLM's compiled parts load beside this torch, and one of them computes what torch does."""
    if not asked.card:
        yield not_here("vLLM's kernels", "they are built for cards")
        return
    there("vllm._C_stable_libtorch")
    there("vllm.cumem_allocator")
    rows, width = 512, 1536
    x = torch.randn(rows, width, device=asked.device, dtype=torch.bfloat16)
    weight, out = torch.rand(width, device=asked.device, dtype=torch.bfloat16), torch.empty_like(x)
    torch.ops._C.rms_norm(out, x, weight, 1e-6)
    wanted = torch.nn.functional.rms_norm(x.double(), (width,), weight.double(), 1e-6)
    yield at_most("RMSNorm of vLLM, from float64", 0.01, share=share(out, wanted))
    flash = there("vllm.vllm_flash_attn.flash_attn_interface", "is_fa_version_supported")
    found = {f"FA{version}": str(flash(version)) for version in (2, 3)}
    yield measured("flash attention of vLLM", **found)


def engine(name: str, asked: Asked) -> Iterator[Check]:
    """Tokens a second of one engine, and that a seed draws the same twice."""
    kind = KINDS[name]
    if asked.dry and name != "eager":
        yield not_here(name, "vLLM has neither CUDA graphs nor its second runner on CPUs")
        return
    if kind.setting and kind.setting not in {each.name for each in fields(GeneratorConfig)}:
        raise NotThereError(f"there is no setting generator.{kind.setting}")
    own = process(name, asked)
    try:
        yield from rates(name, own, asked)
    finally:  # the next one has the card to itself
        own.end()


def rates(name: str, own: Process, asked: Asked) -> Iterator[Check]:
    """Of an engine whose process has begun."""
    kind = KINDS[name]
    longest = 64 if asked.dry else 2 * (PROMPT + TOKENS)
    dtype, given = "float32" if asked.dry else "bfloat16", options(kind, asked)
    started = own.call("begin", folder(asked), dtype, longest, given, seconds=200.0 if asked.dry else 120.0)
    yield measured(f"{name}: started", **started)
    text = prompt(4 if asked.dry else PROMPT, 256)
    draw = Draw(1.0, 4 if asked.dry else TOKENS, rule=kind.rule)
    for sequences in (4,) if asked.dry else kind.sequences:
        found = own.call("fill", text, sequences, draw)
        rate = found["tokens"] / found["seconds"]
        yield measured(f"{name}: {sequences} at once", tokens_per_s=rate, tokens=found["tokens"])
    again = own.call("fill", text, sequences, draw)
    same = again["first"] == found["first"]
    yield holds(f"{name}: a seed draws the same first tokens twice", same, f"all {sequences} of them")
    yield measured(
        f"{name}: whole responses the same", said="yes" if again["hash"] == found["hash"] else "no"
    )
    HELD[f"{name}: first"] = found["first"]
    if name == "eager":
        yield from slept(own, asked)


def slept(own: Process, asked: Asked) -> Iterator[Check]:
    """How long vLLM's two ways of sleeping take, and what they free."""
    if not asked.card:
        yield not_here("sleep", "on a card")
        return
    for level in (1, 2):
        rested = own.call("rest", level)
        yield measured(f"sleep at level {level}", **rested)
        for tag in ("weights", "kv_cache"):
            yield measured(f"wake from level {level}, {tag}", **own.call("wake", tag))


def runners(asked: Asked) -> Iterator[Check]:
    """Whether a seed draws the same first token of both runners, which sample by other kernels."""
    found = [HELD.get(f"{name}: first") for name in ("graphs", "runner V1")]
    if None in found:
        yield not_here("seeds of both runners", "both engines are needed in one call")
        return
    pairs = [*zip(*found, strict=False)]  # one was asked for more
    same = sum(a == b for a, b in pairs) / len(pairs)
    yield measured("share of first tokens that both runners draw alike", share=same)


def leave() -> None:
    """No process is left."""
    for held in HELD.values():
        if isinstance(held, Process):
            held.end()
    if "temporary" in HELD:
        HELD["temporary"].cleanup()


STEPS: dict[str, Step] = {
    "kernels": kernels,
    **{name: partial(engine, name) for name in KINDS},
    "runners": runners,
}

if __name__ == "__main__":
    try:
        record.main("e", "engines alone", STEPS)
    finally:
        leave()
