"""tests/gpu/prove.sh --dry: every part of the proof on a card, with tiny shapes on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PARTS = "abcdefgh"
ABSENT = {"liger"}
"""Steps whose package the default lane does not install."""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_part_of_the_proof_runs_on_the_cpu(tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable}
    command = [ROOT / "tests/gpu/prove.sh", "--dry", "--results", tmp_path, "all"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=570)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    for part in PARTS:
        found = json.loads((tmp_path / f"{part}-no-card.json").read_text())
        assert list(found["steps"]) == found["planned"]
        said = {name: {c["verdict"] for c in step["checks"]} for name, step in found["steps"].items()}
        absent = {name for name, verdicts in said.items() if "not there" in verdicts}
        assert all(said.values()) and (absent <= ABSENT), said
