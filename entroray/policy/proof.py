"""Proof in place of trust: the learner's log-probs against those of the model's own logits."""

import re
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from entroray.errors import EntrorayError, PreflightError, first_line
from entroray.policy import families, lora, packing
from entroray.policy.model import Layout, Policy, pad
from entroray.policy.small_copy import VOCABULARY, WINDOW, build_small_copy
from entroray.types import Batch

TOLERANCE = 1e-3
"""Nats that two float32 computations of one log-prob may be apart."""
SERVED_WORDS = 258_048
"""Most tokens of a vocabulary that vLLM 0.32 serves with adapters."""
LENGTHS = (3 * WINDOW, 2 * WINDOW + 1)
"""Of the texts that a small copy is tried on: longer than its window, and padded."""


def check_architecture(path: str, config: Any, attention: str = "sdpa", targets: Sequence[str] = ()) -> str:
    """What was found of the model's kind and `model.attention`, before any of its weights is read.

    Raises PreflightError when transformers or vLLM have no such language model, when none of its matrices
    has the name of one of LoRA's `targets`, or when the learner's log-probs of a small copy are more than
    `TOLERANCE` from those of its logits.
    """
    name = _model_class(path, config).__name__
    try:
        model = build_small_copy(families.text_config(config))
        own = own_statistics(model)
    except Exception as error:  # boundary: a family may have sizes that fit only each other
        return f"{name} not tried small ({first_line(error)})"
    if joined := families.joined_parameters(model):
        raise PreflightError(
            f"model.path={path} ({name}): transformers joins tensors of its files into one, first "
            f"{joined[0]}, as those of experts: engines would not know them when weights are sent. "
            "Take a dense model"
        )
    if targets:
        lora.find_targets(model, targets)
    try:
        if attention == "sdpa":  # others may need a card; the copy was built with the model's own code
            model.set_attn_implementation(families.attention(config, attention))
        gap = learner_gap(model, own)
    except EntrorayError:
        raise
    except Exception as error:  # boundary: the model's own code, called as the learner calls it
        raise PreflightError(
            f"model.path={path} ({name}): a small copy cannot be trained with model.attention={attention}: "
            f"{first_line(error)}. Set model.attention=eager, or take another model"
        ) from error
    if not gap <= TOLERANCE:
        raise PreflightError(_apart(path, name, gap, "of a small random copy"))
    return f"{name}, head {gap:.0e} nats off"


def why_not_packed(path: str, attention: str, dtype: torch.dtype, device: torch.device) -> str:
    """Why a learner on `device` cannot lay rows of this model end to end; empty if it can.

    A small copy shows whether layers keep rows apart, as convolutions and recurrences do not; the kernel is
    tried on the device itself.
    """
    if attention != "sdpa":
        return f"model.attention={attention}"
    if device.type == "cuda" and dtype == torch.float32:
        return "model.dtype=float32, and the kernel computes in 16 bits"
    from transformers import AutoConfig

    try:
        text = families.text_config(AutoConfig.from_pretrained(path, trust_remote_code=False))
        if device.type == "cuda":
            packing.check_kernel(text, dtype, device)
        model = build_small_copy(text)
        own = own_statistics(model)
        packing.enable_packing(model)
        gap = learner_gap(model, own, packing.pack)
    except Exception as error:  # boundary: a model's own code, and a kernel on a card it may not know
        return first_line(error)
    return "" if gap <= TOLERANCE else f"its layers do not keep rows apart: {gap:.2g} nats in a small copy"


@torch.no_grad()
def own_statistics(model: Any) -> Float[Tensor, "2 n"]:
    """Log-probs of the tokens of some texts but their first, and entropies, by a small copy's own logits."""
    found = []
    for ids in _texts():
        logp = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float().log_softmax(-1)
        found.append(torch.stack([logp.gather(-1, ids[1:, None])[:, 0], -(logp.exp() * logp).sum(-1)]))
    return torch.cat(found, -1)


@torch.no_grad()
def learner_gap(
    model: Any, own: Float[Tensor, "2 n"], lay: Callable[[Batch, torch.device], Layout] = pad
) -> float:
    """Largest difference (nats) from `own` of the same statistics as a learner that trains `model` has them.

    The model is used up: its head returns no logits any more.
    """
    stats = Policy(model).train()(lay(_batch(_texts()), torch.device("cpu")))
    return _gap(torch.stack([stats["logprobs"], stats["entropy"]]), own)


def _texts() -> list[Tensor]:
    return [torch.arange(n) * 37 % (VOCABULARY - 2) + 2 for n in LENGTHS]


@torch.no_grad()
def check_loaded(path: str, policy: Policy) -> float:
    """Largest difference (nats) of the head's log-probs of some tokens from the model's own, in float32.

    Both start from the same hidden states of the model. Raises PreflightError above `TOLERANCE`. Where ranks
    divide the weights, they all call it, before the first forward pass.
    """
    model, head = policy.model, policy.model.get_output_embeddings()
    vocabulary = getattr(head.weight, "ds_shape", head.weight.shape)[0]
    ids = torch.linspace(0, vocabulary - 1, 9, device=head.weight.device).long()
    states = families.body(model)(input_ids=ids[None, :-1], use_cache=False).last_hidden_state.float()
    own = families.own_logits(model, states)[0].log_softmax(-1)
    targets = torch.stack([ids[1:], own.argmax(-1)])
    one = torch.ones(targets.numel(), device=ids.device)
    found = head(states[0].repeat(2, 1), targets.flatten(), one)["logprobs"]
    gap = _gap(found, own.repeat(2, 1).gather(-1, targets.flatten()[:, None])[:, 0])
    if not gap <= TOLERANCE:
        raise PreflightError(_apart(path, type(model).__name__, gap, "of eight of its tokens"))
    return gap


def _batch(rows: list[Tensor]) -> Batch:
    """Texts of which all but the first token is the response."""
    prompts, responses = [r[:1].numpy() for r in rows], [r[1:].numpy() for r in rows]
    flat = lambda parts: np.concatenate(parts).astype(np.int32)
    sizes = lambda parts: np.array([len(p) for p in parts], dtype=np.int32)
    hot = np.ones(len(rows), dtype=np.float32)
    return Batch(flat(prompts), sizes(prompts), flat(responses), sizes(responses), hot)


def _gap(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max())


def _apart(path: str, name: str, gap: float, where: str) -> str:
    return (
        f"model.path={path} ({name}): the learner's log-probs {where} are {gap:.2g} nats from those of the "
        f"model's own logits, {TOLERANCE:g} allowed: it does more to its logits than a head, a scale and a "
        "softcap, or this attention leaves something out. Set model.attention=eager, or take another model"
    )


def _model_class(path: str, config: Any) -> Any:
    """The class that is trained; PreflightError when there is none that learner and engines both have."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    classes: Any = MODEL_FOR_CAUSAL_LM_MAPPING
    text, found = families.text_config(config), classes.get(type(config), None)
    name = (config.architectures or [getattr(found, "__name__", config.model_type)])[0]
    alone = getattr(classes.get(type(text), None), "__name__", "a text model")
    composite = type(text) is not type(config)
    if composite and (found is None or found.config_class is type(config)):
        raise PreflightError(
            f"model.path={path} ({name}) is a composite checkpoint, and only a text model is trained: save "
            f"its text part alone, as {alone}, and give that folder"
        )
    if found is None:
        raise PreflightError(
            f"model.path={path} ({name}): transformers has no causal language model of this kind: take one "
            "that AutoModelForCausalLM loads"
        )
    if composite and find_spec("torchvision") is None:
        raise PreflightError(
            f"model.path={path} ({name}) is a composite checkpoint, which vLLM serves with torchvision "
            f"alone, and that is not installed: save its text part alone, as {alone}, and give that "
            "folder, or install torchvision beside CUDA"
        )
    if getattr(config, "quantization_config", None):
        raise PreflightError(
            f"model.path={path} ({name}) is quantised, and such weights are not trained: take the "
            "checkpoint that it was made from"
        )
    if not _engines_know(name, found):
        raise PreflightError(
            f"model.path={path} ({name}): vLLM has not this architecture and does not take transformers' "
            "class of it either: take a model that vLLM serves"
        )
    return found


def _engines_know(architecture: str, model_class: Any) -> bool:
    """Whether vLLM has this architecture, or would take transformers' class; it is not imported."""
    served = _engine_source("registry").partition("_PREVIOUSLY_SUPPORTED_MODELS =")[0]
    return not served or f'"{architecture}"' in served or bool(model_class.is_backend_compatible())


def _engine_source(module: str) -> str:
    """The text of a module of vLLM's models; empty without vLLM."""
    place = find_spec("vllm")
    folders = (place.submodule_search_locations if place else None) or ()
    files = [Path(folder, f"model_executor/models/{module}.py") for folder in folders]
    return "".join(file.read_text() for file in files if file.is_file())


def check_adapters_served(path: str, config: Any) -> None:
    """PreflightError when vLLM has a class of its own for this architecture, which takes no adapters.

    And for a larger vocabulary than its `LogitsProcessorWithLoRA` takes.
    """
    name, words = (config.architectures or [""])[0], families.text_config(config).vocab_size
    if words > SERVED_WORDS:
        raise PreflightError(
            f"generator.transfer=adapter: vLLM serves no adapters beside {words:,} tokens (model.path="
            f"{path}), {SERVED_WORDS:,} at most: set generator.transfer=plasma, which sends merged weights"
        )
    known = re.search(rf'"{name}": *\(\s*"(\w+)",\s*"(\w+)"', _engine_source("registry"))
    if known and _engine_source(known[1]) and not _takes_adapters(known[1], known[2]):
        raise PreflightError(
            f"generator.transfer=adapter: vLLM serves no adapters of {name} (model.path={path}): set "
            "generator.transfer=plasma, which sends merged weights"
        )


def _takes_adapters(module: str, name: str) -> bool:
    """Whether a class of vLLM's models, or one that it is made of, is marked as taking LoRA."""
    text = _engine_source(module)
    bases = re.search(rf"^class {name}\(([^)]*)\)", text, re.MULTILINE)
    named = set(re.findall(r"\w+", bases[1])) - {name} if bases else set()
    imports = re.findall(r"^from \S*\.(\w+) import (\([^)]*\)|.*)$", text, re.MULTILINE)
    origins = {base: origin for origin, names in imports for base in named & set(re.findall(r"\w+", names))}
    return "SupportsLoRA" in named or any(_takes_adapters(origins.get(b, module), b) for b in named)
