"""Settings moved while real engines run: each reaches the role it is for, and a resume goes on with them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BONUS = "objective.penalties.0.coef"
CONTROL = {
    "bonus": f"{{knob: {BONUS}, fn: pi, signal: entropy/mean, target: 9, gain: 0.1, integral: 0.01, "
    "low: 0, high: 1}",
    "lr": "{knob: learner.lr, fn: linear, start: 1e-3, end: 2e-4, steps: 5}",
    "heat": "{knob: sampler.temperature, fn: stage, values: [1.0, 1.2, 0.9], until: [1, 3]}",
}
BASE = [
    *("experiment=quickstart", "objective=grpo", "objective.penalties=[{fn: entropy_bonus, coef: 0.0}]"),
    *("rollout.groups_per_step=4", "data.size=2000", "data.max_prompt=128", "generator.replicas=1"),
    *("learner.warmup_updates=0", "observe.diagnosis.every=0", "observe.prediction.every=0"),
]


def test_moved_settings_act_and_a_resumed_run_goes_on_with_them(tmp_path: Path, model: str) -> None:
    settings = [*BASE, *(f"+control.{name}={spec}" for name, spec in CONTROL.items()), f"model.path={model}"]
    command = [
        sys.executable,
        "-m",
        "entroray",
        "verify-resume",
        *settings,
        "--steps=2",
        f"--dir={tmp_path}/both",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"bonus: {BONUS} <- pi(" in done.stdout and "of entropy/mean, 1 step(s) late" in done.stdout
    rows = [json.loads(line) for line in (tmp_path / "both/resumed/metrics.jsonl").read_text().splitlines()]
    coefs = [row["control/bonus"] for row in rows]
    assert coefs[0] == 0.0 < coefs[1] and len(set(coefs)) == 4
    assert [row["update/lr"] for row in rows] == pytest.approx([1e-3, 8e-4, 6e-4, 4e-4])
    assert temperatures(tmp_path / "both/resumed") == pytest.approx([1.0, 1.2, 1.2, 0.9])
    # a random policy is rewarded by nothing else, so the loss shows that the coefficient was in effect
    losses = [row["update/loss"] for row in rows]
    assert abs(losses[0]) < 0.1 and losses[3] < -0.2


def temperatures(folder: Path) -> list[float]:
    import duckdb

    query = (
        f"select step, any_value(temperature) from '{folder}/tokens/*.parquet' group by step order by step"
    )
    return [temperature for _, temperature in duckdb.sql(query).fetchall()]
