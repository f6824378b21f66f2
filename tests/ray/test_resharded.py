"""A learner goes on with another number of ranks, at another stage of ZeRO: what it knew, bit for bit.

Every hop loads what the one before saved, saves it again, then makes the same update as the first learner.
"""

import hashlib
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray import cloudpickle

from entroray.objective import build_objective
from entroray.train.batching import assemble, group_index, tokens_of
from entroray.wiring import actors, compose
from entroray.workers.cluster import Gang
from entroray.workers.learner_rank import LearnerSettings
from entroray.workers.roles import LearnerRole
from tests.ray.stack import Stack
from tests.ray.test_learner import groups

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # ranks cannot import this file
Layout = tuple[Any, ...]
"""Ranks, their stage of ZeRO, and other settings."""
OFFLOADED = "learner.deepspeed={zero_optimization:{offload_optimizer:{device:cpu}}}"
"""DeepSpeed's own Adam, which counts its steps as an integer."""
LOW = ["learner=lora", "learner.lora.rank=3", "learner.lr=0.02", "learner.lr_high=true"]
HOPS: dict[str, tuple[list[str], list[Layout]]] = {
    "float32": ([], [(1, 1), (2, 1), (1, 1), (1, 3), (1, 1), (2, 3), (1, 0), (1, 1), (2, 2)]),
    "bfloat16": (["model.dtype=bfloat16"], [(2, 1), (1, 2), (2, 3), (1, 1), (2, 1)]),
    "adapter": (LOW, [(1, 1), (2, 3), (1, 0), (1, 1)]),
    "offloaded": ([], [(1, 1), (1, 2, OFFLOADED), (2, 3), (2, 3, OFFLOADED), (1, 1)]),
}


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model whose norms two ranks cannot divide evenly."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 63, "intermediate_size": 95, "num_hidden_layers": 2, "head_dim": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    folder = tmp_path_factory.mktemp("odd")
    Qwen3ForCausalLM(Qwen3Config(vocab_size=301, **sizes, **heads)).save_pretrained(folder)
    return str(folder)


def known(rank: Any) -> dict[str, str]:
    """Of each parameter its weight in the model, in float32, and all that Adam keeps of it, as a hash."""
    backend, found = rank.backend, {}
    for name, parameter in backend.trained.items():
        whole = {kind: make() for kind, make in backend.state_of(parameter).items()}
        for kind, tensor in {**whole, "model": backend.gather(parameter).float()}.items():
            told = f"{tuple(tensor.shape)} {tensor.dtype}".encode()
            found[f"{kind}/{name}"] = hashlib.sha256(told + tensor.cpu().numpy().tobytes()).hexdigest()
    return found


def settings_of(model: str, told: Sequence[str], layout: Layout) -> LearnerSettings:
    own = [f"learner.ranks={layout[0]}", f"learner.zero_stage={layout[1]}", "learner.schedule=cosine"]
    config, _ = compose.load_config(["learner.lr=1e-3", "learner.warmup_updates=2", *told, *own, *layout[2:]])
    return actors.learner_settings(config, model, 10)


async def begin(stack: Stack, settings: LearnerSettings) -> Gang:
    gang, objective = await stack.gang(settings.learner.ranks), build_objective("grpo")
    await gang.all(lambda r, h: h.reset.remote(settings, objective), deadline=180.0)
    return gang


async def update(gang: Gang, number: int) -> dict[str, float]:
    learner, objective = LearnerRole(gang, 150, 120.0), build_objective("grpo")
    batch = assemble(g := groups(4, seed=number))
    scores = await learner.score(batch, group_index(g), 1)
    tokens = objective.credit(tokens_of(g, [objective.estimate(x) for x in g], scores, number))
    metrics = await learner.update(batch, tokens, objective, 1)
    return {k: v for k, v in metrics.items() if k in ("update/loss", "update/grad_norm", "update/lr")}


async def looked_at(gang: Gang) -> tuple[dict[str, str], list[float]]:
    """What the ranks know, which is one, and log-probs of some tokens."""
    every = await gang.all(lambda r, h: h.__ray_call__.remote(known), deadline=120.0)
    assert all(each == every[0] for each in every)
    ids = list(range(40))
    said = await gang.all(lambda r, h: h.prompt_logprobs.remote(ids), deadline=60.0)
    return every[0], said[0]


async def hop(stack: Stack, settings: LearnerSettings, before: Path | None, folder: Path) -> list[Any]:
    """What is known where this learner begins; after one more update its metrics and what is known."""
    gang = await begin(stack, settings)
    if before is None:
        _ = [await update(gang, number) for number in (0, 1)]
    else:
        await gang.all(lambda r, h: h.load.remote(str(before)), deadline=60.0)
    start = await looked_at(gang)
    folder.mkdir()
    await gang.all(lambda r, h: h.save.remote(str(folder)), deadline=60.0)
    return [start, await update(gang, 2), await looked_at(gang)]


@pytest.mark.parametrize(
    "which", [pytest.param(name, marks=[pytest.mark.slow] * (name == "offloaded")) for name in HOPS]
)
def test_weights_moments_and_step_are_the_same_on_other_ranks_and_stages(
    stack: Stack, odd: str, which: str, tmp_path: Path
) -> None:
    told, layouts = HOPS[which]
    own = [settings_of(odd, told, layout) for layout in layouts]
    saved = [tmp_path / str(i) for i in range(len(own))]
    first, *others = [
        stack.wait(hop(stack, s, before, folder))
        for s, before, folder in zip(own, [None, *saved], saved, strict=False)
    ]
    (state, logprobs), metrics, (after, moved) = first
    kinds = {key.split("/")[0] for key in state}
    assert kinds == {"weight", "exp_avg", "exp_avg_sq", "step", "model"}
    assert all((".lora_" in key) is (which == "adapter") for key in state), "what is trained, alone"
    assert np.abs(np.subtract(logprobs, moved)).max() > 1e-3, "witness: the update moves the weights"
    close = {"rtol": 1e-4, "atol": 2e-2 if which == "bfloat16" else 2e-4}
    for layout, ((known_, said), measured, (then, told_)) in zip(layouts[1:], others, strict=True):
        assert known_ == state, layout
        np.testing.assert_allclose(said, logprobs, **close)
        np.testing.assert_allclose(told_, moved, **close)
        assert measured["update/lr"] == metrics["update/lr"], layout
        if layout == layouts[0]:
            assert (said, measured, then, told_) == (logprobs, metrics, after, moved), layout
    parts = sorted(p.name for p in saved[layouts.index((2, 3))].rglob("*.safetensors"))
    assert parts == ["rank-0-00000.safetensors", "rank-1-00000.safetensors"], "each wrote its share"


def fill(rank: Any, folder: str) -> str:
    """How a save of this rank ends, rank 1 of which finds the disk full."""
    import errno

    import safetensors.torch

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        if rank.rank == 1:
            patch.setattr(safetensors.torch, "save_file", full)
        try:
            rank.save(folder)
        except RuntimeError as error:
            return str(error)
    return "saved"


@pytest.mark.parametrize("stage", [1, 3])
def test_a_full_disk_of_one_rank_is_said_by_all_and_they_go_on(
    stack: Stack, odd: str, stage: int, tmp_path: Path
) -> None:
    async def run() -> list[Any]:
        gang = await begin(stack, settings_of(odd, [], (2, stage)))
        await update(gang, 0)
        call = partial(fill, folder=str(tmp_path))
        said = await gang.all(lambda r, h: h.__ray_call__.remote(call), deadline=60.0)
        return [*said, await update(gang, 1)]

    *said, metrics = stack.wait(run())
    assert said == ["rank 1: OSError: [Errno 28] No space left on device"] * 2
    assert np.isfinite(metrics["update/loss"])
