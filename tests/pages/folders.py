"""Run folders as a run leaves them, with texts that a page must show as text and never obey."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import yaml

from entroray.observe import rollout_records, token_records
from entroray.rows import objective_row

CUT = "\ufffd"
"""What a tokenizer makes of a part of a character."""
SCRIPT = ["<script>", "window.hacked = 1", "</script>", "<b>bold</b>", " & ", '"quoted"', "<|end|>"]
HEBREW = ["של", "ום ", "עולם", " ", "123", "\u202e", "abc", "<|end|>"]
CONTROL = ["a\x00b", "\x1b[31m", "\t", "line\n", "next", "\u200b", "\ufeff", "<|end|>"]
EMOJI = ["x=", CUT, CUT, CUT, "é", CUT, CUT, "", "<|end|>"]
EMOJI_TEXT = "x=😀é€"


class Response(NamedTuple):
    """Texts of its tokens; `text` is what the judge read."""

    texts: Sequence[str]
    text: str
    correct: bool = True
    status: str = "ok"
    prompt: str = "2+2="


HOSTILE = [
    [
        Response(SCRIPT, "".join(SCRIPT[:-1])),
        Response(HEBREW, "".join(HEBREW[:-1]), correct=False),
        Response(CONTROL, "".join(CONTROL[:-1])),
        Response(EMOJI, EMOJI_TEXT, correct=False, status="truncated"),
    ],
    [
        Response(["two ", "words ", "again ", "and "] * 5000, "two words again and " * 5000, prompt="count"),
        Response(["short", "<|end|>"], "short", correct=False, prompt="count"),
    ],
    [Response([f"t{i % 7} " for i in range(60)], "many", i % 2 == 0, prompt="many") for i in range(64)],
]
WORDS = Response(["two ", "words "] * 60, "two words " * 60, prompt="count")
SMALL = [HOSTILE[0], [WORDS, HOSTILE[1][1]], HOSTILE[2][:8]]
"""634 tokens of 14 rollouts."""


def write_run(
    folder: Path,
    groups: Sequence[Sequence[Response]] = tuple(HOSTILE),
    *,
    steps: int = 40,
    recorded: Sequence[int] = (1, 21, 40),
    ends: bool = True,
) -> Path:
    """A run of `steps` steps in `folder`, the tokens of `groups` in each of the steps `recorded`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(map(metrics_line, range(1, steps + 1))))
    write_events(folder, steps, ends)
    (folder / "config.yaml").write_text(yaml.safe_dump(config(steps)))
    (folder / "manifest.json").write_text(json.dumps({"parameters": 821120, "seed": 3, "device": "cpu"}))
    vocabulary = list(dict.fromkeys(t for g in groups for r in g for t in r.texts))
    for step in recorded:
        write_step(folder, step, groups, vocabulary)
    if recorded:
        words = json.dumps({str(i): text for i, text in enumerate(vocabulary)})
        (folder / "tokens" / "vocabulary.json").write_text(words)
    return folder


def metrics_line(step: int) -> str:
    return f"{json.dumps(metrics(step))}\n"


def metrics(step: int) -> dict[str, float]:
    """What a step measures: entropy falls, answers get right, a controller acts."""
    entropy = 0.2 + 1.5 * math.exp(-step / 100)
    found = {"entropy/p20": entropy / 3, "entropy/p50": entropy / 2, "entropy/p80": entropy * 1.2}
    found |= {"entropy/mean": entropy, "varentropy/mean": entropy / 2, "correct/mean": 0.3 + step / 100}
    found |= {"mismatch/mean_abs": 1e-7, "mismatch/max": 1e-5, "mismatch/kl": 1e-13, "length/mean": 13.0}
    found |= {f"seconds/{n}": s for n, s in (("sample", 2.0), ("score", 0.5), ("update", 1.0), ("step", 4.0))}
    found |= {"control/bonus": step / 1000, "reward/part_<form>": 0.5, "tokens/per_second": 1500.0}
    found |= {"eval/avg@4:held<out": 0.4, "eval/avg@4_low:held<out": 0.3, "eval/avg@4_high:held<out": 0.5}
    found |= {"law/a": 0.2, "law/b": 1.1}
    return {"step": step, **found, "groups/all_right": 0.1, "groups/all_wrong": 0.2}


def write_events(folder: Path, steps: int, ends: bool) -> None:
    kinds: list[tuple[str, dict[str, Any]]] = [("start", {"objective": {}}), ("checkpoint", {"step": 10})]
    kinds += [("engine_lost", {"engine": "<img src=x onerror=alert(1)>"}), ("health", {"step": 20})]
    kinds += [("trained", {"steps": steps})] if ends else []
    stamp = lambda i: f"2026-11-27T06:{i * 2:02d}:00.000+00:00"
    lines = [json.dumps({"time": stamp(i), "kind": k, "fields": f}) for i, (k, f) in enumerate(kinds)]
    (folder / "events.jsonl").write_text("".join(f"{line}\n" for line in lines))


def config(steps: int) -> dict[str, Any]:
    row = objective_row("dapo")
    row["surrogate"] = {**row["surrogate"], "high": 0.3}
    return {
        "seed": 3,
        "run": {"steps": steps, "name": "<i>name</i>"},
        "model": {"path": "tiny"},
        "data": {"task": "chain_sum", "source": "reasoning_gym"},
        "rollout": {"group_size": 4, "groups_per_step": 3},
        "learner": {"lr": 3e-4},
        "objective": row,
        "control": {"bonus": {"knob": "objective.penalties.0.coef", "fn": "linear"}},
    }


def write_step(
    folder: Path, step: int, groups: Sequence[Sequence[Response]], vocabulary: Sequence[str]
) -> None:
    """Token and rollout records of a step; entropies are those of a fixed generator."""
    draw = np.random.default_rng(step)
    rows = [r for g in groups for r in g]
    ids = {text: i for i, text in enumerate(vocabulary)}
    length = np.array([len(r.texts) for r in rows])
    n, of = int(length.sum()), np.repeat(np.arange(len(rows)), length)
    per_row = lambda values: np.repeat(np.array(values), length)
    entropy = draw.gamma(0.4, 0.6, n).astype(np.float32)
    masked = per_row([r.status != "ok" for r in rows])
    behavior = -entropy - 0.01
    named = lambda name: [name(r) for r in rows]
    columns: dict[str, Any] = {
        "step": np.full(n, step), "version": np.full(n, step - 1), "rollout": of,
        "prompt_id": per_row(named(lambda r: r.prompt)),
        "position": np.concatenate([np.arange(k) for k in length]),
        "token_id": np.array([ids[t] for r in rows for t in r.texts]),
        "logprob_behavior": behavior, "logprob_old": behavior + 1e-6, "entropy": entropy,
        "varentropy": entropy / 2, "temperature": np.ones(n),
        "advantage": per_row(named(lambda r: 1.0 if r.correct else -1.0)), "scale": np.ones(n),
        "selected": entropy > 0.05, "mask_reason": pa.array(per_row(named(lambda r: r.status)), mask=~masked),
        "reward": per_row(named(lambda r: float(r.correct))),
        "correct": per_row(named(lambda r: float(r.correct))),
        "status": per_row(named(lambda r: r.status)), "replayed": np.zeros(n, bool),
    }  # fmt: skip
    schema = token_records.SCHEMA
    arrays = [columns[f.name] if f.name in columns else pa.nulls(n, f.type) for f in schema]
    table = pa.table([a if isinstance(a, pa.Array) else pa.array(a) for a in arrays], names=schema.names)
    token_records.write_records(token_records.record_path(folder, step), table.cast(schema))
    group = [g for g, members in enumerate(groups) for _ in members]
    told = [
        {
            "step": step, "group": group[i], "rollout": i, "prompt_id": r.prompt, "prompt": f"{r.prompt}<u>",
            "siblings": [k for k in range(len(rows)) if group[k] == group[i] and k != i], "reference": "4",
            "response": r.text, "answer": "<4>" if r.correct else None, "reward": float(r.correct),
            "correct": r.correct, "parts": '{"form": 0.5}', "status": r.status, "detail": "", "seed": 7 + i,
            "version_first": step - 1, "version_last": step - 1, "length": len(r.texts), "limit": 32,
            "temperature": 1.0, "replayed": False,
        }
        for i, r in enumerate(rows)
    ]  # fmt: skip
    records = pa.Table.from_pylist(told, schema=rollout_records.SCHEMA)
    token_records.write_records(token_records.record_path(folder, step, "rollouts"), records)


def write_curves(
    folder: Path, seed: int, *, right: Sequence[float], row: str = "grpo", lr: float = 3e-4, **more: Any
) -> Path:
    """A run of a step for each of `right`, its share of right answers, with settings of its own."""
    folder.mkdir(parents=True)
    lines = [metrics(step) | {"correct/mean": r} for step, r in enumerate(right, start=1)]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    write_events(folder, len(right), True)
    settings = config(len(right)) | {"seed": seed, "objective": objective_row(row), "control": {}} | more
    settings |= {"run": {"steps": 30, "dir": str(folder)}, "learner": {"lr": lr}}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    (folder / "manifest.json").write_text(json.dumps({"commit": "abc1234"}))
    return folder
