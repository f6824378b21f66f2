"""What dies is replaced or ends the run with its code, and nothing of ours stays behind."""

import os
import time
from pathlib import Path

import pytest

from tests.ray.processes import (
    descendants,
    engines,
    kinds,
    left_over,
    printed_at_end,
    start,
    step_reached,
    steps,
    until,
)

BASE = [
    *("train", "experiment=quickstart", "objective=grpo", "rollout.groups_per_step=4"),
    *("observe.report=false", "evaluate.final=false", "++data.settings.size=2000", "data.max_prompt=128"),
    "learner.ranks=1",
]


@pytest.mark.faults
@pytest.mark.parametrize("replicas", [1, 2])
def test_an_engine_that_dies_is_replaced_and_its_prompts_asked_again(
    tmp_path: Path, model: str, replicas: int
) -> None:
    folder = tmp_path / "run"
    settings = [*BASE, f"generator.replicas={replicas}", "run.steps=12", f"run.dir={folder}"]
    process = start(*settings, f"model.path={model}")
    until(process, step_reached(folder, 2))
    engines(process)[0].kill()
    printed_at_end(process, 0)
    assert steps(folder) == list(range(1, 13))
    assert "engine_lost" in kinds(folder)
    assert replicas > 1 or "engine_joined" in kinds(folder)


def test_one_engine_dying_costs_no_step_and_the_last_ends_the_run_with_4_and_leaves_nothing(
    tmp_path: Path, model: str
) -> None:
    folder, shared = tmp_path / "run", set(os.listdir("/dev/shm"))
    settings = [*BASE, "generator.replicas=2", "generator.restarts=0", "run.steps=1000", f"run.dir={folder}"]
    process = start(*settings, f"model.path={model}")
    until(process, step_reached(folder, 2))
    ours = descendants(process)
    engines(process)[0].kill()
    until(process, lambda: "engine_lost" in kinds(folder))
    until(process, step_reached(folder, steps(folder)[-1] + 3))
    (last,), began = engines(process), time.monotonic()
    last.kill()
    printed = printed_at_end(process, 4, 120)
    assert time.monotonic() - began < 120
    assert "no generator is left" in printed and "generator.restarts" in printed
    assert steps(folder) == list(range(1, len(steps(folder)) + 1)) and kinds(folder).count("engine_lost") == 2
    assert left_over(ours, shared) == []
