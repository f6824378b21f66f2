"""What numbers and names of the settings are refused when they are read, and what stays legal."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch
from transformers import get_scheduler

from entroray.config import Config
from entroray.errors import ConfigError
from entroray.wiring import constraints
from tests.composed import configured

UNBOUNDED = {"evaluate.k"}
"""`plan_evaluation` compares each k with the samples."""


def numbers(schema: Any, prefix: str = "") -> Iterator[str]:
    """Paths of all settings that are a number, may be one, or are a list of them."""
    for f in fields(schema):
        if is_dataclass(f.default_factory):
            yield from numbers(f.default_factory, f"{prefix}{f.name}.")
        elif f.type in (int, float, int | None, float | None, list[int], list[float]):
            yield prefix + f.name


def test_every_number_has_a_bound_or_a_reason_to_have_none() -> None:
    known = [*constraints.NUMBERS, *UNBOUNDED, "learner.zero_stage"]
    assert sorted(numbers(Config)) == sorted(known), "and none has two"


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ("rollout.group_size=0", "at least 1"),
        ("learner.updates_per_rollout=0", "at least 1"),
        ("driver.max_lag=-1", "at least 0"),
        ("learner.lr=-1", "at least 0"),
        ("seed=-1", r"from 0 to 2\^32"),
        ("seed=4294967296", r"from 0 to 2\^32"),
        ("learner.lr=nan", "at least 0"),
        ("run.steps=0", "at least 1"),
        ("evaluate.every=-1", "at least 0"),
        ("driver.stall=0", "above 0"),
        ("reward.max_failed=1.5", "between 0 and 1"),
        ("learner.betas=[0.9]", r"two numbers from 0 to below 1"),
        ("learner.betas=[0.9,1.0]", r"two numbers from 0 to below 1"),
        ("model.warm_start.band=[0.9,0.1]", "the lower first"),
        ("verifier.memory_mb=0", "at least 1, or null"),
        ("generator.transfer=foo", "choose plasma, nccl, ipc or adapter"),
        ("learner.schedule=foo", "choose linear, .* or inverse_sqrt"),
    ],
)
def test_a_setting_out_of_its_bounds_is_refused_by_path(told: str, said: str) -> None:
    path, _, value = told.partition("=")
    with pytest.raises(ConfigError, match=rf"^{path}=.*{said}") as refused:
        configured(told)
    assert refused.value.exit_code == 2 and value.lstrip("[.-").partition(",")[0][:3] in str(refused.value)


@pytest.mark.parametrize(
    "told",
    [
        *("run.tokens=0", "driver.probe.every=0", "driver.refill_limit=0"),
        *("learner.max_grad_norm=0", "learner.lr=0", "learner.threads=0", "generator.restarts=0"),
        *("verifier.memory_mb=null", "generator.threads=null", "checkpoint.every=0"),
        *("observe.tokens.every=0", "observe.prediction.every=0"),
        *("rollout.turns=0", "reward.max_failed=1", "cluster.cpus.verifier=0"),
    ],
)
def test_what_is_off_stays_legal(told: str) -> None:
    configured(told)


def test_a_tail_may_be_cut_in_an_evaluation_only_where_there_is_one() -> None:
    configured("sampler.top_k=1", "sampler.top_p=0.5", training=False)
    for told in ("sampler.top_k=-1", "sampler.top_p=0", "sampler.top_p=1.5"):
        with pytest.raises(ConfigError, match=told):
            configured(told, training=False)


@pytest.mark.parametrize("name", constraints.NAMES["learner.schedule"])
def test_every_schedule_is_made_as_the_learner_makes_it(name: str) -> None:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    schedule = get_scheduler(str(name), optimizer, 2, 10)
    for _ in range(12):
        optimizer.step()
        schedule.step()
