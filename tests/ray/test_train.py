"""The command line on the real stack: what a run writes, and that its model is the model it trained."""

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest
import ray
import torch

from entroray.engine.generator import Generator, Request
from entroray.policy.tokenizer import chat, load_tokenizer
from entroray.types import Draw
from entroray.wiring import actors, compose
from entroray.workers import cluster
from entroray.workers.cluster import Share
from tests.documented import IN_A_RUN, matches
from tests.ray.stack import FinishedRun, entroray, entroray_here, metrics
from tests.records import query
from tests.traces import overlaps, spans


def test_a_run_writes_what_it_promises(finished_run: FinishedRun) -> None:
    folder, printed = finished_run.folder, finished_run.printed
    rows = metrics(folder)
    assert [r["step"] for r in rows] == [1, 2, 3, 4, 5, 6]
    for name in ("config.yaml", "manifest.json", "events.jsonl", "report.html", "model/model.safetensors"):
        assert (folder / name).stat().st_size > 0, name
    assert list((folder / "tensorboard").iterdir())
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["packages"]["ray"] and manifest["seed"] == 0 and manifest["sync/probe_error"] < 1e-4
    assert all(r["lag/max"] == 0 and r["mismatch/max"] < 1e-3 for r in rows)
    assert "min(r A, clip(r, 0.8, 1.2) A)" in printed and "entropy" in printed
    assert "sampler    rule fixed" in printed and "warm start of a" in printed


def test_every_metric_of_a_run_is_in_the_catalogue(finished_run: FinishedRun) -> None:
    names = {name for row in metrics(finished_run.folder) for name in row} - {"step"}
    assert [name for name in sorted(names) if not matches(name, IN_A_RUN)] == []


def test_a_set_is_evaluated_before_the_first_step_every_few_and_after_the_last(
    finished_run: FinishedRun,
) -> None:
    folder, printed = finished_run.folder, finished_run.printed
    kept = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    (first,) = [event["fields"] for event in kept if event["kind"] == "evaluation"]
    found = [first, *(row for row in metrics(folder) if "eval/avg@4:sums" in row)]
    assert [row["step"] for row in found] == [0, 2, 4, 6]
    for row in found:
        low, mean, high = (row[f"eval/avg@4{end}:sums"] for end in ("_low", "", "_high"))
        assert 0 <= low <= mean <= high <= 1 and row["eval/pass@4:sums"] >= mean == row["eval/pass@1:sums"]
        assert row["eval/failed:sums"] == 0 and 0 < row["eval/entropy/mean:sums"] < 4
        assert 1 < row["eval/length/mean:sums"] <= 40 and "eval/greedy" in row
    assert "evaluated  sums: chain_sum, 12 prompts x 4 samples, temperature 0.7, top-p 0.9" in printed
    assert "questions are in the training data, too" in printed and "step 6: sums: avg@4 " in printed
    assert "eval/avg@4:sums" in (folder / "report.html").read_text()
    assert json.loads((folder / "manifest.json").read_text())["evaluation_sets"]


def test_the_trace_of_a_run_has_every_role_and_its_seconds(finished_run: FinishedRun) -> None:
    rows, found = metrics(finished_run.folder), spans(finished_run.folder / "trace.json.gz")
    assert {"generator 0", "learner rank 0", "verifier 0", "driver", "sync", "steps"} <= found.keys()
    assert [e["name"] for e in found["steps"]] == [f"step {row['step']}" for row in rows]
    for step, row in zip(found["steps"], rows, strict=True):
        within = [e for e in found["driver"] if 0 <= e["ts"] - step["ts"] < step["dur"]]
        for phase in ("sample", "score", "update"):
            lasted = sum(e["dur"] for e in within if e["name"] == phase)
            assert lasted == pytest.approx(1e6 * row.get(f"seconds/{phase}", 0.0), abs=2)
        calls = [e for e in found["learner rank 0"] if 0 <= e["ts"] - step["ts"] < step["dur"]]
        at_work = sum(e["dur"] for e in calls) / step["dur"]
        assert at_work == pytest.approx(1 - row["idle/learner"], abs=0.02), "one call to a rank at a time"
        assert {e["name"] for e in calls} >= {"update", "sync"}
        assert 0 < row["idle/generator"] < 1 and 0 < row["idle/driver"] < 1 and 0 < row["idle/verifier"] < 1
    drawn = sum(e["args"].get("tokens", 0) for e in found["generator 0"])
    assert drawn >= rows[-1]["tokens/drawn"] > 0, "evaluations are drawn too"
    assert all(overlaps(track) == 0 for track in found.values())


def test_token_records_give_the_entropy_the_journal_says(finished_run: FinishedRun) -> None:
    table = f"'{finished_run.folder}/tokens/*.parquet'"
    rows = query(
        f"select step, avg(entropy) as mean, count(*) as n from {table} where mask_reason is null group by 1"
    )
    found, steps = {row["step"]: row for row in rows}, metrics(finished_run.folder)
    assert len(found) == len(steps)
    for row in steps:
        assert found[row["step"]]["mean"] == pytest.approx(row["entropy/mean"], abs=1e-6)
        assert found[row["step"]]["n"] > 64


def test_the_exported_model_is_the_same_for_transformers_and_vllm(
    finished_run: FinishedRun, local_ray: None
) -> None:
    """Twenty greedy tokens of each; the engine, which is this test's own, loads the folder too."""
    from transformers import AutoModelForCausalLM

    folder = str(finished_run.folder / "model")
    rendered = chat(load_tokenizer(folder), None)
    prompts = [tuple(rendered(q)) for q in ("3+4=", "9-5-2=", "1+1+1=", "0-7=")]
    model = AutoModelForCausalLM.from_pretrained(folder)
    greedy = {"max_new_tokens": 20, "do_sample": False}
    ours = [model.generate(torch.tensor([p]), **greedy)[0, len(p) :].tolist() for p in prompts]
    options = actors.engine_options(compose.load_config([])[0])
    sizes = {"dtype": "float32", "max_length": 64, "seed": 0, "engine": options}
    engine = cluster.spawn(Generator, Share(0.1, 0.0, 1), folder, **sizes)

    async def theirs() -> list[list[int]]:
        asked = [engine.sample.remote(Request("q", p, (0,), Draw(0.0, 20), 60.0)) for p in prompts]
        drawn = [await cluster.settle(a, deadline=240.0, what="engine") for a in asked]
        return [rollouts[0].token_ids.tolist() for rollouts in drawn]

    assert asyncio.run(theirs()) == ours and len(ours) == 4
    ray.kill(engine)


def test_two_ranks_two_engines_a_lag_of_one_a_sampler_and_a_reward_of_ones_own(
    finished_run: FinishedRun, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text("def short(response, prompt):\n    return float(len(response) < 12)\n")
    wide = ["learner.ranks=2", "learner.zero_stage=3", "generator.replicas=2", "driver.max_lag=1"]
    wide += ["sampler=quadrants", "observe.report=false", "run.steps=3"]
    wide += [f"reward.path={tmp_path}/mine.py:short", "objective.surrogate.high=0.28"]
    printed = entroray(
        *("train", "experiment=quickstart", "objective=grpo", "rollout.groups_per_step=8", *wide),
        *("learner.updates_per_rollout=2", "evaluate.final=false", "learner.lr_high=true"),
        *(f"model.path={finished_run.first_model}", f"run.dir={tmp_path}/wide"),
    )
    rows = metrics(tmp_path / "wide")
    assert [r["step"] for r in rows] == [1, 2, 3]
    assert [r["lag/max"] for r in rows][-1] <= 1 and rows[-1]["groups/refused"] == 0
    assert max(r["lag/max"] for r in rows) == 1
    assert "clip(r, 0.8, 1.28)" in printed and "sampler    rule quadrants" in printed


@pytest.mark.slow
def test_gsm8k_runs_with_math_verify_as_judge(tmp_path: Path) -> None:
    """The real file where it lies beside the checkout, else rows of its form."""
    data = Path(__file__).parents[3] / "shared" / "data" / "gsm8k" / "train.jsonl"
    if not data.is_file():
        data = tmp_path / "train.jsonl"
        row = lambda a: {"question": f"What is {a} plus 4?", "answer": f"<<{a}+4={a + 4}>>\n#### {a + 4}"}
        data.write_text("".join(json.dumps(row(a)) + "\n" for a in range(200)))
    entroray(
        *("train", "experiment=gsm8k", f"data.task={data}", "run.steps=2", f"run.dir={tmp_path}/gsm8k"),
        *("rollout.groups_per_step=4", "rollout.max_tokens=48"),
    )
    rows = metrics(tmp_path / "gsm8k")
    assert len(rows) == 2 and all(np.isfinite(r["entropy/mean"]) for r in rows)


def test_refusals_have_their_exit_codes(finished_run: FinishedRun, tmp_path: Path) -> None:
    assert "run.steps" in entroray("train", "run.stepz=1", expect=2)
    again = ["train", *finished_run.overrides, f"run.dir={finished_run.folder}"]
    assert "already holds a run" in entroray_here(*again, expect=3)
    wide = ["train", *finished_run.overrides, "learner.ranks=9", f"run.dir={tmp_path}/never"]
    printed = entroray_here(*wide, expect=3)
    assert "the cluster is too small" in printed and "9 learner ranks x 0.4" in printed


def test_a_dry_run_says_what_would_run(finished_run: FinishedRun) -> None:
    printed = entroray_here("train", *finished_run.overrides, "run.dry=true")
    assert "generators: 1 x 0.4 CPU" in printed and "MiB" in printed
