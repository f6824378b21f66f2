"""What a run needs of memory, by role, from the model's size alone: nothing is loaded."""

import math
from pathlib import Path

from entroray.config import Config, LearnerConfig
from entroray.objective import Objective
from entroray.policy import safetensors_header
from entroray.wiring import actors, warm_start

BYTES = {"float32": 4, "bfloat16": 2}


def memory_lines(config: Config, objective: Objective) -> list[str]:
    """A line for each role; what activations and samples in flight take is not known beforehand."""
    found = parameter_count(config)
    if found is None:
        return [f"memory: unknown until {config.model.path} is in the cache of the hub or a folder here"]
    e, g, v = BYTES[config.model.dtype], config.generator, config.verifier
    held = "ref_logprobs" in objective.needs
    parts = learner_bytes(config.learner, config.model.dtype, found, held=held)
    cache = actors.engine_options(config).get("kv_cache_memory_bytes")
    kept = f"keys and values {_mib(cache)}" if cache else "keys and values by vLLM's share"
    limit = f"at most {v.memory_mb:,} MiB" if v.memory_mb else "no limit"
    return [
        f"model: {found:,} parameters, {config.model.dtype}",
        f"memory of a learner rank, {_mib(sum(parts.values()))} before activations and any offloading: "
        + ", ".join(f"{name} {_mib(size)}" for name, size in parts.items()),
        f"memory of a generator's shard: weights {_mib(found * e / g.tensor_parallel)}, {kept}",
        f"memory of a verifier: {v.slots} processes, {limit} each beyond its start",
    ]


def learner_bytes(n: LearnerConfig, dtype: str, count: int, *, held: bool) -> dict[str, float]:
    """Bytes on one rank by what they hold, for `count` parameters; `held` by the objective: a reference.

    What DeepSpeed 0.19 divides: stage 1 the optimizer's, stage 2 gradients too, stage 3 weights too. Its
    optimizers keep a float32 copy, but for float32 weights in stages 0 and 3. Gradients of bfloat16 weights
    are summed in float32: in stage 1 beside their own, in 2 and 3 in their place, in 0 not at all.
    """
    e = BYTES[dtype]
    share = lambda stage: count / (n.ranks if n.zero_stage >= stage else 1)
    copied = dtype != "float32" or n.zero_stage in (1, 2)
    return {
        "weights": e * share(3),
        "gradients": _gradients(n.zero_stage, dtype, count, share(2)),
        **({"float32 copy": 4 * share(1)} if copied else {}),
        "Adam moments": 8 * share(1),
        **({"reference": e * share(3)} if held or n.reference else {}),
    }


def _gradients(stage: int, dtype: str, count: int, share: float) -> float:
    e = BYTES[dtype]
    if dtype == "float32" or stage == 0:
        return e * share
    return (e + 4) * count if stage == 1 else 4 * share


def parameter_count(config: Config) -> int | None:
    """Of the model of these settings, each counted once; None for a hub id that is not in the cache.

    Raises PreflightError for a damaged file of weights, ValueError for a config.json of no known model.
    """
    if warm_start.is_missing(config):
        from entroray.policy.tiny_model import count_parameters

        return count_parameters(config.model.warm_start.size)
    folder = safetensors_header.model_folder(warm_start.resolve_model(config))
    return (
        (sum(map(math.prod, safetensors_header.tensor_shapes(folder).values())) or _declared(folder))
        if folder
        else None
    )


def _declared(folder: Path) -> int | None:
    """As the architecture in config.json has them, built without memory; None without one."""
    if not (folder / "config.json").is_file():
        return None
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    return int(model.num_parameters())


def _mib(size: float) -> str:
    return f"{size / 2**20:,.1f} MiB"
