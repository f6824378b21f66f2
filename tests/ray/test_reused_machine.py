"""A lab on the real stack: a run in the reused machine against a fresh process, the failed, the killed."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from entroray.cli.verify_resume import differences
from entroray.observe import lab_cells

SMALL = [
    "learner.lr_high=true",
    *("experiment=quickstart", "run.steps=3", "rollout.groups_per_step=8", "rollout.max_tokens=12"),
    *("++data.settings.size=2000", "data.max_prompt=128", "generator.replicas=1"),
    *("observe.tokens.every=1", "observe.report=false", "evaluate.prompts=16", "evaluate.samples=2"),
    "evaluate.final=false",
]


def entroray(*arguments: str, expect: int = 0) -> str:
    command = [sys.executable, "-m", "entroray", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=os.environ, check=False)
    assert done.returncode == expect, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


BROKEN = "model.attention=sdpa,nonesuch"
"""A setting that is well, and one that only the rank can refuse, as it loads the model."""


@pytest.mark.slow
def test_a_run_in_a_reused_machine_is_a_fresh_process_bit_for_bit(tmp_path: Path, model: str) -> None:
    """Any reward that a random model sometimes earns: without one, no weight would ever move."""
    (tmp_path / "mine.py").write_text("def odd(response, prompt):\n    return float(len(response) % 2)\n")
    folder, told = tmp_path / "lab", [*SMALL, f"model.path={model}", f"reward.path={tmp_path}/mine.py:odd"]
    lab = ["lab", f"--dir={folder}", *told]
    said = entroray(*lab, "objective=grpo", "seed=1,2", BROKEN, expect=3)
    assert "4 cells asked for, 0 done before" in said
    assert said.count("failed: quickstart, grpo") == 2
    assert [c.status for c in lab_cells.load_cells(folder)].count("done") == 2

    killed = next(c for c in lab_cells.load_cells(folder) if c.status == "done" and c.seed == 2)
    lab_cells.save_cell(folder, replace(killed, status="missing", measured={}))
    said = entroray(*lab, "objective=grpo,kl_cov", "seed=1,2", "model.attention=sdpa")
    assert "4 cells asked for, 1 done before" in said
    done = {(c.objective, c.seed): c for c in lab_cells.load_cells(folder) if c.status == "done"}
    assert done.keys() == {(name, seed) for name in ("grpo", "kl_cov") for seed in (1, 2)}
    measured = done["kl_cov", 2].measured
    assert {"after/greedy", "before/pass@2", "after/entropy/mean"} <= measured.keys()
    assert measured["before/entropy/mean"] != measured["after/entropy/mean"]
    assert len((folder / "cells.csv").read_text().splitlines()) == 7

    entroray("train", *done["kl_cov", 2].overrides, f"run.dir={tmp_path}/fresh")
    assert differences(tmp_path / "fresh", lab_cells.cell_path(folder, done["kl_cov", 2]), after=0) == []
