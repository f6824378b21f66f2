"""Runs that go wrong for reasons of their own end with the code for it, and say what to look at."""

from pathlib import Path

import pytest
import torch

from entroray.errors import DataError, NumericsError
from tests.ray.stack import Stack, entroray, lines

BASE = [
    "learner.lr_high=true",
    *("experiment=quickstart", "objective=grpo", "run.steps=50", "rollout.groups_per_step=16"),
    *("generator.replicas=1", "observe.report=false", "evaluate.final=false", "data.max_prompt=128"),
]
WILD = [
    "learner.lr=1e30",
    "learner.warmup_updates=0",
    "learner.updates_per_rollout=2",
]
"""The first update throws the weights out of reach of fp32, so the second has nothing finite left."""
JUDGE = """def judge(response, prompt):
    tried = response in ("", prompt.reference) or response.startswith("word ")
    return 1.0 if tried or len(response) % 2 else 1 / 0
"""
"""It judges what is tried before the start."""
LENGTHS = f"reward.path={__file__}:lengths"


def lengths(response: str, prompt: object) -> float:
    """A reward that differs within every group, so that there is a gradient."""
    return len(response) / 100


def every_other(folder: Path) -> str:
    """A judge that raises on every other answer."""
    (folder / "mine.py").write_text(JUDGE)
    return f"reward.path={folder}/mine.py:judge"


def test_a_verifier_that_raises_on_every_other_answer_ends_the_run_with_5(
    stack: Stack, tmp_path: Path
) -> None:
    settings = [*BASE, f"model.path={stack.model}", every_other(tmp_path)]
    with pytest.raises(DataError) as ended:
        stack.wait(stack.drive(tmp_path / "run", *settings))
    assert ended.value.exit_code == 5
    for part in (r"reward.max_failed", "ZeroDivisionError", "mine.py:3"):
        assert part in str(ended.value)


def test_updates_that_are_not_finite_end_the_run_with_6_and_are_kept(
    stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    with pytest.raises(NumericsError) as ended:
        stack.wait(stack.drive(folder, *BASE, f"model.path={stack.model}", *WILD, LENGTHS))
    assert ended.value.exit_code == 6
    assert "learner.lr" in str(ended.value) and "skipped/" in str(ended.value)
    skipped, *_ = [e["fields"] for e in lines(folder / "events.jsonl") if e["kind"] == "update_skipped"]
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)  # set for this session's actors
    kept = torch.load(skipped["kept"], weights_only=False)
    assert skipped["step"] == 1 and kept["batch"].num_rows == 16 * 8


@pytest.mark.slow
@pytest.mark.parametrize("code", [5, 6])
def test_the_process_of_such_a_run_ends_with_that_code(model: str, tmp_path: Path, code: int) -> None:
    wrong = [every_other(tmp_path)] if code == 5 else [*WILD, LENGTHS]
    said = entroray("train", *BASE, f"run.dir={tmp_path}/run", f"model.path={model}", *wrong, expect=code)
    assert ("reward.max_failed" if code == 5 else "learner.lr") in said
