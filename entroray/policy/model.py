"""The policy as a module: causal LM in, token statistics of the response tokens out."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor, nn

from entroray.errors import PreflightError, first_line
from entroray.kept_sets import KeptSets
from entroray.policy import divided, families, safetensors_header
from entroray.policy.model_files import read_texts, tensors_besides, write_model
from entroray.types import Batch

_ONE = np.ones(1, dtype=np.int32)
EMPTY = Batch(_ONE, _ONE, _ONE, _ONE, np.ones(1, dtype=np.float32))
"""One row of one token, which a rank with fewer micro-batches than others forwards with weight 0."""


def or_empty(batch: Batch) -> Batch:
    """The batch, or `EMPTY` for none, through the head as others of the step."""
    alone = batch.kept and KeptSets.of([1], [_ONE])
    return batch if batch.num_rows else replace(EMPTY, kept=alone)


@dataclass(frozen=True)
class Layout:
    """One micro-batch as the body reads it, and where each of its n response tokens is predicted."""

    ids: Int[Tensor, "b T"]
    """Rows side by side, padded on the right; or end to end (`packing.pack`), with b = 1."""
    source: Int[Tensor, " n"]
    """Flat index into [b * T] of the state that predicts each response token: one before it."""
    targets: Int[Tensor, " n"]
    temperature: Tensor
    further: Mapping[str, Any]
    """What else the body is called with."""
    kept: KeptSets | None
    """The set that each response token was drawn from; None: the vocabulary."""


def pad(batch: Batch, device: torch.device) -> Layout:
    """Lay a micro-batch out for the forward pass, a row of ids for each of its own."""
    total = batch.prompt_lengths + batch.response_lengths
    columns = np.arange(int(total.max()))
    in_prompt = columns < batch.prompt_lengths[:, None]
    in_row = columns < total[:, None]
    # No mask of padding: it is on the right, where a causal model's response tokens do not look, and a
    # mask costs torch its causal kernel.
    return lay_out(batch, in_prompt, in_row & ~in_prompt, {}, device)


def lay_out(
    batch: Batch, in_prompt: NDArray, in_response: NDArray, further: Mapping[str, Any], device: torch.device
) -> Layout:
    """Tokens at their places [b, T]; the one where positions shift by one."""
    ids = np.zeros(in_prompt.shape, dtype=np.int64)
    ids[in_prompt] = batch.prompt_ids
    ids[in_response] = batch.response_ids
    on = lambda x: torch.from_numpy(x).to(device)
    return Layout(
        ids=on(ids),
        source=on(np.flatnonzero(in_response) - 1),
        targets=on(batch.response_ids.astype(np.int64)),
        temperature=on(np.repeat(batch.temperatures, batch.response_lengths).astype(np.float32)),
        further=further,
        kept=batch.kept,
    )


class Policy(nn.Module):
    """A Hugging Face causal LM whose head returns statistics, never logits."""

    def __init__(self, model: Any, source: Path | None = None):
        """`source` is the folder it was read from; PreflightError if its head cannot be streamed."""
        super().__init__()
        self.model = model
        self.source, self.texts = source, read_texts(source)
        self.stored = frozenset(safetensors_header.tensor_shapes(source)) if source else frozenset()
        """Names of the tensors in its safetensors files, if it has any."""
        self.names = families.file_names(model, self.stored)
        """Name of each parameter in memory -> its name in the model's files."""
        self.besides = self.stored - families.known_names(model)
        """Names of tensors that a language model has not, such as those for images."""
        self.adapter: Any = None
        """peft's configuration of the adapter that is trained in the weights' place (`lora.add_adapter`)."""
        families.remove_dropout(model)
        self.readout = families.stream_head(model)

    def forward(self, micro: Layout, more: Sequence[str] = ()) -> dict[str, Tensor]:
        """`head.TokenStats` by name, and the further `policy.statistics` named in `more`."""
        states = families.body(self.model)(input_ids=micro.ids, use_cache=False, **micro.further)
        hidden = states.last_hidden_state.flatten(0, 1)[micro.source]
        return self.model.get_output_embeddings()(hidden, micro.targets, micro.temperature, more, micro.kept)

    def train(self, mode: bool = True) -> Self:
        """Train mode where layers need it to be checkpointed; a policy draws nothing at random in either."""
        return super().train(mode and self.model.is_gradient_checkpointing)

    def named_weights(self) -> list[tuple[str, nn.Parameter]]:
        """Parameters by the names of the model's files; a tied head is listed once, as the embedding."""
        return [(stored, self.model.get_parameter(name)) for name, stored in self.names.items()]

    def write(self, folder: Path, weights: Iterable[tuple[str, Tensor]]) -> None:
        """The model's folder as it was read, with `weights` by `named_weights`' names in place of its own.

        Tensors that a language model has not, such as those for images, go with it. No more of them are held
        than go into one file.
        """
        whole = chain(tensors_besides(self.source, self.besides), weights)
        write_model(folder, self.model, whole, self.texts)


def load_policy(
    path: str,
    dtype: torch.dtype,
    attention: str = "sdpa",
    division: AbstractContextManager[None] | None = None,
) -> Policy:
    """The model at a Hugging Face folder or hub id; with `division`, ranks divide it while it is read.

    Raises PreflightError when there is none, when its head is no matrix, or when its files lack a parameter.
    """
    if path.startswith(("/", ".")) and not Path(path, "config.json").is_file():
        raise PreflightError(
            f"model.path={path} has no config.json: give a Hugging Face model folder or hub id"
        )
    from transformers import AutoConfig, AutoModelForCausalLM  # a second of imports, and only ranks need it

    try:
        config, whole = AutoConfig.from_pretrained(path, trust_remote_code=False), None
        if division:
            whole, place = divided.outline(config, dtype), divided.fetch(path)
            _check_shapes(path, whole, divided.wrong_shapes(whole, place))  # on every rank, before they join
            divided.untie(config, whole, place)
        with division or nullcontext():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path,
                config=config,
                dtype=dtype,
                attn_implementation=families.attention(config, attention),
                output_loading_info=True,
                trust_remote_code=False,  # nor does it ask at the terminal then
                ignore_mismatched_sizes=True,  # told apart below, by name
            )
    except PreflightError:
        raise
    except Exception as error:  # boundary: transformers raises whatever it meets in the files
        raise PreflightError(f"model.path={path} cannot be loaded: {first_line(error)}") from error
    model, read = loaded
    _check_shapes(path, model, sorted(read["mismatched_keys"]))
    if whole is not None:
        divided.restore_buffers(model, whole)
    policy = Policy(model, safetensors_header.model_folder(path))
    _check_names(path, policy, read["missing_keys"])
    return policy


def _check_shapes(path: str, model: Any, wrong: Sequence[tuple[str, Sequence[int], Sequence[int]]]) -> None:
    if wrong:
        name, stored, wanted = wrong[0]
        raise PreflightError(
            f"model.path={path} ({type(model).__name__}): {len(wrong)} tensors of its files have another "
            f"shape than its config.json, first {name}: {tuple(stored)}, not {tuple(wanted)}. Take the "
            "config.json that belongs to the files"
        )


def _check_names(path: str, policy: Policy, missing: Collection[str]) -> None:
    """Every parameter was read, and has a name of its files, under which engines know it."""
    sent = {id(parameter) for _, parameter in policy.named_weights()}  # a tied head is the embedding
    read = lambda name, parameter: name not in missing and id(parameter) in sent
    new = [name for name, parameter in policy.model.named_parameters() if not read(name, parameter)]
    if new:
        raise PreflightError(
            f"model.path={path} ({type(policy.model).__name__}): transformers has {len(new)} parameters that "
            f"the safetensors files have under no name, first {new[0]}: they would begin at random, or "
            "engines would not know them when weights are sent (as where transformers joins experts into "
            "one). Take a model whose files hold each of its parameters, a dense one"
        )
