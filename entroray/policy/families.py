"""The one place that knows how families of models differ: body, head, what follows it, dropout, names.

Nothing is looked up by a family's name: what stands between a model's last hidden state and its logits is
measured, and names in files are those that transformers itself gives them.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from entroray.config import LearnerConfig
from entroray.errors import PreflightError, first_line
from entroray.policy.head import Readout
from entroray.policy.streamed_head import StreamedHead

_SMALL, _LARGE = 2.0**-30, 2.0**40
"""Logits at which c tanh(s x / c) is s x, and c, to the last bit of float64."""
_BETWEEN = (-50.0, -7.0, -_SMALL, 0.0, 0.5, 3.0, 20.0, 90.0)
"""Others, at which it is looked whether the model really does that."""
_WIDER_WINDOW = {"cohere2": (1, 0.033)}
"""By how many tokens vLLM 0.32's window is longer than transformers'; nats that log-probs were then off."""


def text_config(config: Any) -> Any:
    """The language model's part of a configuration that may describe images or sound too."""
    return config.get_text_config(decoder=True)


def attention(config: Any, asked: str) -> str:
    """The implementation that computes all of this model's attention: torch's own leaves out a softcap."""
    capped = getattr(text_config(config), "attn_logit_softcapping", None)
    return "eager" if capped and asked == "sdpa" else asked


def own_logits(model: Any, states: Tensor) -> Tensor:
    """Logits [b, T, V] that the model's own code makes of `states` [b, T, D], in their data type."""
    head, wide = model.get_output_embeddings(), states.dtype

    def plain(hidden: Tensor) -> Tensor:  # called as the head is, so that ZeRO 3 has gathered its weight
        bias = None if head.bias is None else head.bias.to(wide)
        return nn.functional.linear(hidden, head.weight.to(wide), bias)

    return _logits_between(model, states, plain)


def body(model: Any) -> nn.Module:
    """What makes hidden states of tokens, with every norm and projection before the head."""
    others = (model, model.get_output_embeddings())  # transformers takes these for it by their names
    found: tuple[Any, ...] = (model.get_decoder(), model.base_model, getattr(model, "model", None))
    return next(module for module in found if module not in others)


def stream_head(model: Any) -> Readout:
    """Put a `StreamedHead` where the model's head is; returns what is done to logits behind it.

    Raises PreflightError when the model has no head that is a matrix, or does something else to its logits.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        found = type(head).__name__ if head is not None else "none"
        raise PreflightError(
            f"{_called(model)}: its head is no matrix with or without a bias (it has {found}), so "
            "entropies over its vocabulary cannot be computed: take a causal language model"
        )
    readout = _measured(model, head)
    streamed = StreamedHead(head, readout)
    model.set_output_embeddings(streamed)
    if model.get_output_embeddings() is not streamed:
        raise PreflightError(f"{_called(model)}: its head cannot be replaced: take another model")
    return readout


def _measured(model: Any, head: nn.Linear) -> Readout:
    """What the model makes of hidden states and logits that are planted in it; no weight takes part."""
    wide: dict[str, Any] = {"dtype": torch.float64, "device": head.weight.device}
    states = (2.0 ** (torch.arange(head.in_features, **wide) % 4))[None, None]
    planted = torch.tensor([_SMALL, _LARGE, *_BETWEEN], **wide)
    taken: list[Tensor] = []

    def stand_in(hidden: Tensor) -> Tensor:
        taken.append(hidden)
        return planted[None, None]

    try:
        logits = _logits_between(model, states, stand_in).double().flatten()
        (entered,) = taken
        return _readout(states, entered.double(), planted, logits)
    except Exception as error:  # boundary: a model's own code may raise anything at what is planted
        raise PreflightError(
            f"{_called(model)}: what it does between its last hidden state and its logits is not a head, a "
            f"scale and a softcap ({first_line(error)}): entropies would be wrong; take another model"
        ) from error


def _logits_between(model: Any, states: Any, head: Callable[[Tensor], Tensor]) -> Tensor:
    """What the model gives with `states` as its last hidden states and `head` in the place of its head."""
    from transformers.modeling_outputs import BaseModelOutputWithPast

    class Planted(BaseModelOutputWithPast):
        def __getattr__(self, name: str) -> None:
            """Whatever else a body may give, as GPT-2's cross attentions: nothing."""

    made = lambda *_, **__: Planted(last_hidden_state=states)
    ids = torch.zeros(states.shape[:2], dtype=torch.long, device=states.device)
    with _forward_as(body(model), made), _forward_as(model.get_output_embeddings(), head):
        return model(input_ids=ids, use_cache=False).logits


def _called(model: Any) -> str:
    return f"model.path={model.name_or_path} ({type(model).__name__})"


@contextmanager
def _forward_as(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.forward


def _readout(states: Tensor, entered: Tensor, planted: Tensor, logits: Tensor) -> Readout:
    """From what was planted, the states that entered the head, and the logits that came out behind it."""
    factor = float(entered.flatten()[0] / states.flatten()[0])
    if entered.shape != states.shape or not torch.allclose(entered, states * factor, rtol=1e-6):
        raise ValueError("the head reads something else than the body's last hidden state")
    scale, large = float(logits[0]) / _SMALL, float(logits[1])
    scale = 1.0 if abs(scale - 1.0) < 1e-9 else scale
    softcap = None if abs(large - scale * _LARGE) <= 1e-6 * abs(large) else abs(large)
    wanted = planted * scale if softcap is None else softcap * (planted * scale / softcap).tanh()
    if not scale or not torch.allclose(logits, wanted, rtol=1e-6):
        raise ValueError(f"logits of {_BETWEEN[2:]} became {logits.tolist()[4:]}")
    return Readout(factor, scale, softcap)


def remove_dropout(model: Any) -> None:
    """Every rate of dropout becomes 0: what is scored, sampled and updated must be one distribution."""
    for owner in (model.config, text_config(model.config), *model.modules()):
        for name, value in list(vars(owner).items()):
            if "drop" in name and isinstance(value, float) and value:
                setattr(owner, name, 0.0)
        if isinstance(owner, nn.modules.dropout._DropoutNd):
            owner.p = 0.0


def enable_checkpointing(model: Any, learner: LearnerConfig) -> None:
    """Have activations computed twice, as these settings ask; PreflightError if transformers cannot."""
    if not learner.gradient_checkpointing:
        return
    if not model.supports_gradient_checkpointing:
        raise PreflightError(
            f"learner.gradient_checkpointing=true: {_called(model)} does not support it: set "
            "learner.gradient_checkpointing=false"
        )
    model.gradient_checkpointing_enable(
        every_n_layers=learner.gradient_checkpointing_every_n_layers,
        offload=learner.gradient_checkpointing_offload,
    )


def file_names(model: Any, stored: Collection[str]) -> dict[str, str]:
    """Each parameter once: its name in memory -> its name in files, of which `stored` has those there are.

    A parameter that none of the files has under any name is left out, a tied head goes as the embedding.
    """
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    found = {}
    for same in aliases.values():
        names = [(name, stem) for name in same for stem in _candidates(model, name)]
        known = [pair for pair in names if pair[1] in stored] if stored else names
        if known:
            found[known[0][0]] = known[0][1]
    return found


def known_names(model: Any) -> set[str]:
    """Every name that a file may have for a parameter, tied ones under all of theirs."""
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    return {stem for name in names for stem in _candidates(model, name)}


def joined_parameters(model: Any) -> list[str]:
    """Those that transformers makes of several tensors of the files."""
    return [name for name, _ in model.named_parameters() if not _written(model, name)]


def _candidates(model: Any, name: str) -> list[str]:
    """Names for a parameter in files: as transformers writes it, without the body's prefix, as it is."""
    written = _written(model, name)
    bare = [n.removeprefix(f"{model.base_model_prefix}.") for n in written]
    return list(dict.fromkeys([*written, *bare, name]))


def _written(model: Any, name: str) -> list[str]:
    from transformers.core_model_loading import revert_weight_conversion

    parameter = model.get_parameter(name)
    try:
        (there,) = revert_weight_conversion(model, {name: parameter}).items()
    except Exception:  # boundary: a conversion of several tensors has no use for one; it is no name
        return []
    same = there[1].shape == parameter.shape and there[1].data_ptr() == parameter.data_ptr()
    return [there[0]] if same else []


def check_window(config: Any, needed: int) -> None:
    """PreflightError when engines would attend to other tokens than the learner within `needed` tokens."""
    text = text_config(config)
    wider, nats = _WIDER_WINDOW.get(text.model_type, (0, 0.0))
    window = getattr(text, "sliding_window", None)
    if wider and window and needed > window:
        raise PreflightError(
            f"data.max_prompt + rollout.max_tokens = {needed} tokens, and {text.model_type} has a window of "
            f"{window}: vLLM's sees {wider} token more, which was {nats} nats off. Lower data.max_prompt or "
            f"rollout.max_tokens until both fit into {window}"
        )
