"""The data of report.html: token blocks, damaged and foreign folders, sizes, contrast of its shades."""

import fcntl
import gzip
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from entroray.observe import report, token_blocks, token_records
from entroray.observe.rollout_records import SCHEMA
from entroray.observe.run_data import run_data
from entroray.observe.token_blocks import cells, encode_step, load_step
from tests.pages.folders import CUT, EMOJI, EMOJI_TEXT, SMALL
from tests.pages.folders import write_run as write_any_run

STEP = token_records.record_path
TOKENS, ROLLOUTS = 634, 14
write_run = partial(write_any_run, groups=SMALL)


def decoded(block: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Header and columns of a block, as the page reads them."""
    raw = gzip.decompress(block)
    size = int.from_bytes(raw[:4], "little")
    header, at, n, columns = json.loads(raw[4 : 4 + size]), 4 + size, 0, {}
    n = header["tokens"]
    for about in header["columns"]:
        wide = {"constant": 0, "float": 2}.get(about["kind"], about.get("wide"))
        planes = np.frombuffer(raw, np.uint8, wide * n, at).reshape(wide, n) if wide else None
        at += wide * n
        if planes is None:
            columns[about["name"]] = np.full(n, np.nan if about["value"] is None else about["value"])
        elif about["kind"] == "float":
            halves = (planes[0] + planes[1].astype(np.uint16) * 256).view(np.float16)
            columns[about["name"]] = halves.astype(float) * about["unit"]
        else:
            whole = sum(p.astype(float) * 256**i for i, p in enumerate(planes))
            columns[about["name"]] = np.where(whole > 0, whole + about["low"], np.nan)
    return header, columns


def notes(folder: Path) -> str:
    """What a page says is missing or damaged in its folder."""
    page = report.write_report(folder).read_text()
    return "\n".join(json.loads(re.search(r'id="run">(.*?)</script>', page, re.DOTALL)[1])["notes"])


def test_a_block_gives_back_every_column_to_8_significant_bits(tmp_path):
    write_run(tmp_path, recorded=[21])
    file = STEP(tmp_path, 21)
    header, columns = decoded(encode_step(load_step(tmp_path, file, 10**6)))
    table = pq.read_table(file)
    for name in ("entropy", "varentropy", "logprob_old", "advantage", "scale", "temperature"):
        np.testing.assert_allclose(columns[name], table[name].to_numpy(), rtol=2**-8 + 2**-11, atol=1e-6)
    gap = table["logprob_old"].to_numpy() - table["logprob_behavior"].to_numpy()
    np.testing.assert_allclose(columns["gap"], gap, rtol=2**-8 + 2**-11, atol=1e-9)
    assert np.array_equal(columns["version"], table["version"].to_numpy())
    assert np.array_equal(columns["selected"], table["selected"].to_numpy())
    ids = [header["words"][int(w)][0] for w in columns["word"]]
    assert ids == table["token_id"].to_pylist()
    masks = [*header["masks"], None]
    assert [masks[int(m)] for m in columns["mask_reason"]] == table["mask_reason"].to_pylist()
    assert header["rollouts"][1]["response"] == SMALL[0][1].text and len(header["rollouts"]) == ROLLOUTS


def test_a_null_stays_one(tmp_path):
    write_run(tmp_path, recorded=[1])
    file = STEP(tmp_path, 1)
    table = pq.read_table(file)
    holes = np.arange(table.num_rows) % 3 == 0
    place = table.schema.get_field_index("entropy")
    column = np.where(holes, np.nan, table["entropy"].to_numpy())
    pq.write_table(table.set_column(place, "entropy", [column.astype(np.float32)]), file)
    _, columns = decoded(encode_step(load_step(tmp_path, file, 10**6)))
    assert np.array_equal(np.isnan(columns["entropy"]), holes)
    assert np.isnan(columns["kept_mass"]).all(), "a column of nulls is one constant"


@pytest.mark.parametrize(
    ("texts", "response", "shown"),
    [
        (["a", CUT, CUT, "b", "<e>"], "a€b", ["a", "€", None, "b", "<e>"]),
        (EMOJI, EMOJI_TEXT, ["x=", "😀", None, None, "é", "€", None, "", "<|end|>"]),
        (["he", "llo"], " he llo", [" he", " llo"]),
        ([CUT, CUT], "", [CUT, None]),
        (["a", CUT, "z"], "something else", ["a", CUT, "z"]),
        ([], "", []),
    ],
)
def test_cells_are_whole_characters_of_the_response(texts, response, shown):
    assert list(cells(texts, response)) == shown


def test_beyond_the_most_tokens_whole_groups_are_sampled(tmp_path):
    write_run(tmp_path, recorded=[1])
    tokens = load_step(tmp_path, STEP(tmp_path, 1), 550)
    assert tokens.recorded == TOKENS and {r["group"] for r in tokens.rollouts} == {0, 2}
    header, _ = decoded(encode_step(tokens))
    assert (header["recorded"], header["tokens"]) == (TOKENS, 512), "which the page says"
    lone = load_step(tmp_path, STEP(tmp_path, 1), 1)
    assert [r["rollout"] for r in lone.rollouts] == [0], "one rollout at least is shown"


def test_any_beginning_of_the_steps_spans_the_run():
    files = [Path(str(i)) for i in range(9)]
    order = [int(f.name) for f in report._spread(files)]
    assert order[:3] == [0, 8, 4] and sorted(order) == list(range(9))


def test_steps_that_do_not_fit_are_left_out_and_the_page_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "BYTES", 25_000)
    write_run(tmp_path, recorded=[1, 11, 21, 31, 40])
    assert re.search(r"Tokens of [234] of 5 recorded steps are here; all are in tokens/", notes(tmp_path))


def test_a_long_run_is_drawn_in_means_of_several_steps(tmp_path, monkeypatch):
    monkeypatch.setattr("entroray.observe.run_data.NUMBERS", 1000)
    steps = [{"step": i, **{f"m/{k}": 0.123456 * i for k in range(20)}} for i in range(1, 101)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in steps))
    drawn = run_data(tmp_path)["metrics"]
    assert drawn["every"] == 2 and drawn["steps"][:2] == [2, 4] and drawn["last"] == 100
    assert drawn["values"]["m/0"][0] == pytest.approx(0.123456 * 1.5, rel=1e-4)


def test_an_empty_folder_is_a_page_of_what_it_lacks(tmp_path):
    said = notes(tmp_path)
    assert all(name in said for name in ("metrics.jsonl", "events.jsonl", "config.yaml", "manifest.json"))
    assert "Nothing from tokens/" in said


def test_a_running_run_says_so_and_a_killed_one_that_no_end_was_recorded(tmp_path):
    write_run(tmp_path, ends=False)
    assert run_data(tmp_path)["running"] is False
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run_data(tmp_path)["running"] is True


FOREIGN = {
    "metrics.jsonl": '[1]\n{"step": 1, "x": "text", "y": NaN}\n',
    "events.jsonl": '{"kind": 3}\n{"fields": [1]}\n{"kind": "evaluation", "fields": {"step": "x"}}\n',
    "config.yaml": "- a list",
    "manifest.json": "{",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_or_damaged_file_is_a_sentence_on_the_page(tmp_path, name):
    write_run(tmp_path)
    (tmp_path / name).write_text(FOREIGN[name])
    said = notes(tmp_path)
    assert f"{name} is damaged" in said if name != "events.jsonl" else said == ""


def test_settings_and_events_of_another_program_are_shown_as_they_are(tmp_path):
    write_run(tmp_path)
    (tmp_path / "config.yaml").write_text("objective: text\ncontrol: [1]\ndata: null\nrun: {steps: x}\n")
    (tmp_path / "events.jsonl").write_text('{"kind": "evaluation", "fields": [1]}\n{"kind": "evaluation"}\n')
    assert notes(tmp_path) == ""
    found = run_data(tmp_path)
    assert found["objective"] == "an unknown objective" and ["run.steps", '"x"', "100"] in found["settings"]


@pytest.mark.parametrize("text", ['{"0": "a', "[]", '{"0": 1}'])
def test_without_a_whole_vocabulary_tokens_are_shown_by_their_ids(tmp_path, text):
    write_run(tmp_path, recorded=[1])
    (tmp_path / "tokens" / "vocabulary.json").write_text(text)
    header, _ = decoded(encode_step(load_step(tmp_path, STEP(tmp_path, 1), 10**6)))
    assert {text for _, text in header["words"]} == {""} and notes(tmp_path) == ""


def test_a_file_cut_short_in_a_copy_leaves_the_rest(tmp_path):
    write_run(tmp_path)
    for name in (
        "metrics.jsonl",
        "events.jsonl",
        "tokens/step-000021.parquet",
        "rollouts/step-000001.parquet",
    ):
        half = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(half[: len(half) * 2 // 3])
    said = notes(tmp_path)
    assert "step-000021.parquet: it is damaged" in said
    found = run_data(tmp_path)
    assert 20 < len(found["metrics"]["steps"]) < 40 and found["events"]
    bare = load_step(tmp_path, STEP(tmp_path, 1), 10**6).rollouts
    assert len(bare) == ROLLOUTS and "prompt" not in bare[0] and bare[0]["reward"] == 1.0
    assert [r["group"] for r in bare][:7] == [0, 0, 0, 0, 1, 1, 2], "groups are runs of one prompt"


@pytest.mark.parametrize("column", ["entropy", "mask_reason", "advantage", "status", "prompt_id", "version"])
def test_records_without_a_column_are_shown_without_it(tmp_path, column):
    write_run(tmp_path, recorded=[1])
    file = STEP(tmp_path, 1)
    pq.write_table(pq.read_table(file).drop_columns([column]), file)
    header, columns = decoded(encode_step(load_step(tmp_path, file, 10**6)))
    assert column not in columns and header["tokens"] == TOKENS and "step-000001" not in notes(tmp_path)


def test_a_parquet_file_of_something_else_is_no_record(tmp_path):
    write_run(tmp_path, recorded=[1, 21])
    pq.write_table(pa.table({"a": [1]}), STEP(tmp_path, 1))
    assert "step-000001.parquet: it is damaged (it has no columns rollout and token_id)" in notes(tmp_path)


def luminance(colour: str) -> float:
    """WCAG 2.2's relative luminance of #rrggbb."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def shades() -> list[list[tuple[str, str]]]:
    """Background and text of each shade, light and dark."""
    style = (report.PAGE / "page.css").read_text()
    found = re.findall(r"\.s(\d+),\S+ \.t\.s\1\{background:(#\w{6});color:(#\w{6})\}", style)
    assert [int(i) for i, _, _ in found] == [*range(12), *range(12)]
    return [[(back, ink) for _, back, ink in found[i : i + 12]] for i in (0, 12)]


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_on_every_shade_has_a_contrast_of_4_5_and_lightness_is_monotone(scheme):
    for back, ink in shades()[scheme]:
        low, high = sorted([luminance(back), luminance(ink)])
        assert (high + 0.05) / (low + 0.05) >= 4.5, back
    steps = np.diff([luminance(back) for back, _ in shades()[scheme]])
    assert (steps < 0).all() if scheme == 0 else (steps > 0).all()


def test_the_columns_of_rollout_records_are_documented():
    text = (Path(token_blocks.__file__).parent / "README.md").read_text()
    for field in SCHEMA:
        assert re.search(
            rf"\| `{field.name}` \| \S+ \| .* \| {re.escape(field.metadata[b'meaning'].decode())} \|", text
        )
