"""The policy as a module: causal LM in, token statistics of the response tokens out."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn

from entroray.errors import PreflightError
from entroray.policy import safetensors_header
from entroray.policy.head import StreamedHead
from entroray.types import Batch


@dataclass(frozen=True)
class Padded:
    """One micro-batch, right-padded: [b, T] ids, and where each of its n response tokens is predicted."""

    ids: Int[Tensor, "b T"]
    attention: Int[Tensor, "b T"]
    source: Int[Tensor, " n"]
    """Flat index into [b * T] of the state that predicts each response token: one before it."""
    targets: Int[Tensor, " n"]
    temperature: Tensor


def pad(batch: Batch, device: torch.device) -> Padded:
    """Lay a micro-batch out for the forward pass; the one place where positions shift by one."""
    total = batch.prompt_lengths + batch.response_lengths
    width = int(total.max())
    columns = np.arange(width)
    in_prompt = columns < batch.prompt_lengths[:, None]
    in_row = columns < total[:, None]
    ids = np.zeros((batch.num_rows, width), dtype=np.int64)
    ids[in_prompt] = batch.prompt_ids
    ids[in_row & ~in_prompt] = batch.response_ids
    source = np.flatnonzero(in_row & ~in_prompt) - 1
    on = lambda x: torch.from_numpy(x).to(device)
    return Padded(
        ids=on(ids),
        attention=on(in_row.astype(np.int64)),
        source=on(source),
        targets=on(batch.response_ids.astype(np.int64)),
        temperature=on(np.repeat(batch.temperatures, batch.response_lengths).astype(np.float32)),
    )


class Policy(nn.Module):
    """A Hugging Face causal LM whose head returns statistics, never logits."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model
        self.model.lm_head = StreamedHead(model.lm_head)

    def forward(self, micro: Padded, more: Sequence[str] = ()) -> dict[str, Tensor]:
        """`head.TokenStats` by name, and the further `policy.statistics` named in `more`."""
        states = self.model.model(input_ids=micro.ids, attention_mask=micro.attention, use_cache=False)
        hidden = states.last_hidden_state.flatten(0, 1)[micro.source]
        return self.model.lm_head(hidden, micro.targets, micro.temperature, more)


def load_policy(path: str, dtype: torch.dtype, attention: str = "sdpa") -> Policy:
    """The model at a Hugging Face folder or hub id.

    Raises PreflightError when there is none, when its head is not a plain matrix, or when its files know
    its parameters under other names.
    """
    if path.startswith(("/", ".")) and not Path(path, "config.json").is_file():
        raise PreflightError(
            f"model.path={path} has no config.json: give a Hugging Face model folder or hub id"
        )
    from transformers import AutoModelForCausalLM  # a second of imports, and only ranks need it

    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=attention)
    if getattr(model, "lm_head", None) is None or getattr(model.config, "final_logit_softcapping", None):
        raise PreflightError(
            f"model.path={path} ({type(model).__name__}) has no plain `lm_head`: exact entropies need one"
        )
    if model.lm_head.bias is not None:
        raise PreflightError(
            f"model.path={path} ({type(model).__name__}) has an `lm_head.bias`, which would be left "
            "out of every log-prob and entropy: take a model whose `lm_head` is a weight alone"
        )
    _check_names(path, model)
    return Policy(model)


def _check_names(path: str, model: nn.Module) -> None:
    """Weights are sent and exported under the module's names, which engines know from the files."""
    place = safetensors_header.model_folder(path)
    known = safetensors_header.tensor_shapes(place) if place else {}
    new = [name for name, _ in model.named_parameters() if name not in known]  # a tied head is the embedding
    if known and new:
        raise PreflightError(
            f"model.path={path} ({type(model).__name__}): transformers has {len(new)} parameters under names "
            f"that the safetensors files do not have, first {new[0]} (as where it joins experts into one): "
            "engines would not know them when weights are sent. Take a model whose names agree, a dense one"
        )
