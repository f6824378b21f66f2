"""A lab on the real stack: a run in the reused machine against a fresh process, the failed, the killed."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from entroray.cli.verify_resume import differences
from entroray.observe import cells as stored

SMALL = [
    *("experiment=quickstart", "run.steps=3", "rollout.groups_per_step=8", "rollout.max_tokens=12"),
    *("data.size=2000", "data.max_prompt=128", "generator.replicas=1", "driver.refill_limit=1"),
    *("observe.tokens.every=1", "observe.report=false", "evaluate.prompts=16", "evaluate.samples=2"),
    "evaluate.final=false",
]


def entroray(*arguments: str, expect: int = 0) -> str:
    command = [sys.executable, "-m", "entroray", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=os.environ, check=False)
    assert done.returncode == expect, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_a_run_in_a_reused_machine_is_a_fresh_process_bit_for_bit(tmp_path: Path, model: str) -> None:
    """dapo finds no undecided group with a random model: it fails, and the others go on."""
    folder, told = tmp_path / "lab", [*SMALL, f"model.path={model}"]
    said = entroray("lab", f"--dir={folder}", *told, "objective=grpo,dapo,kl_cov", "seed=1", expect=5)
    assert "3 cells asked for, 0 done before" in said and "failed: quickstart, dapo, seed 1" in said
    status = {c.objective: c.status for c in stored.load(folder)}
    assert status == {"grpo": "done", "dapo": "failed", "kl_cov": "done"}

    killed = next(c for c in stored.load(folder) if c.objective == "kl_cov")
    stored.save(folder, replace(killed, status="missing", measured={}))
    said = entroray("lab", f"--dir={folder}", *told, "objective=grpo,kl_cov", "seed=1,2")
    assert "4 cells asked for, 1 done before" in said
    cells = [c for c in stored.load(folder) if c.status == "done"]
    assert [c.seed for c in cells] == [1, 2, 1, 2]
    assert all({"after/greedy", "before/pass@2", "after/entropy/mean"} <= c.measured.keys() for c in cells)
    assert len((folder / "cells.csv").read_text().splitlines()) == 6

    last = next(c for c in cells if (c.objective, c.seed) == ("kl_cov", 2))
    entroray("train", *last.overrides, f"run.dir={tmp_path}/fresh")
    assert differences(tmp_path / "fresh", stored.path(folder, last), after=0) == []
