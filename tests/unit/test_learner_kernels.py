"""Liger's kernels, gradient checkpointing, fused AdamW: what libraries are asked for, and what is refused."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from entroray.config import LearnerConfig
from entroray.errors import ConfigError, PreflightError
from entroray.policy import families, packing
from entroray.wiring import compose
from entroray.workers.deepspeed_backend import deepspeed_config
from tests.families import models


@pytest.fixture
def liger(monkeypatch):
    """liger-kernel that knows qwen3, and what transformers was asked to apply of it."""
    import transformers.integrations.liger as integration

    applied = []
    for name in ("liger_kernel", "liger_kernel.transformers", "liger_kernel.transformers.monkey_patch"):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    module.MODEL_TYPE_TO_APPLY_LIGER_FN = {"qwen3": None}
    monkeypatch.setattr(
        integration, "apply_liger_kernel", lambda model, asked: applied.append((model, asked))
    )
    return applied


def test_liger_is_asked_for_everything_but_its_losses(liger):
    model = models.build("qwen3")
    packing.use_liger(model)
    assert liger == [(model, {"cross_entropy": False, "fused_linear_cross_entropy": False})]
    with pytest.raises(PreflightError, match=r"learner\.liger=true.* opt.*learner\.liger=false"):
        packing.use_liger(models.build("opt"))


def test_liger_that_is_not_installed_is_asked_for_by_its_extra(monkeypatch):
    monkeypatch.setattr(packing, "find_spec", lambda name: None)
    with pytest.raises(PreflightError, match=r"learner\.liger=true.*entroray\[liger\]"):
        packing.use_liger(models.build("qwen3"))


@pytest.mark.parametrize(
    "setting", ["learner.liger", "learner.compile", "learner.gradient_checkpointing_offload"]
)
def test_what_needs_a_card_is_refused_without_one(setting):
    with pytest.raises(ConfigError, match=rf"{setting}=true.*cluster=gpu"):
        compose.load_config([f"{setting}=true", "learner.gradient_checkpointing=true"])
    compose.load_config([f"{setting}=true", "learner.gradient_checkpointing=true", "cluster=gpu"])


@pytest.mark.parametrize("told", ["every_n_layers=2", "offload=true"])
def test_what_checkpointing_is_to_do_needs_checkpointing(told):
    with pytest.raises(ConfigError, match=r"learner\.gradient_checkpointing=true"):
        compose.load_config([f"learner.gradient_checkpointing_{told}", "cluster=gpu"])


def test_checkpointing_is_asked_of_transformers_as_the_settings_say():
    asked = []
    model = SimpleNamespace(
        supports_gradient_checkpointing=True, gradient_checkpointing_enable=lambda **said: asked.append(said)
    )
    families.enable_checkpointing(model, LearnerConfig())
    families.enable_checkpointing(
        model,
        LearnerConfig(
            gradient_checkpointing=True,
            gradient_checkpointing_every_n_layers=3,
            gradient_checkpointing_offload=True,
        ),
    )
    assert asked == [{"every_n_layers": 3, "offload": True}]
    with pytest.raises(PreflightError, match=r"learner\.gradient_checkpointing=false"):
        families.enable_checkpointing(
            SimpleNamespace(supports_gradient_checkpointing=False, name_or_path="x"),
            LearnerConfig(gradient_checkpointing=True),
        )


def test_every_second_layer_is_computed_again():
    model = models.build("exaone4")
    told = LearnerConfig(gradient_checkpointing=True, gradient_checkpointing_every_n_layers=2)
    families.enable_checkpointing(model, told)
    assert [layer.gradient_checkpointing for layer in model.model.layers] == [True, False, True, False]


@pytest.mark.parametrize("cuda", [True, False])
def test_adamw_is_fused_on_cards(monkeypatch, cuda):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    params = deepspeed_config(LearnerConfig(), "bfloat16")["optimizer"]["params"]
    assert params.get("fused", False) == cuda and params["torch_adam"]


@pytest.mark.parametrize("own", [{"torch_adam": False}, {"torch_adam": None}, {"foreach": True}])
def test_an_adamw_that_does_not_know_fused_is_not_told_of_it(monkeypatch, own):
    """DeepSpeed's has no such argument; torch's takes one of the two."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    told = LearnerConfig(deepspeed={"optimizer": {"params": own}})
    assert "fused" not in deepspeed_config(told, "bfloat16")["optimizer"]["params"]


def test_layers_are_compiled_for_all_lengths_and_nothing_else_is(monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda module, **asked: compiled.append((module, asked)))
    model = models.build("exaone4")
    packing.compile_layers(model)
    assert compiled == [(layer, {"dynamic": True}) for layer in model.model.layers]


def test_layers_whose_weights_are_gathered_inside_them_are_not_compiled():
    told = ["learner.compile=true", "cluster=gpu", "learner.zero_stage=3"]
    with pytest.raises(ConfigError, match=r"learner\.compile=true.*learner\.zero_stage=3"):
        compose.load_config(told)
    compose.load_config([*told[:2], "learner.zero_stage=2"])
