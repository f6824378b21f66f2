"""What a run needs of memory, by role, from the model's size alone: nothing is loaded."""

import json
import math
from pathlib import Path

from entroray.cli import bootstrap, machine
from entroray.config import EMBEDDED, Config
from entroray.objective import Objective

BYTES = {"float32": 4, "bfloat16": 2}


def lines(config: Config, objective: Objective) -> list[str]:
    """A line for each role; what activations and samples in flight take is not known beforehand."""
    found = parameters(config)
    if found is None:
        return [f"memory: unknown until {config.model.path} is in the cache of the hub or a folder here"]
    e, g, v = BYTES[config.model.dtype], config.generator, config.verifier
    parts = learner(config, found, held="ref_logprobs" in objective.needs)
    cache = machine.engine_options(config).get("kv_cache_memory_bytes")
    kept = f"keys and values {_mib(cache)}" if cache else "keys and values by vLLM's share"
    limit = f"at most {v.memory_mb:,} MiB" if v.memory_mb else "no limit"
    return [
        f"model: {found:,} parameters, {config.model.dtype}",
        f"memory of a learner rank, {_mib(sum(parts.values()))} before activations and any offloading: "
        + ", ".join(f"{name} {_mib(size)}" for name, size in parts.items()),
        f"memory of a generator's shard: weights {_mib(found * e / g.tensor_parallel)}, {kept}",
        f"memory of a verifier: {v.slots} processes, {limit} each beyond its start",
    ]


def learner(config: Config, count: int, *, held: bool) -> dict[str, float]:
    """Bytes on one rank by what they hold, for `count` parameters; `held` by the objective: a reference.

    What DeepSpeed 0.19 divides: stage 1 the optimizer's, stage 2 gradients too, stage 3 weights too. Its
    optimizers keep a float32 copy, but for float32 weights in stages 0 and 3.
    """
    n, e = config.learner, BYTES[config.model.dtype]
    share = lambda stage: count / (n.ranks if n.zero_stage >= stage else 1)
    copied = config.model.dtype != "float32" or n.zero_stage in (1, 2)
    return {
        "weights": e * share(3),
        "gradients": e * share(2),
        **({"float32 copy": 4 * share(1)} if copied else {}),
        "Adam moments": 8 * share(1),
        **({"reference": float(e * count)} if held or n.reference else {}),
    }


def parameters(config: Config) -> int | None:
    """Of the model of these settings, each counted once; None for a hub id that is not in the cache."""
    if config.model.path == EMBEDDED and not bootstrap.cached(config).is_dir():
        from entroray.policy.build import count

        return count(config.model.bootstrap.shape)
    folder = _folder(bootstrap.resolve(config))
    return (_stored(folder) or _declared(folder)) if folder else None


def _folder(path: str) -> Path | None:
    """Where the model lies; a hub id is looked for in the hub's cache, never in the hub."""
    if Path(path).expanduser().is_dir():
        return Path(path).expanduser()
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(path, "config.json")
    except HFValidationError:  # a path of no folder is no hub id either
        return None
    return Path(found).parent if isinstance(found, str) else None


def _stored(folder: Path) -> int:
    """Elements of all tensors in the headers of its safetensors files; 0 where one of them is not there."""
    index = folder / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.is_file():
        names = set(json.loads(index.read_text())["weight_map"].values())
    files = [folder / name for name in names]
    return sum(map(_elements, files)) if all(f.is_file() for f in files) else 0


def _elements(file: Path) -> int:
    """A safetensors file begins with the length of its header, 8 bytes little-endian, and the header."""
    with file.open("rb") as opened:
        header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    return sum(math.prod(t["shape"]) for name, t in header.items() if name != "__metadata__")


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
