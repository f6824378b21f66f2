"""The command line on the real stack: what a run writes, and that its model is the model it trained."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest

STEPS = 3
SMALL = [
    "objective=grpo",
    f"run.steps={STEPS}",
    "rollout.groups_per_step=8",
    "generator.replicas=1",
    "learner.updates_per_rollout=2",
    "observe.tokens.every=1",
    "evaluate.prompts=32",
    "evaluate.final=false",
    "model.warm_start.band=[0.0,1.0]",
    "model.warm_start.check_every=40",
]


def entroray(*arguments: str, cache: Path, expect: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "entroray", *arguments],
        capture_output=True,
        text=True,
        timeout=280,
        env=os.environ | {"ENTRORAY_CACHE": str(cache)},
        check=False,
    )
    assert done.returncode == expect, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def finished(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """One short run of the quickstart, its warm start included."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    said = entroray("train", "experiment=quickstart", f"run.dir={folder}", *SMALL, cache=cache)
    return folder, said


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_writes_what_it_promises(finished: tuple[Path, str]) -> None:
    folder, said = finished
    rows = metrics(folder)
    assert [r["step"] for r in rows] == [1, 2, 3]
    for name in ("config.yaml", "manifest.json", "events.jsonl", "report.html", "model/model.safetensors"):
        assert (folder / name).stat().st_size > 0, name
    assert list((folder / "tensorboard").iterdir())
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["packages"]["ray"] and manifest["seed"] == 0 and manifest["sync/probe_error"] < 1e-4
    assert all(r["lag/max"] == 0 and r["mismatch/max"] < 1e-3 for r in rows)
    assert "min(r A, clip(r, 0.8, 1.2) A)" in said and "entropy" in said


def test_token_records_give_the_entropy_the_journal_says(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    table = f"'{folder}/tokens/*.parquet'"
    query = f"select step, avg(entropy), count(*) from {table} where mask_reason is null group by 1"
    found = {step: (mean, n) for step, mean, n in duckdb.connect().execute(query).fetchall()}
    assert len(found) == STEPS
    for row in metrics(folder):
        assert found[row["step"]][0] == pytest.approx(row["entropy/mean"], abs=1e-6)
        assert found[row["step"]][1] > 64


def test_the_exported_model_is_the_same_for_transformers_and_vllm(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    done = subprocess.run(
        [sys.executable, "-c", BOTH, str(folder / "model")],
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    )
    ours, theirs = json.loads(done.stdout.splitlines()[-1])
    assert ours == theirs and len(ours) == 4


BOTH = """
import json, os, sys
from entroray.workers import cluster
os.environ.update(cluster.environment() | cluster.CPU_ONLY)
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm import LLM, SamplingParams
from entroray.policy.tokenizer import chat
path = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(path)
prompts = [list(chat(tokenizer, None)(q)) for q in ("3+4=", "9-5-2=", "1+1+1=", "0-7=")]
model = AutoModelForCausalLM.from_pretrained(path)
greedy = dict(max_new_tokens=20, do_sample=False)
a = [model.generate(torch.tensor([p]), **greedy)[0, len(p):].tolist() for p in prompts]
llm = LLM(path, dtype="float32", max_model_len=64, kv_cache_memory_bytes=64 << 20, enforce_eager=True)
out = llm.generate([{"prompt_token_ids": p} for p in prompts],
                   SamplingParams(temperature=0, max_tokens=20), use_tqdm=False)
print(json.dumps([a, [list(o.outputs[0].token_ids) for o in out]]))
"""


def test_eval_reads_the_exported_model_in_a_process_of_its_own(
    finished: tuple[Path, str], cache: Path, tmp_path: Path
) -> None:
    folder, _ = finished
    out = tmp_path / "eval.json"
    arguments = [f"--config={folder}/config.yaml", f"--out={out}", f"model.path={folder}/model"]
    entroray("eval", *arguments, cache=cache)
    result = json.loads(out.read_text())
    assert result["prompts"] == 32 and 0 <= result["greedy"] <= 1
    assert result["pass@1"] <= result["pass@2"] <= result["pass@8"]


def test_two_ranks_two_engines_a_lag_of_one_and_a_reward_of_ones_own(
    cache: Path, finished: Any, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text("def short(response, prompt):\n    return float(len(response) < 12)\n")
    said = entroray(
        "train",
        "experiment=quickstart",
        f"run.dir={tmp_path}/wide",
        *SMALL,
        "learner.ranks=2",
        "learner.zero_stage=3",
        "generator.replicas=2",
        "driver.max_lag=1",
        f"reward.path={tmp_path}/mine.py:short",
        "objective.surrogate.high=0.28",
        cache=cache,
    )
    rows = metrics(tmp_path / "wide")
    assert [r["lag/max"] for r in rows][-1] <= 1 and rows[-1]["groups/refused"] == 0
    assert max(r["lag/max"] for r in rows) == 1
    assert "clip(r, 0.8, 1.28)" in said


def test_gsm8k_runs_with_math_verify_as_judge(cache: Path, tmp_path: Path) -> None:
    """The real file where it lies beside the checkout, else rows of its form."""
    data = Path(__file__).parents[3] / "shared" / "data" / "gsm8k" / "train.jsonl"
    if not data.is_file():
        data = tmp_path / "train.jsonl"
        row = lambda a: {"question": f"What is {a} plus 4?", "answer": f"<<{a}+4={a + 4}>>\n#### {a + 4}"}
        data.write_text("".join(json.dumps(row(a)) + "\n" for a in range(200)))
    entroray(
        "train",
        "experiment=gsm8k",
        f"data.task={data}",
        "run.steps=2",
        f"run.dir={tmp_path}/gsm8k",
        "rollout.groups_per_step=4",
        "rollout.max_tokens=48",
        cache=cache,
    )
    rows = metrics(tmp_path / "gsm8k")
    assert len(rows) == 2 and all(np.isfinite(r["entropy/mean"]) for r in rows)


def test_refusals_have_their_exit_codes(cache: Path, finished: tuple[Path, str]) -> None:
    assert "run.steps" in entroray("train", "run.stepz=1", cache=cache, expect=2)
    folder, _ = finished
    again = entroray("train", "experiment=quickstart", f"run.dir={folder}", *SMALL, cache=cache, expect=3)
    assert "already holds a run" in again
    wide = ["learner.ranks=9", f"run.dir={folder}-never"]
    said = entroray("train", "experiment=quickstart", *SMALL, *wide, cache=cache, expect=3)
    assert "the cluster is too small" in said and "9 learner ranks x 0.4" in said


def test_a_dry_run_says_what_would_run(cache: Path, finished: Any) -> None:
    said = entroray("train", "experiment=quickstart", *SMALL, "run.dry=true", cache=cache)
    assert "generators: 1 x 0.4 CPU" in said and "MiB" in said
