"""ZeRO 3 divides a model while it is read; every stage of ZeRO trains in bf16. On two shared ranks."""

import json
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ray import cloudpickle

from entroray.config import LearnerConfig
from entroray.errors import PreflightError
from entroray.objective import build_objective
from entroray.train.batching import assemble, group_index, tokens_of
from entroray.wiring import actors, compose
from entroray.workers.deepspeed_backend import DeepSpeedBackend
from entroray.workers.learner_rank import LearnerSettings
from entroray.workers.roles import LearnerRole
from tests.ray.stack import Stack
from tests.ray.test_learner import groups

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # ranks cannot import this file
DTYPES = ("float32", "bfloat16")


def on_ranks(stack: Stack, work: Callable[[Any], Any]) -> list[Any]:
    """What `work(rank)` gives in each of the two rank's own processes."""
    gang = stack.wait(stack.gang(2))
    return stack.wait(gang.all(lambda r, h: h.__ray_call__.remote(work), deadline=120.0))


def settings_of(stack: Stack, *overrides: str, **learner: Any) -> LearnerSettings:
    config, _ = compose.load_config(["learner.ranks=2", *overrides])
    made = actors.learner_settings(config, stack.model, 10)
    return replace(made, learner=replace(made.learner, **learner))


def held_while_loading(rank: Any, settings: LearnerSettings) -> tuple[list[int], int, int, list[int]]:
    """Elements of whole parameters held at each point of a load; in the largest, in all; kept of each."""
    import deepspeed.runtime.zero.partition_parameters as zero

    from entroray.workers import learner_rank

    made, held, load = [], [], learner_rank.load_policy
    divide, leave = zero.Init._zero_init_param, zero.GatheredParameters.__exit__
    count = lambda parameters: held.append(sum(p.numel() for p in parameters))

    def divided(self: Any, parameter: Any) -> None:
        made.append(parameter)
        count(made)
        divide(self, parameter)

    def left(self: Any, *error: Any) -> Any:
        count(made)
        return leave(self, *error)

    def loaded(*stored: Any) -> Any:
        policy = load(*stored)
        count(policy.parameters())
        return policy

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zero.Init, "_zero_init_param", divided)
        patch.setattr(zero.GatheredParameters, "__exit__", left)
        patch.setattr(learner_rank, "load_policy", loaded)
        rank.reset(settings, rank.objective)
    sizes = [p.ds_numel for p in rank.policy.parameters()]
    return held, max(sizes), sum(sizes), [p.ds_tensor.numel() for p in rank.policy.parameters()]


def test_no_rank_holds_more_than_one_parameter_whole_as_it_loads_a_policy_and_its_reference(
    stack: Stack,
) -> None:
    settings = settings_of(stack, zero_stage=3, reference=True)
    for held, largest, total, own in on_ranks(stack, partial(held_while_loading, settings=settings)):
        assert len(held) > 4 * len(own) and max(held) == largest < total / 4
        assert sum(own) <= total / 2 + len(own)


def differing(rank: Any, path: str, dtype: str) -> list[str]:
    """Which weights and buffers of a divided load are not those of an undivided one, bit for bit."""
    from entroray.policy.model import load_policy

    learner = LearnerConfig(ranks=2, zero_stage=3)
    wide = getattr(torch, dtype)
    whole = load_policy(path, wide)
    parts = load_policy(path, wide, "sdpa", DeepSpeedBackend.dividing(learner, dtype))
    same = lambda a, b: a.dtype == b.dtype and torch.equal(a, b)
    read = dict(parts.named_weights())
    pairs = [(n, p, DeepSpeedBackend.gather(read[n])) for n, p in whole.named_weights()]
    pairs += [(n, b, parts.get_buffer(n)) for n, b in whole.named_buffers()]
    names = [] if parts.names == whole.names and parts.readout == whole.readout else ["names"]
    undivided = [n for n, p in read.items() if p.numel() or not hasattr(p, "ds_tensor")]
    return names + undivided + [n for n, a, b in pairs if not same(a.detach(), b.detach())]


def folders(place: Path) -> list[Path]:
    """A model with a head of its own, in five files; one that only its config.json calls tied."""
    from safetensors.torch import load_file, save_file
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    for name, tied in (("untied", False), ("called_tied", True)):
        config = Qwen3Config(vocab_size=300, tie_word_embeddings=tied, **sizes, **heads)
        Qwen3ForCausalLM(config).save_pretrained(place / name, max_shard_size="10MB" if tied else "80KB")
    weights = load_file(file := place / "called_tied" / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] * 2
    save_file(weights, file, metadata={"format": "pt"})
    return [place / "untied", place / "called_tied"]


def test_a_divided_model_is_the_undivided_one_bit_for_bit(stack: Stack, tmp_path: Path) -> None:
    for path in (stack.model, *map(str, folders(tmp_path))):
        for dtype in DTYPES:
            found = on_ranks(stack, partial(differing, path=path, dtype=dtype))
            assert found == [[], []], (path, dtype)


def refused(rank: Any, folders: dict[str, str], settings: LearnerSettings) -> dict[str, str]:
    """How a reset of this rank to each of these models fails."""
    said = {}
    for name, path in folders.items():
        try:
            rank.reset(replace(settings, model=replace(settings.model, path=path)), rank.objective)
        except PreflightError as error:
            said[name] = str(error)
    return said


def test_a_load_that_fails_fails_on_every_rank_and_the_gang_loads_the_next(
    stack: Stack, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    untied, _ = folders(tmp_path)
    whole = {n: t for f in sorted(untied.glob("*.safetensors")) for n, t in load_file(f).items()}
    config = json.loads((untied / "config.json").read_text())
    lost = {n: t for n, t in whole.items() if n != "model.layers.1.mlp.up_proj.weight"}
    made = {"shape": (whole, {"vocab_size": 310}), "lost": (lost, {}), "cut": (whole, {})}
    for name, (weights, changed) in made.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config | changed))
        save_file(weights, file := tmp_path / name / "model.safetensors", metadata={"format": "pt"})
        if name == "cut":
            file.write_bytes(file.read_bytes()[:-100])
    settings = settings_of(stack, zero_stage=3)
    places = {name: str(tmp_path / name) for name in made}
    for said in on_ranks(stack, partial(refused, folders=places, settings=settings)):
        assert said.keys() == made.keys() and all(places[n] in text for n, text in said.items())
        assert "(300, 64), not (310, 64)" in said["shape"] and "up_proj" in said["lost"]
    one, two = on_ranks(stack, partial(loaded, settings=settings))
    assert one == two and np.isfinite(one).all()


def loaded(rank: Any, settings: LearnerSettings) -> list[float]:
    rank.reset(settings, rank.objective)
    return rank.prompt_logprobs([1, 2, 3, 4])


def left_behind(rank: Any, settings: LearnerSettings, after: LearnerSettings) -> list[str]:
    """What of a learner and its reference is alive, or replaced, when the rank has become another."""
    rank.reset(settings, rank.objective)
    rank.prompt_logprobs([1, 2, 3, 4])
    backend, reference = rank.backend, rank.reference
    held = {"engine": backend.engine, "optimizer": backend.engine.optimizer, "policy": backend.policy}
    held |= {"weight": next(backend.policy.parameters()), "reference": reference.policy}
    refs = {name: weakref.ref(each) for name, each in held.items()}
    del backend, reference, held
    rank.reset(after, rank.objective)
    rank.prompt_logprobs([1, 2, 3, 4])
    found = [name for name, ref in refs.items() if ref() is not None]
    return found + ["linear"] * (torch.nn.functional.linear is not torch._C._nn.linear)


def test_nothing_of_a_divided_learner_outlives_a_reset(stack: Stack) -> None:
    divided = settings_of(stack, zero_stage=3, reference=True)
    found = on_ranks(stack, partial(left_behind, settings=divided, after=settings_of(stack)))
    assert found == [[], []]


def exported(rank: Any, folder: str) -> None:
    from entroray.policy import model_files

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_files, "SHARD_BYTES", 60_000)
        rank.export(folder)


async def steps(stack: Stack, settings: LearnerSettings, saved: Path) -> list[dict[str, Any]]:
    """Three updates from the first weights, and the third once more after what was saved before it is loaded.

    With each, the log-probs of some tokens by either rank afterwards.
    """
    objective, gang = build_objective("grpo"), await stack.gang(2)
    learner, ids = LearnerRole(gang, 150, 120.0), list(range(40))
    reset = lambda r, h: h.reset.remote(settings, objective)
    await gang.all(reset, deadline=180.0)

    async def step(number: int) -> dict[str, Any]:
        batch = assemble(g := groups(4, seed=number))
        scores = await learner.score(batch, group_index(g), 1)
        tokens = objective.credit(tokens_of(g, [objective.estimate(x) for x in g], scores, number))
        metrics = await learner.update(batch, tokens, objective, 1)
        ranks = await gang.all(lambda r, h: h.prompt_logprobs.remote(ids), deadline=60.0)
        return {**metrics, "ranks": ranks}

    found = [await step(0), await step(1)]
    await gang.all(lambda r, h: h.save.remote(str(saved)), deadline=60.0)
    found.append(await step(2))
    await gang.all(reset, deadline=180.0)
    await gang.all(lambda r, h: h.load.remote(str(saved)), deadline=60.0)
    return [*found, await step(2)]


@pytest.fixture(scope="module")
def in_float32(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return stack.wait(steps(stack, settings_of(stack), tmp_path_factory.mktemp("float32") / "saved"))


@pytest.mark.parametrize("stage", range(4))
def test_bf16_trains_at_every_stage_as_float32_does_and_is_resumed(
    stack: Stack, in_float32: list[dict[str, Any]], stage: int, tmp_path: Path
) -> None:
    settings = settings_of(stack, "model.dtype=bfloat16", zero_stage=stage)
    found = stack.wait(steps(stack, settings, tmp_path / "saved"))
    for ours, wide in zip(found, in_float32, strict=True):
        assert ours["update/skipped"] == 0
        assert ours["update/loss"] == pytest.approx(wide["update/loss"], rel=0.05, abs=0.01)
        assert ours["update/grad_norm"] == pytest.approx(wide["update/grad_norm"], rel=0.05)
        one, two = ours["ranks"]
        assert one == two and np.isfinite(one).all()
        np.testing.assert_allclose(one, wide["ranks"][0], atol=0.1)
    assert np.abs(np.subtract(found[2]["ranks"][0], found[0]["ranks"][0])).max() > 0.01, "weights moved"
    assert found[3] == found[2], "a resumed gang does what it did"


def test_an_export_of_divided_weights_in_several_files_is_read_as_they_were(
    stack: Stack, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    settings = settings_of(stack, zero_stage=3)
    on_ranks(stack, partial(loaded, settings=settings))
    on_ranks(stack, partial(exported, folder=str(tmp_path / "model")))
    assert len([*(tmp_path / "model").glob("model-*.safetensors")]) > 2
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    first = AutoModelForCausalLM.from_pretrained(stack.model)
    for ours, theirs in zip(read.parameters(), first.parameters(), strict=True):
        assert torch.equal(ours, theirs)
