"""Low-rank adapters (LoRA, Hu et al. 2021) by peft: y = W x + scale B A x, where A and B alone are trained.

They have the data type of the weights they stand beside, as DeepSpeed and vLLM hold them: what is trained is
what is served. The optimizer sums in float32.
"""

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from entroray.config import Lora
from entroray.errors import PreflightError, nearest
from entroray.policy.model import Layout, Policy

ALL = "all-linear"
"""Value of `learner.lora.targets`: every matrix but the head."""
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NAME = "default"
"""What peft calls an adapter that nobody named."""


def find_targets(model: Any, targets: Sequence[str], rank: int = 0) -> list[str]:
    """Last names of the matrices that get an adapter; PreflightError for one that is none, or the head, or
    has no more columns than `rank`.
    """
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    found = {
        name.rpartition(".")[2]: module.in_features if isinstance(module, nn.Linear) else module.nx
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }
    chosen = sorted(found if list(targets) == [ALL] else set(targets))
    for name in chosen:
        if name not in found:
            raise PreflightError(
                f"learner.lora.targets={list(targets)}: {name} is no matrix within the layers of "
                f"{type(model).__name__}, and neither head nor embedding can have an adapter: "
                f"{nearest(name, found)}, or take {ALL}"
            )
        if rank >= found[name]:
            raise PreflightError(
                f"learner.lora.rank={rank} is not low: {name} has {found[name]} columns. Lower it, or set "
                "learner.lora.rank=0, which trains all weights"
            )
    return chosen


def add_adapter(policy: Policy, lora: Lora, seed: int) -> None:
    """Give a `Policy` an adapter and freeze all else; B is 0, so that it computes what it did.

    A is the same on all ranks and at every stage of ZeRO. PreflightError for targets that it has not.
    """
    from peft import LoraConfig, inject_adapter_in_model

    model, stored = policy.model, policy.names
    alpha: Any = 2 * lora.rank if lora.alpha is None else lora.alpha  # any number, whatever peft's type says
    with torch.random.fork_rng(devices=[]):  # A is drawn on the CPU, whatever the device
        torch.manual_seed(seed)
        policy.adapter = LoraConfig(
            r=lora.rank,
            lora_alpha=alpha,
            lora_dropout=0.0,
            target_modules=find_targets(model, lora.targets, lora.rank),
            task_type="CAUSAL_LM",
        )
        inject_adapter_in_model(policy.adapter, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_is_adapters(name))
    every = model.named_parameters(remove_duplicate=False)  # a tied head has two names
    moved = {name.replace(".base_layer.", "."): name for name, _ in every}
    policy.names = {moved[name]: of_files for name, of_files in stored.items()}


def _is_adapters(name: str) -> bool:
    return ".lora_" in name


@dataclass(frozen=True)
class Outgoing:
    """Weights on their way out of a learner: to engines, or into files."""

    policy: Policy
    named: list[tuple[str, nn.Parameter]]
    backend: Any
    """What makes them whole."""
    adapter: dict[str, Any]
    """What peft's files say of an adapter that goes alone."""

    def write(self, folder: Path, gathered: Iterable[tuple[str, Tensor]]) -> None:
        """The model's folder, or the adapter's."""
        if self.adapter:
            write_adapter(folder, self.adapter, gathered)
        else:
            self.policy.write(folder, gathered)


def outgoing(policy: Policy, backend: Any, base: str | None) -> Outgoing:
    """All weights, an adapter merged into them; or the adapter of the model at `base` alone."""
    if base is not None:
        return Outgoing(policy, _adapter_weights(policy), backend, _describe(policy, base))
    whole = backend if policy.adapter is None else _Merging(policy, backend)
    return Outgoing(policy, policy.named_weights(), whole, {})


def _adapter_weights(policy: Policy) -> list[tuple[str, nn.Parameter]]:
    """A and B of every matrix by the names of peft's files."""
    own = [(name, p) for name, p in policy.model.named_parameters() if _is_adapters(name)]
    return [(f"base_model.model.{name.replace(f'.{_NAME}.', '.')}", p) for name, p in own]


def _describe(policy: Policy, base: str) -> dict[str, Any]:
    """What peft and vLLM read in `adapter_config.json`; `base` is the model's folder or hub id."""
    base = str(Path(base).resolve()) if Path(base).is_dir() else base
    config = policy.adapter.to_dict() | {"base_model_name_or_path": base, "inference_mode": True}
    return {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}


def write_adapter(folder: Path, config: dict[str, Any], weights: Iterable[tuple[str, Tensor]]) -> None:
    """An adapter's folder, as `peft.PeftModel.from_pretrained` and vLLM read it."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: t.cpu().contiguous() for name, t in weights}, folder / WEIGHTS, {"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2, default=str) + "\n", encoding="utf-8")
    shutil.copymode(folder / CONFIG, folder / WEIGHTS)  # safetensors gives 0600


def read_config(folder: str) -> dict[str, Any] | None:
    """The `adapter_config.json` of a folder, None if it has none; PreflightError if it is damaged."""
    file = Path(folder, CONFIG)
    if not file.is_file():
        return None
    try:
        found: dict[str, Any] = json.loads(file.read_bytes())
        return {"r": found["r"], "base_model_name_or_path": found["base_model_name_or_path"]} | found
    except (ValueError, KeyError, TypeError) as error:
        raise PreflightError(
            f"{file} does not say rank and base of an adapter: export it again, with "
            "learner.lora.export=merged for a model that needs no base"
        ) from error


def base_of(model: str) -> str:
    """The model that an adapter's folder is of; any other model itself."""
    config = read_config(model)
    return str(config["base_model_name_or_path"]) if config else model


class _Merging:
    """Gathers parameters as a backend does, weights with their adapter in them: engines know no other."""

    def __init__(self, policy: Policy, backend: Any):
        self.backend = backend
        layers = [m for m in policy.model.modules() if hasattr(m, "lora_A")]
        self.layers = {id(layer.base_layer.weight): layer for layer in layers}

    def full_shape(self, parameter: nn.Parameter) -> tuple[int, ...]:
        return self.backend.full_shape(parameter)

    @torch.no_grad()
    def gather(self, parameter: nn.Parameter) -> Tensor:
        """W + scale B A in float32, then in W's data type; W itself stays. All ranks must call."""
        weight, layer = self.backend.gather(parameter), self.layers.get(id(parameter))
        if layer is None:
            return weight
        a, b = (self.backend.gather(part[_NAME].weight).float() for part in (layer.lora_A, layer.lora_B))
        change = layer.scaling[_NAME] * (b @ a)
        return (weight.float() + (change.T if layer.fan_in_fan_out else change)).to(weight.dtype)


class BasePolicy:
    """The policy that a backend trains, with its adapter off: what was there before, not copied."""

    def __init__(self, backend: Any):
        self.backend = backend

    def forward(self, layout: Layout) -> dict[str, Tensor]:
        """What `Policy.forward` returns."""
        with _switched_off(self.backend.policy.model):
            return self.backend.forward(layout, ())

    def close(self) -> None:
        """The backend holds all there is."""


@contextmanager
def _switched_off(model: nn.Module) -> Iterator[None]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
