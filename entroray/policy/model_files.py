"""A model as a Hugging Face folder: what was read is what is written, with the new weights in it."""

import json
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from entroray.policy import safetensors_header

CONFIG, GENERATION = "config.json", "generation_config.json"
SHARD_BYTES = 5 * 10**9
"""Of tensors in one file of an export: as much is held in memory while it is written."""


def read_texts(place: Path | None) -> dict[str, bytes]:
    """Configuration and generation settings in a model's folder, to the letter."""
    files = [place / name for name in (CONFIG, GENERATION)] if place else []
    return {file.name: file.read_bytes() for file in files if file.is_file()}


def write_model(
    folder: Path, model: Any, weights: Iterable[tuple[str, Tensor]], texts: Mapping[str, bytes]
) -> None:
    """Weights by the names of the files that were read, `texts` as they were, but for the data type.

    Files get the mode that the process's umask gives; the tokenizer is the caller's to add.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(_configuration(model, texts), encoding="utf-8")
    if settings := texts.get(GENERATION) or _generation(model):
        (folder / GENERATION).write_bytes(settings)
    _write_weights(folder, weights)


def _write_weights(folder: Path, weights: Iterable[tuple[str, Tensor]]) -> None:
    """One file, or several of at most `SHARD_BYTES` and an index, each written when its tensors are here."""
    from safetensors.torch import save_file

    parts: list[dict[str, int]] = []
    for part in split_files(weights, SHARD_BYTES):
        file = folder / f"part-{len(parts)}.safetensors"
        save_file(part, file, metadata={"format": "pt"})
        shutil.copymode(folder / CONFIG, file)  # safetensors gives 0600
        parts.append({name: tensor.nbytes for name, tensor in part.items()})
        part.clear()  # before the next is gathered
    several = [f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors" for i in range(len(parts))]
    names = several if len(parts) > 1 else [safetensors_header.WHOLE]
    for i, name in enumerate(names):
        (folder / f"part-{i}.safetensors").rename(folder / name)
    if len(parts) > 1:
        where = {tensor: name for name, part in zip(names, parts, strict=True) for tensor in part}
        size = {"total_size": sum(sum(part.values()) for part in parts)}
        index = json.dumps({"metadata": size, "weight_map": where}, indent=2) + "\n"
        (folder / safetensors_header.INDEX).write_text(index, encoding="utf-8")


def split_files(weights: Iterable[tuple[str, Tensor]], size: int) -> Iterator[dict[str, Tensor]]:
    """What goes into one file of `size` bytes each, and no more is held; a larger tensor has a file alone."""
    part: dict[str, Tensor] = {}
    for name, tensor in weights:
        if part and sum(each.nbytes for each in part.values()) + tensor.nbytes > size:
            yield part
            part = {}
        part[name] = tensor.cpu().contiguous()
    yield part


def tensors_besides(source: Path | None, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    """The tensors `names` of a model's files."""
    from safetensors import safe_open

    for file in safetensors_header.weight_files(source) if source and names else []:
        with safe_open(file, framework="pt") as opened:
            yield from ((name, opened.get_tensor(name)) for name in names if name in set(opened.keys()))


def _configuration(model: Any, texts: Mapping[str, bytes]) -> str:
    """transformers reads some configurations that it refuses to write: theirs is kept."""
    config = json.loads(texts.get(CONFIG) or model.config.to_json_string())
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            part.pop("torch_dtype", None)
            part["dtype"] = str(model.dtype).removeprefix("torch.")
    config["architectures"] = config.get("architectures") or [type(model).__name__]
    return json.dumps(config, indent=2) + "\n"


def _generation(model: Any) -> bytes:
    settings = model.generation_config
    return settings.to_json_string().encode() if settings is not None else b""
