"""What a run writes down: the journal, the records every metric can be derived from, console, report."""

import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from entroray.cli import train
from entroray.metrics import step_metrics
from entroray.metrics.by_domain import judged_metrics
from entroray.observe import console, report, token_records
from entroray.observe.journal import Journal, read_metrics
from entroray.observe.run_data import PLOTS
from entroray.policy.tokenizer import byte_tokenizer
from entroray.types import Counts, Group, Prompt, Rollout, Status, Tokens, Verdict
from entroray.wiring.parts import build_parts
from tests.composed import configured
from tests.documented import IN_A_RUN, matches
from tests.records import query

COLUMNS = token_records.SCHEMA.names
WORDS = {0: "<b>", 1: " so", 2: "\n"}
METRICS = {"correct/mean": 0.25, "entropy/mean": 1.2345, "entropy/p80": 2.5, "lag/max": 1.0} | {
    "tokens/per_second": 1234.4,
    "seconds/sample": 3.21,
    "seconds/score": 0.55,
    "seconds/update": 2.0,
    "seconds/sync": 0.07,
    "seconds/step": 6.0,
    "idle/generator": 0.4,
}


def a_step(version=0, entropy=(0.1, 0.2, 0.7, math.nan, 0.3, 0.4, 0.6)):
    """Two groups of two: lengths 3, 1, 0, 3; token 3, the whole of rollout 1, is masked out and all NaN."""
    lengths = [3, 1, 0, 3]
    kind = [Status.OK, Status.TRUNCATED, Status.OK, Status.OK]
    n, row = 7, torch.tensor([0, 0, 0, 1, 3, 3, 3])
    mask = torch.tensor(entropy).isfinite()
    hole = torch.where(mask, 0.0, torch.nan)
    behavior = torch.linspace(-2, -0.2, n) + hole
    rollouts = [
        Rollout(
            prompt_id="ab"[i // 2],
            token_ids=np.arange(k, dtype=np.int32),
            logprobs=behavior[row == i].numpy(),
            versions=np.full(k, version, np.int32),
            text="",
            temperature=0.7,
            limit=3,
            status=kind[i],
        )
        for i, k in enumerate(lengths)
    ]
    right = Verdict(0.5, True, parts={"form": 0.5, "odd": math.nan})
    verdicts = [right, Verdict(0.0, False), Verdict(0.0, False), Verdict(1.0, True)]
    groups = [
        Group(Prompt("ab"[g], "", (1,), ""), tuple(rollouts[s]), tuple(verdicts[s]))
        for g, s in enumerate((slice(0, 2), slice(2, 4)))
    ]
    tokens = Tokens(
        row=row,
        position=torch.tensor([0, 1, 2, 0, 0, 1, 2]),
        uid=torch.arange(n),
        mask=mask,
        logprobs=behavior + 0.125,
        entropy=torch.tensor(entropy, dtype=torch.float64),
        varentropy=torch.full((n,), 0.5) + hole,
        old_logprobs=behavior + 0.125,
        behavior_logprobs=behavior,
        ref_logprobs=None,
        temperature=torch.full((n,), 0.7),
        advantages=torch.tensor([1.0, 1, 1, -1, -1, -1, -1]) + hole,
        scale=torch.ones(n),
        correction=torch.ones(n),
        selected=torch.arange(n) == 2,
        group=torch.tensor([0, 0, 1, 1]),
        length=torch.tensor(lengths),
        reward=torch.tensor([v.reward for v in verdicts]),
        correct=torch.tensor([v.correct for v in verdicts]),
        version=torch.tensor([r.version for r in rollouts]),
        step=2,
        counts=Counts(6, 6, 4, 2),
    )
    return groups, tokens


def journal(run_dir, tokens_every=0, **options):
    return Journal(run_dir, tokens_every=tokens_every, **options)


def write(book, *steps, **metrics):
    for step in steps:
        book.step(step, {"entropy/mean": step / 10} | metrics, *a_step())


def test_every_metric_can_be_derived_from_the_token_records(tmp_path):
    groups, tokens = a_step(version=1)
    metrics = step_metrics(groups, tokens)
    journal(tmp_path, tokens_every=1).step(3, metrics, groups, tokens)
    file = tmp_path / "tokens" / "step-000003.parquet"
    sql = f"""
        select avg(entropy::double) as "entropy/mean", quantile_cont(entropy::double, 0.8) as "entropy/p80",
        avg(abs(logprob_old::double - logprob_behavior)) as "mismatch/mean_abs",
        avg(entropy::double) filter (advantage > 0) as "entropy/positive",
        avg(step - 1 - version) as "lag/mean"
        from '{file}' where mask_reason is null"""
    (derived,) = query(sql)
    assert (len(derived), metrics["lag/mean"]) == (5, 1.0)
    for name, value in derived.items():
        assert value == pytest.approx(metrics[name], abs=1e-9), name
    assert metrics["entropy/mean"] == pytest.approx((0.1 + 0.2 + 0.7 + 0.3 + 0.4 + 0.6) / 6, abs=1e-6)


def test_record_columns_and_values(tmp_path):
    table = token_records.record_table(3, *a_step(version=1))
    token_records.write_records(tmp_path / "x.parquet", table)
    read_back = pq.read_table(tmp_path / "x.parquet")
    assert read_back.column_names == COLUMNS
    assert pq.ParquetFile(tmp_path / "x.parquet").metadata.row_group(0).column(0).compression == "ZSTD"
    assert str(read_back.schema.field("entropy").type) == "float"
    rows = read_back.to_pylist()
    assert (rows[2]["parts"], rows[3]["parts"]) == ('{"form": 0.5, "odd": null}', None)
    assert [r["rollout"] for r in rows] == [0, 0, 0, 1, 3, 3, 3]
    assert [r["token_id"] for r in rows] == [0, 1, 2, 0, 0, 1, 2]
    assert [r["prompt_id"] for r in rows] == list("aaaabbb")
    assert [r["mask_reason"] for r in rows] == [None, None, None, "truncated", None, None, None]
    assert (rows[3]["status"], rows[4]["status"]) == ("truncated", "ok")
    assert (rows[2]["selected"], rows[3]["selected"]) == (True, False)
    assert (rows[0]["reward"], rows[0]["correct"], rows[4]["reward"]) == (0.5, 1.0, 1.0)
    assert list(tmp_path.iterdir()) == [tmp_path / "x.parquet"]


def test_the_columns_of_a_record_are_those_documented(tmp_path):
    token_records.write_records(tmp_path / "x.parquet", token_records.record_table(2, *a_step()))
    rows = []
    for field in pq.read_schema(tmp_path / "x.parquet"):
        kind = "text" if field.type == token_records.WORD else str(field.type)
        said = {name.decode(): text.decode() for name, text in field.metadata.items()}
        rows.append(f"| `{field.name}` | {kind} | {said['unit'] or '-'} | {said['meaning']} |")
    assert len(rows) == len(COLUMNS) == len(set(COLUMNS)) == 26
    page = Path(token_records.__file__).with_name("README.md").read_text()
    head = "| column | type | unit | meaning |\n|---|---|---|---|\n"
    assert head + "\n".join(rows) + "\n" in page, "\n".join(rows)


def test_a_step_without_a_token_is_a_table_without_a_row():
    groups, tokens = a_step()
    empty = Group(groups[1].prompt, groups[1].rollouts[:1], groups[1].verdicts[:1])
    for rows, of in {(2,): [empty], (): []}.items():
        table = token_records.record_table(1, of, tokens.take(torch.tensor(rows, dtype=torch.long)))
        assert table.num_rows == 0 and table.column_names == COLUMNS


def test_a_replayed_rollout_is_marked_in_the_records():
    groups, tokens = a_step()
    old = replace(groups[1], rollouts=(groups[1].rollouts[0], replace(groups[1].rollouts[1], replayed=True)))
    told = token_records.record_table(2, [groups[0], old], tokens)["replayed"].to_pylist()
    assert told == [False] * 4 + [True] * 3


def test_nan_outside_the_mask_leaves_no_trace():
    groups, tokens = a_step()
    assert all(math.isfinite(v) for v in step_metrics(groups, tokens).values())
    hidden = token_records.record_table(1, groups, tokens).to_pylist()[3]
    assert hidden["entropy"] is None and hidden["advantage"] is None and hidden["logprob_old"] is None


def test_a_step_is_written_once_and_in_order(tmp_path):
    book = journal(tmp_path)
    write(book, 1, 2)
    for repeated in (2, 1):
        with pytest.raises(ValueError, match=r"Journal\.cut"):
            write(book, repeated)
    book.close()
    with pytest.raises(ValueError, match=r"metrics\.jsonl .* 2, .*Journal\.cut\(1\)"):
        write(journal(tmp_path), 2)
    assert [m["step"] for m in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_every_line_is_on_disk_at_once_and_holds_finite_floats_or_null(tmp_path):
    book = journal(tmp_path)
    write(book, 1, loss=math.nan, grad=math.inf, tokens=np.int64(7), kl=torch.tensor(0.5))
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "step": 1,
        "entropy/mean": 0.1,
        "loss": None,
        "grad": None,
        "tokens": 7.0,
        "kl": 0.5,
    }


def test_cut_forgets_what_lies_beyond_a_step(tmp_path):
    book = journal(tmp_path, tokens_every=1)
    write(book, 1, 2, 3, 4)
    for step in (2, 3):
        book.event("checkpoint", step=step)
    book.event("engine_lost", engine="generator 0")
    book.cut(2)
    assert book.last_step == 2
    assert [m["step"] for m in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    assert [token_records.step_of(f) for f in token_records.files(tmp_path)] == [1, 2]
    write(book, 3, again=1.0)
    assert [m.get("again") for m in read_metrics(tmp_path / "metrics.jsonl")] == [None, None, 1.0]
    saved, lost, event = read_metrics(tmp_path / "events.jsonl")
    assert saved["fields"] == {"step": 2} and lost["kind"] == "engine_lost"
    assert event["fields"] == {"step": 2, "metrics": 2, "events": 1, "token_files": 2}


def test_a_line_cut_short_by_a_crash_is_dropped_on_resume(tmp_path):
    write(journal(tmp_path), 1)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "entr')
    assert [m["step"] for m in read_metrics(tmp_path / "metrics.jsonl")] == [1]
    write(journal(tmp_path), 2)
    assert [m["step"] for m in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


@pytest.mark.parametrize(("every", "kept"), [(0, []), (1, [1, 2, 3, 4]), (3, [1, 4])])
def test_token_records_are_kept_for_every_nth_step_from_the_first(tmp_path, every, kept):
    write(journal(tmp_path, every, vocabulary=WORDS), 1, 2, 3, 4)
    assert [token_records.step_of(f) for f in token_records.files(tmp_path)] == kept
    vocabulary = tmp_path / "tokens" / "vocabulary.json"
    assert vocabulary.exists() == bool(every)
    assert not every or json.loads(vocabulary.read_text()) == {"0": "<b>", "1": " so", "2": "\n"}


def test_events_hold_whatever_they_are_given(tmp_path):
    journal(tmp_path).event(
        "engine_lost",
        engine=1,
        why="a\u2028b",
        rate=math.nan,
        at=tmp_path,
        ids=(1, np.int32(2), True, np.float32(0.5)),
    )
    (event,) = read_metrics(tmp_path / "events.jsonl")
    assert event["kind"] == "engine_lost" and event["time"].endswith("+00:00")
    assert event["fields"] == {
        "engine": 1,
        "why": "a\u2028b",
        "rate": None,
        "at": str(tmp_path),
        "ids": [1, 2, True, 0.5],
    }


class Shelf:
    """A tracker that keeps what it is given and fails after `good` steps."""

    def __init__(self, good, error=ConnectionError):
        self.good, self.seen, self.error = good, [], error

    def log(self, step, metrics):
        if step > self.good:
            raise self.error("no route")
        self.seen.append((step, metrics))

    def close(self):
        self.seen.append("closed")


@pytest.mark.parametrize("error", [ConnectionError, ZeroDivisionError, KeyError, SystemExit])
def test_a_tracker_that_fails_is_let_go_and_the_journal_goes_on(tmp_path, error):
    broken, sound = Shelf(1, error), Shelf(9)
    book = journal(tmp_path, trackers=[broken, sound])
    write(book, 1, 2, 3, loss=math.nan)
    book.close()
    assert broken.seen == [(1, {"entropy/mean": 0.1})]
    assert [s[0] for s in sound.seen[:3]] == [1, 2, 3] and sound.seen[3] == "closed"
    assert [(e["kind"], e["fields"]["step"]) for e in read_metrics(tmp_path / "events.jsonl")] == [
        ("tracker_lost", 2)
    ]
    assert [m["step"] for m in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_a_tracker_that_cannot_be_closed_or_opened_ends_no_run(tmp_path, monkeypatch):
    shelf = Shelf(9)
    monkeypatch.setattr(shelf, "close", lambda: 1 / 0)
    book = journal(tmp_path, trackers=[shelf])
    write(book, 1)
    book.close()
    (tmp_path / "lab_of_mine.py").write_text("def tracker(run): raise OSError('no login')\n")
    monkeypatch.syspath_prepend(tmp_path)
    c = configured("observe.trackers=[{fn: lab_of_mine.tracker}]", "packages=[lab_of_mine]")
    mine, *_ = train.open_journal(c, build_parts(c), tmp_path / "run", byte_tokenizer(), io.StringIO())
    mine.close()
    for folder, why in ((tmp_path, "ZeroDivisionError"), (tmp_path / "run", "no login")):
        (event,) = read_metrics(folder / "events.jsonl")
        assert event["kind"] == "tracker_lost" and why in event["fields"]["reason"]


def test_token_records_the_disk_refuses_do_not_end_the_run(tmp_path):
    (tmp_path / "tokens").write_text("in the way")
    write(journal(tmp_path, tokens_every=1), 1)
    assert [e["kind"] for e in read_metrics(tmp_path / "events.jsonl")] == ["tokens_lost"]
    assert [m["step"] for m in read_metrics(tmp_path / "metrics.jsonl")] == [1]


def test_console_prints_aligned_lines_and_repeats_the_header(tmp_path):
    out = (tmp_path / "log").open("w+", encoding="utf-8")
    lines = console.Console(file=out)
    lines.header("entroray", ["loss = [bold]x[/bold]", "run  " + "r" * 150])
    for step in range(1, 23):
        lines.log(step, METRICS)
    out.seek(0)
    printed = out.read().splitlines()
    assert "loss = [bold]x[/bold]" in printed[1] and "r" * 150 in printed[2]
    table = printed[4:]
    assert [i for i, line in enumerate(table) if "correct" in line] == [0, 22]
    first = "    1   0.250  1.2345  2.5000   1    1,234    3.21   0.55    2.00   0.07    6.00"
    assert table[2] == first
    assert {len(line) for line in table} == {80}
    assert not any("\x1b" in line for line in printed)


def test_console_shows_what_was_not_measured_as_a_dash():
    assert console.row(3, {"correct/mean": 1.0, "entropy/mean": math.nan}).split() == ["3", "1.000", *"-" * 9]


def test_summary_says_by_how_much_entropy_fell():
    metrics = [{"step": s, "correct/mean": s / 20, "entropy/mean": 2.0 - s / 10} for s in range(1, 16)]
    text = console.summary(metrics)
    assert len(text.splitlines()) <= 24 and "\x1b" not in text
    assert "entropy (nats per token): 1.7000 first 5 steps, 0.7000 last 5: fell by 1.0000 (58.8%)" in text
    assert "correct (share of answers): 0.1500 first 5 steps, 0.6500 last 5: rose by 0.5000" in text
    assert console.summary([]) == "no step was measured"
    assert "changed by 0.0000" in console.summary([{"step": 1, "correct/mean": 0.0, "entropy/mean": None}])


def page(run_dir):
    """What report.html says, but for tokens: its data."""
    text = report.write_report(run_dir).read_text()
    return json.loads(re.search(r'id="run">(.*?)</script>', text, re.DOTALL)[1])


DRAWN = {
    "control/bonus": 0.1,
    "reward/shaped_mean": 0.5,
    "update/clip_low_negative": 0.02,
    "entropy/realised_change": -0.01,
}


def test_the_shaped_reward_that_is_drawn_is_the_shaped_one():
    drawn = {c["name"]: c["key"] for c in PLOTS[0]["curves"]}
    assert drawn == {"shaped reward": "reward/shaped_mean", "share right": "correct/mean"}


def test_every_curve_of_the_page_is_a_metric_of_the_catalogue():
    keys = [c[name] for plot in PLOTS for c in plot["curves"] for name in ("key", "times") if name in c]
    assert len(keys) > 25 and [key for key in keys if not matches(key, IN_A_RUN)] == []


def test_report_of_a_run(tmp_path):
    book = journal(tmp_path, tokens_every=1, vocabulary=WORDS)
    groups, tokens = a_step()
    for step in (1, 2):
        book.step(
            step, judged_metrics(groups) | step_metrics(groups, tokens) | METRICS | DRAWN, groups, tokens
        )
    book.event("engine_lost", step=2, reason="<i>", left={"engines": 1, "seconds": 0.123456789}, held=[1])
    (tmp_path / "config.yaml").write_text("name: <script>")
    said = page(tmp_path)
    assert said["recorded"] == [1, 2] and said["metrics"]["steps"] == [1, 2]
    assert said["metrics"]["values"]["control/bonus"] == [0.1, 0.1]
    assert said["settings"] == [["name", '"<script>"', ""]]
    assert [(e["kind"], e["fields"]) for e in said["events"]] == [
        ("engine_lost", "reason <i> · left (engines 1, seconds 0.12346) · held [1]")
    ]
    text = (tmp_path / "report.html").read_text()
    assert not any(each in text for each in ("<i>", 'src="http', "<link", "name: <script>"))


def test_report_says_what_is_missing(tmp_path):
    notes = " ".join(page(tmp_path)["notes"])
    assert [n in notes for n in ("metrics.jsonl", "tokens/", "events.jsonl", "manifest.json")] == [True] * 4
    write(journal(tmp_path), 1)
    assert "metrics.jsonl" not in " ".join(page(tmp_path)["notes"])
