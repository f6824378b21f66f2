"""What can be known to be wrong before any actor starts: one function a check, none of them touches Ray."""

import os
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from entroray import installation
from entroray.binding import effective_settings, function_name, traits
from entroray.config import TINY, Config, share_cards
from entroray.engine.adapter import ADAPTER
from entroray.errors import EntrorayError, PreflightError, first_line, free_bytes
from entroray.planning.deadlines import CHECKPOINT
from entroray.policy import families, lora, proof
from entroray.policy.safetensors_header import tensor_shapes
from entroray.policy.tokenizer import end_ids, token_name
from entroray.wiring import actors, dataset, memory, run_directory, tool, warm_start
from entroray.wiring.parts import build_parts
from entroray.wiring.sampler import describe_sets, insert_token
from entroray.workers import nodes

Check = Callable[[Config], str]
"""Says what it found; raises a typed error with the remedy when that will not do."""


PLASMA = 2e9
"""Bytes of weights that `generator.transfer=plasma` may take to GPUs."""
SHARED = 256 << 20
"""Bytes of /dev/shm below which a run gets stuck in Ray's object store; a container has 64 MiB by default."""


@dataclass(frozen=True)
class Finding:
    """What a check said, and whether it was satisfied."""

    name: str
    said: str
    wrong: EntrorayError | None = None


def run_checks(config: Config, checks: Iterable[Check]) -> list[Finding]:
    """Every check, whatever the others say."""
    return [_ask(check, config) for check in checks]


def _ask(check: Check, config: Config) -> Finding:
    try:
        return Finding(check.__name__, check(config))
    except EntrorayError as error:
        return Finding(check.__name__, str(error), error)


def refuse_wrong(config: Config) -> None:
    """Raise what the fast checks find wrong: the error itself when it is one, else all in one."""
    wrong = {f.said: f.wrong for f in run_checks(config, FAST) if f.wrong}  # two may find the same
    if len(wrong) == 1:
        raise next(iter(wrong.values()))
    if wrong:
        raise PreflightError("\n  ".join([f"{len(wrong)} things are wrong:", *wrong]))


def model(config: Config) -> str:
    """Weights, tokenizer, chat template, vocabulary and context fit each other and what is asked."""
    needed = actors.sequence_length(config)
    if config.model.path == TINY and Path(TINY, "config.json").is_file():
        raise PreflightError(
            f"model.path={TINY} is the built-in model, and a model is in the folder {TINY}/ here: set "
            f"model.path=./{TINY} for the folder, or start elsewhere for the built-in one"
        )
    if warm_start.is_missing(config):
        context = config.model.warm_start.size["max_position_embeddings"]
        return _context(config, context, "the tiny model, not made yet")
    path = warm_start.resolve_model(config)
    if found := lora.read_config(path):
        raise PreflightError(
            f"model.path={path} is an adapter of {found['base_model_name_or_path']}: train that with "
            "learner=lora, or the model that learner.lora.export=merged writes"
        )
    from transformers import AutoConfig

    try:
        described = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # boundary: a config.json is anyone's, and transformers raises what it meets
        raise PreflightError(
            f"model.path={path} is no model: {first_line(error).rstrip('.')}. Give a Hugging Face folder "
            "with a config.json, or a hub id where a hub is reachable"
        ) from error
    _check_weights(path)
    targets = config.learner.lora.targets if config.learner.lora.rank else ()
    said = proof.check_architecture(path, described, config.model.attention, targets)
    if config.generator.transfer == ADAPTER:
        proof.check_adapters_served(path, described)
    text, words = families.text_config(described), len(warm_start.run_tokenizer(config))
    if words > text.vocab_size:
        raise PreflightError(
            f"the tokenizer of model.path={path} knows {words} tokens and the model {text.vocab_size}: "
            "they are not a pair; resize the model's embeddings, or give the tokenizer it was trained with"
        )
    families.check_window(described, needed)
    fits = _context(config, getattr(text, "max_position_embeddings", needed), path)
    return f"{fits}; {said}"


def _check_weights(path: str) -> None:
    """PreflightError for a folder here whose weights are missing, cut short or something else."""
    place = Path(path).expanduser()
    if not place.is_dir() or tensor_shapes(place) or any(place.glob("*.bin")):
        return
    raise PreflightError(
        f"model.path={path} has a config.json and no whole set of weights (model.safetensors, or every file "
        "of its index): download it again"
    )


def _context(config: Config, context: int, name: str) -> str:
    needed, (_, longest) = actors.sequence_length(config), actors.longest_response(config)
    if needed > context:
        raise PreflightError(
            f"data.max_prompt + {longest} = {needed} tokens, and {name} reads at most {context}: "
            "lower one of them, or take a model with a longer context"
        )
    return f"{name}; {needed} tokens asked of a context of {context}"


def resources(config: Config) -> str:
    """CPUs and GPUs of this machine against what every role asks; a cluster's are asked of the cluster."""
    if config.cluster.address:
        return f"to be asked of the cluster at {config.cluster.address}"
    if actors.cpu_only(config.cluster):
        installation.check_cpu_build(cards=torch.cuda.is_available())
    else:
        memory.check_driver(memory.cards_here())  # else torch alone says that it sees none
    actors.check_gpus(config.cluster)
    if config.learner.liger and not find_spec("liger_kernel"):
        raise PreflightError(
            f"learner.liger=true needs liger-kernel: {installation.install_line('liger')}, or set "
            "learner.liger=false"
        )
    _refuse_expandable(config)
    here, pairs = [nodes.this_machine()], share_cards(config.cluster)
    rows = nodes.check_resources(actors.resource_shares(config), here, pairs=pairs)
    return "; ".join([rows, *actors.placement_lines(config)])


def _refuse_expandable(config: Config) -> None:
    """PreflightError for memory that another process may open only where the kernel lets it take files."""
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        told = os.environ.get(name, "")
        if config.generator.transfer == "ipc" and re.search(r"expandable_segments:\s*(true|1)", told, re.I):
            raise PreflightError(
                f"generator.transfer=ipc shares memory of a card, and {name}={told} makes it of parts that "
                "another process opens by pidfd_getfd, which containers forbid: drop expandable_segments, "
                "or set generator.transfer=plasma"
            )


def transfer(config: Config) -> str:
    """Weights go to cards by another way than the host's memory, unless they are small and undivided."""
    g = config.generator
    count = _of_model(config, memory.parameter_count) or 0
    size = count * memory.BYTES[config.model.dtype]
    on_cards, shared = not actors.cpu_only(config.cluster), 0 < config.cluster.gpus_per_generator < 1
    if g.transfer == "plasma" and on_cards and (size > PLASMA or g.tensor_parallel > 1):
        why = (
            f"{size / 1e9:.1f} GB of weights"
            if size > PLASMA
            else f"{g.tensor_parallel} shards of each engine"
        )
        raise PreflightError(
            f"generator.transfer=plasma takes weights through the host's memory, with a copy for each shard, "
            f"too slow for {why} ({PLASMA / 1e9:.0f} GB and generator.tensor_parallel=1 are the most): set "
            f"generator.transfer={'ipc' if shared else 'nccl'}"
        )
    return f"{g.transfer}, {size / 1e9:.3g} GB" if size else g.transfer


def disk(config: Config) -> str:
    """Room for the checkpoints kept, the one being written, and the exported model."""
    place = _existing(run_directory.place(config.run.dir or "runs"))
    free = free_bytes(place)
    count = _of_model(config, memory.parameter_count)
    if count is None:
        return f"{free / 2**30:.1f} GiB free at {place}; the model's size is unknown"
    low = config.learner.lora
    trained = memory.adapter_size(config) if low.rank else count
    alone = bool(low.rank) and low.export == "adapter"
    each = trained * CHECKPOINT
    exported = (trained if alone else count) * memory.BYTES[config.model.dtype]
    need = each * (config.checkpoint.keep + 2) + exported
    if need > free:
        raise PreflightError(
            f"{place} has {free / 2**30:.1f} GiB free and the run may need {need / 2**30:.1f}: "
            f"checkpoint.keep={config.checkpoint.keep} + 2 of {each / 2**30:.2f} GiB each and the exported "
            "model. Lower checkpoint.keep, or put run.dir on a larger disk"
        )
    return f"{free / 2**30:.1f} GiB free at {place}, at most {need / 2**30:.2f} needed"


def _of_model(config: Config, read: Callable[[Config], Any]) -> Any:
    """What `read` finds of the model; None for what is not here, and for no model, which `model` refuses."""
    try:
        return read(config)
    except EntrorayError:
        raise
    except Exception:  # boundary: as in `model`, which says what is wrong
        return None


def _existing(folder: Path) -> Path:
    return next(p for p in (folder.resolve(), *folder.resolve().parents) if p.is_dir())


def shared_memory(_: Config) -> str:
    """Room for Ray's objects, of which containers are given little."""
    place = Path("/dev/shm")
    free = shutil.disk_usage(place).free if place.is_dir() else SHARED
    if free < SHARED:
        raise PreflightError(
            f"{place} has {free >> 20} MiB free and Ray's objects need {SHARED >> 20}: free some, or start "
            "the container with --shm-size=2g"
        )
    return f"{free / 2**30:.1f} GiB free"


def directory(config: Config) -> str:
    """The run directory can be written, is free or meant to be gone on with, and no other run is there."""
    return run_directory.check_place(config.run)


def template(config: Config) -> str:
    """The chat template says every message; what ends a tool's call ends no response."""
    missing = warm_start.is_missing(config)
    try:
        tokenizer = warm_start.run_tokenizer(config)
        ends = end_ids(tokenizer, None if missing else warm_start.resolve_model(config))
    except (PreflightError, OSError, ValueError):
        if missing:
            raise
        return "not asked: `model` says why"
    for part in dataset.tasks(config.data, config.model.system).values():
        dataset.conversation(config, tokenizer, part)
    close = config.rollout.tool.close
    if tool.uses_tool(config.rollout.tool) and close in [token_name(tokenizer, i) for i in ends]:
        raise PreflightError(
            f"rollout.tool.close={close!r} ends every response of this model, so that each would be a call: "
            "give the end of a call a text or a token of its own"
        )
    return config.model.template or "the tokenizer's own"


def sampler(config: Config) -> str:
    """The token a sampler inserts is one of the model's tokenizer."""
    text, sets = config.sampler.insert, describe_sets(config)
    if text is None:
        return f"inserts nothing{sets}"
    return f"inserts {text!r}, token {insert_token(text, warm_start.run_tokenizer(config))}{sets}"


def trackers(config: Config) -> str:
    """What the trackers need is installed, and a key is there for one that has a server."""
    chosen = build_parts(config).trackers
    for each in chosen:
        if ready := traits(each).ready:
            ready(**effective_settings(each))
    return ", ".join(map(function_name, chosen)) or "none"


def cards(config: Config) -> str:
    """What every kind of card holds at its fullest is no more than there is."""
    if actors.cpu_only(config.cluster):
        return "none is asked for"
    if config.cluster.address:
        return "asked of the cluster once it is joined"
    card = memory.smallest_card()
    if card and _of_model(config, memory.model_shape) is None:
        return "the model's shape is unknown"
    return memory.check_cards(config, build_parts(config).objective, card) if card else "none found here"


def deadlines(config: Config) -> str:
    """How long is waited at most, and the tokens a second that it implies."""
    found, longest = actors.run_deadlines(config), actors.longest_response(config)[0]
    return (
        f"rollout.deadline {found.response:,.0f} s, {longest / found.response:.3g} tokens/s of a response of "
        f"{longest:,}; driver.call_deadline {found.start:,.0f} s to start, {found.call:,.0f} s to score or "
        f"train; driver.stall {found.step:,.0f} s"
    )


FAST: tuple[Check, ...] = (
    *(model, template, sampler, resources, cards, transfer, deadlines, directory, disk, shared_memory),
    trackers,
)
"""Some seconds; `train` runs them first."""
