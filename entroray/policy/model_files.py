"""A model as a Hugging Face folder: what was read is what is written, with the new weights in it."""

import json
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from entroray.policy import safetensors_header

CONFIG, GENERATION = "config.json", "generation_config.json"


def read_texts(place: Path | None) -> dict[str, bytes]:
    """Configuration and generation settings in a model's folder, to the letter."""
    files = [place / name for name in (CONFIG, GENERATION)] if place else []
    return {file.name: file.read_bytes() for file in files if file.is_file()}


def write_model(folder: Path, model: Any, weights: Mapping[str, Tensor], texts: Mapping[str, bytes]) -> None:
    """Weights by the names of the files that were read, `texts` as they were, but for the data type.

    Files get the mode that the process's umask gives; the tokenizer is the caller's to add.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(_configuration(model, texts), encoding="utf-8")
    if settings := texts.get(GENERATION) or _generation(model):
        (folder / GENERATION).write_bytes(settings)
    save_file(dict(weights), folder / safetensors_header.WHOLE, metadata={"format": "pt"})
    shutil.copymode(folder / CONFIG, folder / safetensors_header.WHOLE)  # safetensors gives 0600


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
