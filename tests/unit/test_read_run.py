"""`entroray.read_run`: a run's folder as tables, read no further than is asked for, or refused by name."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

import entroray
from entroray.errors import DataError
from entroray.observe.token_records import SCHEMA, record_path, write_records
from tests.pages.folders import SMALL, write_run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run of 40 steps, tokens of three of them."""
    return write_run(tmp_path / "run", SMALL)


def test_metrics_are_a_row_a_step_and_null_where_nothing_was_measured(folder: Path) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "entropy/mean": null, "late": 2}\n{"step": 42, "entr')
    found = entroray.read_run(folder).metrics()
    assert found["step"].to_pylist() == [*range(1, 42)] and found["late"].to_pylist() == [None] * 40 + [2.0]
    assert found["entropy/mean"].null_count == 1 and found.schema.field("late").type == pa.float64()


def test_events_have_time_kind_step_and_fields(folder: Path) -> None:
    found = entroray.read_run(str(folder)).events()
    assert found["kind"].to_pylist() == ["start", "checkpoint", "engine_lost", "health", "trained"]
    assert found["step"].to_pylist() == [None, 10, None, 20, None]
    assert json.loads(found["fields"][4].as_py()) == {"steps": 40}
    assert found["time"][1].as_py().isoformat() == "2026-11-27T06:02:00+00:00"


def test_records_are_those_of_the_files_column_by_column_and_step_by_step(folder: Path) -> None:
    run = entroray.read_run(folder)
    assert run.recorded == [1, 21, 40] and run.tokens().num_rows == 3 * 634
    assert run.tokens().schema.equals(SCHEMA) and run.rollouts().num_rows == 3 * 14
    second = run.tokens(["entropy", "step"], steps=21)
    assert second.column_names == ["entropy", "step"] and set(second["step"].to_pylist()) == {21}
    assert second["entropy"].equals(pq.read_table(record_path(folder, 21))["entropy"])
    assert run.tokens("rollout", steps=[]).num_rows == 0
    assert run.rollouts("siblings", steps=[40, 1]).num_rows == 28
    assert set(run.vocabulary().values()) >= {"<script>", "<|end|>"}


def test_what_is_not_asked_for_is_not_read(folder: Path) -> None:
    """The witness: every other file is damaged, and so are the pages of every other column."""
    file = record_path(folder, 21)
    at = pq.read_metadata(file).row_group(0)
    names = [at.column(i).path_in_schema for i in range(at.num_columns)]
    kept = at.column(names.index("entropy"))
    text = bytearray(file.read_bytes())
    for column in (at.column(i) for i in range(at.num_columns)):
        start = column.dictionary_page_offset or column.data_page_offset
        if column.path_in_schema != "entropy":
            text[start : start + column.total_compressed_size] = b"x" * column.total_compressed_size
    expected = pq.read_table(file, columns=["entropy"])["entropy"]
    file.write_bytes(text)
    for other in (record_path(folder, 1), record_path(folder, 40), folder / "metrics.jsonl"):
        other.write_bytes(b"nonsense\n")
    run = entroray.read_run(folder)
    assert run.tokens("entropy", steps=21)["entropy"].equals(expected) and kept.total_compressed_size > 100
    for call in (lambda: run.tokens("advantage", 21), lambda: run.tokens("entropy", 1), run.metrics):
        with pytest.raises(DataError):
            call()


def test_columns_of_sixteen_bits_are_joined_with_those_of_thirty_two(folder: Path) -> None:
    """observe.tokens.half may change when a run goes on."""
    whole = pq.read_table(record_path(folder, 21))
    write_records(record_path(folder, 21), whole, ["entropy"])
    found = entroray.read_run(folder).tokens(["entropy", "prompt_id"])
    assert found.schema.field("entropy").type == pa.float32() and found.num_rows == 3 * 634
    half = found["entropy"].slice(634, 634)
    assert pc.max(pc.abs(pc.subtract(half, whole["entropy"].combine_chunks()))).as_py() < 2e-3


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def without(path: Path, column: str) -> None:
    pq.write_table(pq.read_table(path).drop_columns([column]), path)


def as_text(path: Path) -> None:
    table = pq.read_table(path)
    place = table.schema.get_field_index("entropy")
    words = pa.array(["much"] * table.num_rows)
    pq.write_table(table.set_column(place, "entropy", words), path)


@pytest.mark.parametrize(
    ("damage", "ask", "told"),
    [
        (
            lambda f: cut(record_path(f, 21)),
            lambda r: r.tokens("entropy"),
            r"step-000021\.parquet cannot be read",
        ),
        (
            lambda f: record_path(f, 1).write_bytes(b""),
            lambda r: r.tokens(steps=1),
            "step-000001.* cannot be",
        ),
        (
            lambda f: without(record_path(f, 40), "entropy"),
            lambda r: r.tokens("entropy"),
            "40.* no column `entr",
        ),
        (lambda f: without(record_path(f, 40), "entropy"), lambda r: r.tokens(), "40.* no column `entropy`"),
        (
            lambda f: as_text(record_path(f, 1)),
            lambda r: r.tokens("entropy"),
            r"000001\.parquet cannot be read",
        ),
        (lambda f: None, lambda r: r.tokens("entropi"), "did you mean `entropy`"),
        (lambda f: None, lambda r: r.tokens(["entropy", "answer"]), "no column `answer`"),
        (lambda f: None, lambda r: r.rollouts("entropy"), "rollouts.* no column `entropy`"),
        (lambda f: None, lambda r: r.tokens(steps=[1, 2]), "no step 2: it has 3, from 1 to 40"),
        (
            lambda f: [p.unlink() for p in f.glob("tokens/*.parquet")],
            lambda r: r.tokens(),
            "observe.tokens.every",
        ),
        (
            lambda f: cut(f / "tokens" / "vocabulary.json"),
            lambda r: r.vocabulary(),
            "vocabulary.json cannot be",
        ),
        (lambda f: (f / "metrics.jsonl").unlink(), lambda r: r.metrics(), "metrics.jsonl is not there: copy"),
        (
            lambda f: (f / "metrics.jsonl").write_text("{}\n"),
            lambda r: r.metrics(),
            "line 1 is no JSON object",
        ),
        (
            lambda f: (f / "metrics.jsonl").write_text('{"step": 1, "a": "b"}\n'),
            lambda r: r.metrics(),
            "cannot be",
        ),
        (
            lambda f: (f / "events.jsonl").write_text('{"kind": "a"}\n'),
            lambda r: r.events(),
            "events.* cannot be",
        ),
        (lambda f: (f / "events.jsonl").unlink(), lambda r: r.events(), "events.jsonl is not there"),
    ],
)
def test_what_is_damaged_foreign_or_missing_is_named(
    damage: Callable[[Path], object], ask: Callable[[entroray.Run], object], told: str, folder: Path
) -> None:
    damage(folder)
    with pytest.raises(DataError, match=told):
        ask(entroray.read_run(folder))


def test_a_folder_of_no_run_is_refused_and_one_of_runs_names_the_newest(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    for place, told in ((tmp_path / "model", "holds no run"), (tmp_path / "gone", "is no folder")):
        with pytest.raises(DataError, match=told):
            entroray.read_run(place)
    with pytest.raises(DataError, match=f"the folder of one is {folder}"):
        entroray.read_run(tmp_path)


def test_a_run_under_way_is_read_as_far_as_it_is(folder: Path) -> None:
    """A line that is half written is left out; a record file appears whole, under its name, or not at all."""
    run = entroray.read_run(folder)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "entropy')
        (folder / "tokens" / "step-000041.parquet.part").write_bytes(b"PAR1")
        file.flush()
        assert run.metrics().num_rows == 40 and run.recorded == [1, 21, 40]
        file.write('/mean": 0.5}\n')
    assert run.metrics().num_rows == 41


def test_reading_a_run_imports_no_torch() -> None:
    code = "import sys; from entroray import read_run; print({'torch', 'ray', 'pandas'} & {*sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", code], timeout=60, check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() == "set()"
