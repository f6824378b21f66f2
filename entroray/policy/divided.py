"""A model that ranks divide while transformers reads it: what transformers leaves out then.

Its loader for ZeRO 3 (5.19) does not compare shapes, makes rotary frequencies in the weights' data type (bf16
has 8 bits of each), and takes every tied head for equal to the embedding: it compares what is left of both.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from entroray.errors import PreflightError
from entroray.policy import families, safetensors_header
from entroray.policy.model_files import tensors_besides


def outline(config: Any, dtype: torch.dtype) -> Any:
    """The model of `config` without its weights, and with its buffers as an undivided model has them."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights():
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def fetch(path: str) -> Path:
    """Where the model's safetensors files lie, on this machine from now on; PreflightError if it has none."""
    if not Path(path).expanduser().is_dir():
        from huggingface_hub import snapshot_download

        snapshot_download(path, allow_patterns=["*.json", "model*.safetensors"])
    place = safetensors_header.model_folder(path)
    if not place or not safetensors_header.weight_files(place):
        raise PreflightError(
            f"model.path={path} has no safetensors files, or not all of them: learner.zero_stage=3 compares "
            "shapes in them: save the model as such, or set learner.zero_stage=2"
        )
    return place


def wrong_shapes(model: Any, place: Path) -> list[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Parameters that the safetensors files of `place` have in another shape: name, theirs, the model's."""
    stored = safetensors_header.tensor_shapes(place)
    names = families.file_names(model, stored.keys())
    pairs = [
        (n, tuple(stored[s]), tuple(model.get_parameter(n).shape)) for n, s in names.items() if s in stored
    ]
    return sorted(pair for pair in pairs if pair[1] != pair[2])


def untie(config: Any, model: Any, place: Path) -> None:
    """Have `config` tie no head that the files hold beside an embedding from which it differs."""
    for pair in model.all_tied_weights_keys.items():
        found = [tensor for _, tensor in tensors_besides(place, pair)]
        if len(found) == 2 and not torch.equal(*found):
            families.text_config(config).tie_word_embeddings = config.tie_word_embeddings = False


def restore_buffers(model: nn.Module, whole: Any) -> None:
    """Give `model` the buffers of `whole` that are computed, not read from files."""
    for name, buffer in whole.named_non_persistent_buffers():
        owner, _, own = name.rpartition(".")
        device = model.get_buffer(name).device
        model.get_submodule(owner).register_buffer(own, buffer.to(device), persistent=False)
