"""Part d: a rank of the learner itself, without Ray, under ZeRO 0 to 3 in bf16: python -m tests.gpu.part_d

The model has the shape of Qwen2.5-0.5B and random weights. DeepSpeed and what it needs lie in
tests/gpu/pieces, which pieces.sh makes.
"""

import contextlib
import gc
import math
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from entroray.config import LearnerConfig, Model
from entroray.objective import Objective, build_objective, count_tokens
from entroray.policy.microbatches import plan_on_card, plan_packed
from entroray.train.batching import assemble, tokens_of
from entroray.types import Batch, Group, Prompt, Rollout, Tokens, Verdict
from tests.gpu import record, shapes
from tests.gpu.record import Asked, Check, NotThereError, Step, at_most, holds, measured, not_here, there

UPDATES = 3
GRPO = {
    "keep": {"fn": "always"},
    "estimator": {"fn": "zscore", "eps": 1e-6},
    "ratio": {"fn": "token"},
    "surrogate": {"fn": "clip", "low": 0.2, "high": 0.2, "dual": None},
    "aggregate": {"fn": "rollout_mean"},
    "denominator": {"fn": "rollouts"},
}
"""Of conf/objective/grpo.yaml, which no machine without omegaconf reads."""
LOSS, NORM, NATS = 2e-3, 0.02, 0.02
"""Most that stages may differ: in a loss, in the share of a norm, in the mean of log-probs behind them."""
BETWEEN, PEAK = (0.9, 1.1), (0.6, 1.1)
"""Measured over planned: between updates, where every byte is known, and at the peak of one."""
HELD: dict[str, Any] = {}
"""The rank of this process, and by stage what it found."""


def size(asked: Asked) -> str:
    return "tiny" if asked.dry else "0.5B"


@cache
def folder(asked: Asked) -> Path:
    """The model as a run finds it."""
    place = Path(HELD["temporary"].name if "temporary" in HELD else _temporary())
    model = shapes.random_model(size(asked), asked.device, torch.bfloat16)
    model.save_pretrained(place / "model")
    del model
    gc.collect()
    return place / "model"


def _temporary() -> str:
    HELD["temporary"] = tempfile.TemporaryDirectory()
    return HELD["temporary"].name


@cache
def groups(asked: Asked) -> list[Group]:
    """Four prompts of 64 tokens, eight responses of 64 to 448 tokens to each, right by chance."""
    random = np.random.default_rng(record.SEED)
    vocabulary = shapes.SIZES[size(asked)]["vocab_size"]
    prompt_length, longest, members = (3, 9, 4) if asked.dry else (64, 448, 8)

    def one(index: int) -> Group:
        ids = tuple(random.integers(0, vocabulary, prompt_length).tolist())
        prompt, rollouts, verdicts = Prompt(f"p{index}", "", ids, ""), [], []
        for member in range(members):
            n = int(random.integers(max(1, longest // 7), longest + 1))
            drawn = random.integers(0, vocabulary, n).astype(np.int32)
            logprobs = np.full(n, -np.log(vocabulary), dtype=np.float32)
            rollouts.append(Rollout(prompt.id, drawn, logprobs, np.zeros(n, np.int32), "", 1.0, longest))
            verdicts.append(Verdict(float(member % 2), bool(member % 2)))
        return Group(prompt, tuple(rollouts), tuple(verdicts))

    return [one(index) for index in range(4)]


def objective() -> Objective:
    return build_objective(GRPO)


def learner(**settings: Any) -> LearnerConfig:
    """Of one rank; NotThereError for a setting that this checkout has not."""
    known = {field.name for field in fields(LearnerConfig)}
    for name in settings:
        if name not in known:
            raise NotThereError(f"there is no setting learner.{name}")
    return LearnerConfig(**{"ranks": 1, "lr": 1e-5, "token_budget": 4096, **settings})


def become(asked: Asked, given: LearnerConfig) -> Any:
    """The rank of this process with these settings: weights, optimizer and schedule from the beginning."""
    rank_class, settings_class = there("entroray.workers.learner_rank", "LearnerRank", "LearnerSettings")
    there("deepspeed")
    backend = there("entroray.workers.deepspeed_backend", "DeepSpeedBackend")
    model = Model(path=str(folder(asked)), dtype="bfloat16")
    settings = settings_class(given, model, "plasma", record.SEED, 10 * UPDATES)
    if "rank" not in HELD:
        gc.freeze()  # DeepSpeed collects garbage six times as it starts, of all that was imported too
        HELD["rank"] = rank_class(0, settings, objective(), backend)
        HELD["rank"].start("127.0.0.1", _free_port(), 60.0)
    else:
        HELD["rank"].reset(settings, objective())
    return HELD["rank"]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def micros(asked: Asked, rank: Any) -> list[tuple[Batch, Tokens]]:
    """One update's, scored by the rank as it is."""
    return scored(groups(asked), rank)


def scored(given: Sequence[Group], rank: Any) -> list[tuple[Batch, Tokens]]:
    """Micro-batches of these groups, scored by the rank as it is."""
    batch = assemble(given)
    lengths = batch.prompt_lengths + batch.response_lengths
    budget = rank.settings.learner.token_budget
    plan = plan_packed if rank.packed else plan_on_card
    (pieces,) = plan(lengths, ranks=1, token_budget=budget)
    found = rank.score(batch.cut(pieces))
    places = np.split(np.arange(len(batch.response_ids)), np.cumsum(batch.response_lengths)[:-1])
    at = [np.concatenate([places[row] for row in piece]) for piece in pieces]
    columns = {name: np.zeros(len(batch.response_ids), dtype=np.float32) for name in found[0]}
    for where, of_piece in zip(at, found, strict=True):
        for name, values in of_piece.items():
            columns[name][where] = values
    row = objective()
    tokens = tokens_of(given, [row.estimate(g) for g in given], columns, 0)
    credited = row.credit(tokens)
    counted = replace(credited, counts=count_tokens(credited))
    return [*zip(batch.cut(pieces), counted.cut(pieces), strict=True)]


def trained(asked: Asked, rank: Any) -> dict[str, list[float]]:
    """Losses, norms and seconds of `UPDATES` updates on the same tokens, and log-probs behind them."""
    given = micros(asked, rank)
    found: dict[str, list[float]] = {"loss": [], "grad_norm": [], "skipped": [], "seconds": []}
    for _ in range(UPDATES):
        began = time.perf_counter()
        sums = rank.update(given)
        synchronize(asked)
        found["seconds"].append(time.perf_counter() - began)
        for name in ("loss", "grad_norm", "skipped"):
            found[name].append(float(sums[name]))
    behind = rank.score([batch for batch, _ in given])
    return found | {"logprobs": np.concatenate([each["logprobs"] for each in behind]).tolist()}


def synchronize(asked: Asked) -> None:
    if asked.card:
        torch.cuda.synchronize()


def stage(number: int, asked: Asked) -> Iterator[Check]:
    """Three updates at one stage of ZeRO, and the card's memory beside what was planned."""
    rank = become(asked, learner(zero_stage=number))
    if asked.card:
        torch.cuda.reset_peak_memory_stats()
    HELD[f"stage {number}"] = found = trained(asked, rank)
    numbers = {name: found[name] for name in ("loss", "grad_norm", "seconds")}
    finite = np.isfinite([*found["loss"], *found["grad_norm"]]).all() and not any(found["skipped"])
    yield holds(f"ZeRO {number}: three updates", bool(finite), "finite, none skipped", **numbers)
    sample = found["logprobs"][:64]
    yield measured(f"ZeRO {number}: log-probs behind them", mean=float(np.mean(sample)), first=sample[:8])
    yield from planned(number, asked, rank)


def planned(number: int, asked: Asked, rank: Any) -> Iterator[Check]:
    """Bytes on the card between updates and at the peak of one, beside those of `entroray plan`."""
    if not asked.card:
        yield not_here(f"ZeRO {number}: memory", "of a card")
        return
    between, peak = allocated(asked), torch.cuda.max_memory_allocated()
    memory = there("entroray.planning.memory")
    shape = model_shape(asked, rank)
    longest = max(len(g.prompt.token_ids) + r.length for g in groups(asked) for r in g.rollouts)
    budget = rank.settings.learner.token_budget
    layout = memory.Layout(element=2, longest=longest, zero_stage=number, token_budget=budget)
    parts = memory.learner_states(shape.parameters, layout)
    states = sum(parts.values())
    own = layout.element * shape.parameters if number < 2 else parts["gradients"]  # given back behind a step
    work = sum(memory.learner_work(shape, layout).values())
    for label, seen, wanted, (low, high) in (
        ("between updates", between, states - own, BETWEEN),
        ("at its peak", peak, states + work, PEAK),
    ):
        gib = {"seen_gib": seen / 2**30, "planned_gib": wanted / 2**30}
        why = f"{low:g} to {high:g} of what was planned"
        yield holds(f"ZeRO {number}: memory {label}", low <= seen / wanted <= high, why, **gib)


def model_shape(asked: Asked, rank: Any) -> Any:
    """What `entroray.planning.memory` wants to know of the model."""
    s = shapes.SIZES[size(asked)]
    head = s["hidden_size"] // s["num_attention_heads"]
    return there("entroray.planning.memory", "ModelShape")(
        layers=s["num_hidden_layers"],
        width=s["hidden_size"],
        intermediate=s["intermediate_size"],
        queries=s["hidden_size"],
        keys=s["num_key_value_heads"] * head,
        vocabulary=s["vocab_size"],
        parameters=sum(math.prod(rank.backend.full_shape(p)) for p in rank.policy.parameters()),
    )


def equal(asked: Asked) -> Iterator[Check]:
    """Every stage has the losses, norms and log-probs of stage 1."""
    for number in range(4):
        if f"stage {number}" not in HELD:  # of an earlier call
            HELD[f"stage {number}"] = trained(asked, become(asked, learner(zero_stage=number)))
    first = HELD["stage 1"]
    for number in (0, 2, 3):
        yield from same(f"ZeRO {number} and 1", HELD[f"stage {number}"], first)


def same(label: str, found: dict[str, list[float]], wanted: dict[str, list[float]]) -> Iterator[Check]:
    """Two runs of `trained`."""
    apart = {k: np.abs(np.subtract(found[k], wanted[k])) for k in ("loss", "grad_norm", "logprobs")}
    yield at_most(f"{label}: losses apart", LOSS, largest=float(apart["loss"].max()))
    norms = float((apart["grad_norm"] / np.abs(wanted["grad_norm"])).max())
    yield at_most(f"{label}: share of a norm apart", NORM, largest=norms)
    yield at_most(f"{label}: mean |log-prob| apart", NATS, nats=float(apart["logprobs"].mean()))


def resets(number: int, asked: Asked) -> Iterator[Check]:
    """A rank that becomes another leaves nothing on the card, nor does its reference."""
    held = []
    for stage in (number, 3, 1, number):
        rank = become(asked, learner(zero_stage=stage, reference=True))
        rank.update(micros(asked, rank))
        synchronize(asked)
        held.append(allocated(asked))
    label = f"ZeRO {number}: MiB more than before two other stages"
    yield at_most(label, 1.0 if asked.card else 0.01, mib=(held[-1] - held[0]) / 2**20)


def allocated(asked: Asked) -> int:
    """Bytes of all tensors that are alive."""
    gc.collect()
    if asked.card:
        return torch.cuda.memory_allocated()
    alive = [x.untyped_storage() for x in gc.get_objects() if isinstance(x, Tensor)]
    return sum({held.data_ptr(): held.nbytes() for held in alive}.values())


def adamw(asked: Asked) -> Iterator[Check]:
    """AdamW with torch's fused kernel, and with its foreach one."""
    if not asked.card:
        yield not_here("fused AdamW", "a card's kernel")
        return
    found = {}
    for name, own in (("fused", {"fused": True}), ("foreach", {"fused": False, "foreach": True})):
        rank = become(asked, learner(deepspeed={"optimizer": {"params": own}}))
        taken = [bool(group.get("fused")) for group in _groups(rank)]
        if taken != [name == "fused"] * len(taken):
            raise NotThereError(f"learner.deepspeed does not reach AdamW: asked {own}, fused is {taken}")
        trained(asked, rank)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        found[name] = trained(asked, rank)
        grown = (torch.cuda.max_memory_allocated() - before) / 2**30
        yield measured(f"AdamW, {name}", update_s=min(found[name]["seconds"]), peak_gib=grown)
    yield from same("AdamW fused and foreach", found["fused"], found["foreach"])


def _groups(rank: Any) -> list[dict[str, Any]]:
    """Of torch's own optimizer, inside DeepSpeed's."""
    optimizer = rank.backend.engine.optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer.param_groups


def layouts(asked: Asked) -> Iterator[Check]:
    """Rows packed end to end have the losses and norms of padded ones, through the rank."""
    found = {}
    for how in ("never", "always"):
        rank = become(asked, learner(pack=how))
        found[how] = trained(asked, rank)
        yield holds(f"learner.pack={how}", rank.packed == (how == "always"), "is what the rank does")
        yield measured(f"learner.pack={how}: an update", seconds=min(found[how]["seconds"]))
    yield from same("packed and padded", found["always"], found["never"])


def reference(number: int, asked: Asked) -> Iterator[Check]:
    """A frozen copy scores as the policy that it was made from, also where ranks divide it."""
    rank = become(asked, learner(zero_stage=number, reference=True))
    batch = assemble(groups(asked))
    (found,) = rank.score([batch])
    apart = float(np.abs(found["ref_logprobs"] - found["logprobs"]).mean())
    yield at_most(f"ZeRO {number}: policy and reference", NATS, nats=apart)


def exported(asked: Asked) -> Iterator[Check]:
    """What a rank exports under ZeRO 3 is read as the policy that it was."""
    rank = become(asked, learner(zero_stage=3))
    own = trained(asked, rank)["logprobs"]
    with tempfile.TemporaryDirectory() as place:
        began = time.perf_counter()
        rank.export(place)
        took = time.perf_counter() - began
        files = sorted(path.name for path in Path(place).glob("*.safetensors"))
        again = replace(rank.settings, model=replace(rank.settings.model, path=place))
        rank.reset(again, objective())
        behind = np.concatenate([s["logprobs"] for s in rank.score([b for b, _ in micros(asked, rank)])])
    yield measured("export", seconds=took, files=len(files))
    yield at_most("exported and trained", NATS, nats=float(np.abs(behind - own).mean()))


def leave() -> None:
    """Out of the process group in order, and without the model's folder."""
    if rank := HELD.get("rank"):
        with contextlib.suppress(Exception):  # boundary: what it found is written
            rank.stop()
    if "temporary" in HELD:
        HELD["temporary"].cleanup()


STEPS: dict[str, Step] = {
    **{f"ZeRO {number}": partial(stage, number) for number in range(4)},
    "equal": equal,
    "adamw": adamw,
    "layouts": layouts,
    **{f"resets, ZeRO {number}": partial(resets, number) for number in (1, 3)},
    **{f"reference, ZeRO {number}": partial(reference, number) for number in (1, 3)},
    "exported": exported,
}

if __name__ == "__main__":
    try:
        record.main("d", "a rank of the learner, ZeRO 0 to 3", STEPS)
    finally:
        leave()
