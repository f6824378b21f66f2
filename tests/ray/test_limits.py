"""Runs that go wrong for reasons of their own end with the code for it, and say what to look at."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

BASE = [
    *("experiment=quickstart", "objective=grpo", "run.steps=50", "rollout.groups_per_step=16"),
    *("generator.replicas=1", "observe.report=false", "evaluate.final=false", "data.max_prompt=128"),
]


def train(folder: Path, model: str, *overrides: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "entroray", "train", *BASE, f"run.dir={folder}", f"model.path={model}"]
    done = subprocess.run(
        [*command, *overrides], env=os.environ, capture_output=True, text=True, timeout=200, check=False
    )
    return done.returncode, done.stderr


def test_a_verifier_that_raises_on_every_other_answer_ends_the_run_with_5(tmp_path: Path, model: str) -> None:
    (tmp_path / "mine.py").write_text(
        "def judge(response, prompt):\n    return 1.0 if len(response) % 2 else 1 / 0\n"
    )
    code, said = train(tmp_path / "run", model, f"reward.path={tmp_path}/mine.py:judge")
    assert code == 5, said
    assert "reward.max_failed" in said and "ZeroDivisionError" in said and "mine.py:2" in said


def test_updates_that_are_not_finite_end_the_run_with_6_and_are_kept(tmp_path: Path, model: str) -> None:
    """The first update throws the weights out of reach of fp32, so the second has nothing finite left."""
    wild = ["learner.lr=1e30", "learner.warmup_updates=0", "learner.updates_per_rollout=2"]
    code, said = train(tmp_path / "run", model, *wild, "run.steps=4", f"reward.path={LENGTHS}")
    assert code == 6, said
    assert "learner.lr" in said and "skipped/" in said
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    skipped, *_ = [e["fields"] for e in events if e["kind"] == "update_skipped"]
    kept = torch.load(skipped["kept"], weights_only=False)
    assert skipped["step"] == 1 and kept["batch"].num_rows == 16 * 8


LENGTHS = f"{Path(__file__)}:lengths"


def lengths(response: str, prompt: object) -> float:
    """A reward that differs within every group, so that there is a gradient."""
    return len(response) / 100
