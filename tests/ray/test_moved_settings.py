"""Settings moved while real engines run: each reaches the role it is for, and a resume goes on with them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from entroray.config import Config
from entroray.data.prompts import PromptStream
from entroray.errors import PreflightError
from entroray.objective import build_objective
from entroray.train.driver import Driver, Knobs, LoopSettings, Roles
from entroray.types import Batch, Draw, Group, Tokens
from entroray.wiring import actors, compose, controllers
from entroray.wiring.dataset import load_dataset
from entroray.wiring.parts import build_parts
from entroray.workers.checkpoint import driver_state
from entroray.workers.deepspeed_backend import rebase_schedule
from tests.ray.stack import Stack

BONUS = "objective.penalties.0.coef"
CONTROL = {
    "bonus": f"{{knob: {BONUS}, fn: pi, signal: entropy/mean, target: 9, gain: 0.1, integral: 0.01, "
    "low: 0, high: 1}",
    "lr": "{knob: learner.lr, fn: linear, start: 1e-3, end: 2e-4, steps: 5}",
    "heat": "{knob: sampler.temperature, fn: stage, values: [1.0, 1.2, 0.9], until: [1, 3]}",
}
BASE = [
    "learner.lr_high=true",
    *("experiment=quickstart", "objective=grpo", "objective.penalties=[{fn: entropy_bonus, coef: 0.0}]"),
    *("++data.settings.size=2000", "data.max_prompt=128", "generator.replicas=1", "learner.warmup_updates=0"),
]
PACE = LoopSettings(8, 4, 0, True, 1000, max_failed=0.5, stall=120.0, max_skipped=1)


class Memory:
    """A journal that keeps metrics and temperatures, of the last time a step was taken."""

    def __init__(self) -> None:
        self.rows: dict[int, dict[str, float]] = {}

    def step(self, step: int, metrics: Mapping[str, float], groups: Sequence[Group], tokens: Tokens) -> None:
        timed = ("seconds/", "idle/", "tokens/", "sync/")
        lasting = {k: v for k, v in metrics.items() if not k.startswith(timed)}
        self.rows[step] = lasting | {"temperature": float(tokens.temperature[0])}

    def skipped(self, step: int, batch: Batch, tokens: Tokens) -> None:
        raise AssertionError(f"step {step} was left out")

    def event(self, kind: str, **fields: Any) -> None:
        pass


def a_driver(config: Config, m: actors.Actors, read: Any, journal: Memory) -> Driver:
    """As `entroray train` makes it."""
    knobs = Knobs(build_objective(config.objective), Draw(1.0, 12), config.learner.updates_per_rollout)
    roles = Roles(m.generator_role(), m.verifier_role(), m.learner_role(), m.sync, journal)
    parts = build_parts(config)
    control = controllers.build_control(config, parts.controllers)
    tune = controllers.build_tuner(config.objective, config.packages, parts)
    prompts = PromptStream(read.split.training, seed=0)
    return Driver(prompts, roles, knobs, PACE, seed=0, control=control, tune=tune)


async def four_steps(config: Config, stack: Stack, folder: Path) -> tuple[list[Driver], list[Memory]]:
    """Four steps; then steps 3 and 4 again, from what was saved after step 2, by another driver."""
    read = load_dataset(config, stack.model)
    m = await stack.actors(config, build_objective(config.objective), read.judge, updates=8)
    saves, books = m.checkpoints(folder), [Memory(), Memory()]
    whole = a_driver(config, m, read, books[0])

    async def save(step: int, metrics: Mapping[str, float]) -> None:
        if step == 2:
            await saves.save(step, whole.committed)

    await whole.train(4, save)
    saved = folder / "checkpoints" / "step-000002"
    await m.learner.all(lambda rank, h: h.load.remote(str(saved)), deadline=60.0)
    await m.sync(2)
    resumed = a_driver(config, m, read, books[1])
    resumed.restore(driver_state(saved))
    await resumed.train(4)
    return [whole, resumed], books


def test_moved_settings_act_and_a_resume_goes_on_with_them(stack: Stack, tmp_path: Path) -> None:
    moved = [f"+control.{name}={spec}" for name, spec in CONTROL.items()]
    config, _ = compose.load_config([*BASE, *moved, f"model.path={stack.model}"])
    (whole, resumed), (first, second) = stack.wait(four_steps(config, stack, tmp_path))
    rows = list(first.rows.values())
    coefs = [row["control/bonus"] for row in rows]
    assert coefs[0] == 0.0 < coefs[1] and len(set(coefs)) == 4
    assert [row["update/lr"] for row in rows] == pytest.approx([1e-3, 8e-4, 6e-4, 4e-4])
    assert [row["temperature"] for row in rows] == pytest.approx([1.0, 1.2, 1.2, 0.9])
    # A random policy is rewarded for nothing else, so the loss shows that the coefficient was in effect.
    assert abs(rows[0]["update/loss"]) < 0.1 and rows[3]["update/loss"] < -0.2
    assert second.rows == {step: first.rows[step] for step in (3, 4)}
    assert resumed.control.state() == whole.control.state() and resumed.control.state()["memory"]["bonus"]


def test_rebased_a_schedule_goes_on_as_if_it_had_begun_there() -> None:
    weight = [torch.nn.Parameter(torch.zeros(1))]
    optimizer = torch.optim.SGD(weight, lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min(1.0, n / 4))
    for _ in range(2):
        optimizer.step()
        schedule.step()
    rebase_schedule(schedule, 0.1)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.075)
    with pytest.raises(PreflightError, match=r"learner\.schedule"):
        rebase_schedule(torch.optim.lr_scheduler.StepLR(optimizer, 3), 0.1)
