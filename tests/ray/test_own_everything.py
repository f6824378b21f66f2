"""The one command of README's "Your own": data, model, reward, sets and tracker, killed and gone on with."""

import json
import os
import signal
from importlib.util import find_spec
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from tests.families import models
from tests.ray.processes import left_over, printed_at_end, start, step_reached, steps, until
from tests.ray.stack import metrics

SHORT = "def short(response, prompt):\n    return 1.0 if response.tokens < 16 else 0.0\n"
STEPS = 5


def rows(start: int, end: int) -> list[dict[str, object]]:
    """As verl has them."""
    return [
        {
            "data_source": "mine",
            "prompt": [{"role": "system", "content": "Add."}, {"role": "user", "content": f"{n} + {n}?"}],
            "reward_model": {"style": "rule", "ground_truth": str(2 * n)},
            "extra_info": {"index": n},
        }
        for n in range(start, end)
    ]


@pytest.fixture
def typed(tmp_path: Path) -> list[str]:
    """The command, run in `tmp_path`, where its files are."""
    models.write("llama", tmp_path / "my_llama")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows(0, 60)), tmp_path / "train.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows(55, 63)), tmp_path / "near.parquet")
    far = [{"problem": f"{n} + 1?", "answers": [str(n + 1), f"{n + 1}.0"]} for n in range(900, 906)]
    (tmp_path / "far.jsonl").write_text("\n".join(map(json.dumps, far)))
    (tmp_path / "my_reward.py").write_text(SHORT)
    tracker = "{fn: wandb, mode: offline}" if find_spec("wandb") else "{fn: csv}"
    return [
        *("train", "data=table", "data.task=train.parquet", "model.path=my_llama", "reward.judge={}"),
        "data.settings={question: prompt, answer: reward_model.ground_truth}",
        "reward.parts={answer: {fn: math, extract: last_line}, form: {fn: format, pattern: '.*[0-9].*', "
        "weight: 0.2}, short: {path: 'my_reward.py:short', weight: 0.1}}",
        *("reward.correct=answer", "evaluate.every=2", "run.dir=mine", f"observe.trackers=[{tracker}]"),
        "evaluate.sets={near: {task: near.parquet, settings: {question: prompt, answer: "
        "reward_model.ground_truth}, judge: {fn: math, extract: last_line}, samples: 2}, far: {task: "
        "far.jsonl, "
        "settings: {question: problem, answer: answers}, judge: {fn: math, extract: last_line}, samples: 2, "
        "temperature: 0.6}}",
        *(f"run.steps={STEPS}", "run.resume=auto", "checkpoint.every=1", "data.max_prompt=96"),
        *("rollout.max_tokens=24", "rollout.groups_per_step=4", "rollout.group_size=4", "evaluate.prompts=4"),
        *("learner.lr=1e-3", "learner.lr_high=true"),
        *("driver.probe.tolerance=0.01", "generator.threads=1", "learner.threads=1"),
    ]


@pytest.mark.slow
def test_everything_of_ones_own_is_trained_on_killed_and_gone_on_with(
    typed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shared = set(os.listdir("/dev/shm"))
    process = start(*typed)
    until(process, step_reached(tmp_path / "mine", 2), seconds=240.0)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    assert not left_over([], shared)
    said = printed_at_end(start(*typed), 0, seconds=300.0)
    assert steps(tmp_path / "mine") == [*range(1, STEPS + 1)], said[-2000:]
    assert "5 of 8 questions" in said and "training" in said
    journalled = {name for row in metrics(tmp_path / "mine") for name in row}
    assert {f"reward/part_{part}" for part in ("answer", "form", "short")} <= journalled
    evaluated = {name.rpartition(":")[2] for name in journalled if name.startswith("eval/") and ":" in name}
    assert {"near", "far"} <= evaluated
    assert [*(tmp_path / "mine").glob("wandb/offline-run-*" if find_spec("wandb") else "metrics.csv")]
