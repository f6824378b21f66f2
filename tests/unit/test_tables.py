"""Tables as people have them: every file that holds rows, every way it holds a number, what is no table."""

import bz2
import csv
import datetime
import gzip
import json
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from entroray.data import text_rows
from entroray.data.sources import table
from entroray.data.tables import table_name, written
from entroray.errors import ConfigError, PreflightError
from entroray.reward import build_judge
from entroray.types import Prompt

ROWS = [{"question": f"Say {i}", "answer": str(i)} for i in range(3)]
LINES = "\n".join(map(json.dumps, ROWS)).encode()


def shown(value: object) -> str:
    """Of a parameter, in a test's name: bytes are not."""
    return value if isinstance(value, str) else getattr(value, "__name__", "")


def answers(path: Path | str, **settings: Any) -> list[str]:
    return [q.answer for q in table(str(path), **settings)[0]]


def file(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).write_bytes(content)
    return folder / name


def parquet(folder: Path, name: str = "rows.parquet", **columns: Any) -> Path:
    pq.write_table(pa.table(columns), folder / name)
    return folder / name


# Numbers.


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *(("7", "7"), (" a b ", " a b "), (5, "5"), (10**25 + 1, "10000000000000000000000001"), (-0.0, "-0")),
        *((1e-7, "0.0000001"), (1e16, "10000000000000000"), (0.000025, "0.000025"), (5.0, "5"), (0.1, "0.1")),
        *(
            (np.float32(0.1), "0.1"),
            (np.float16(0.1), "0.1"),
            (np.int8(-3), "-3"),
            (np.uint64(2**64 - 1), str(2**64 - 1)),
        ),
        *(
            (Decimal("1E-7"), "0.0000001"),
            (Decimal("1E+3"), "1000"),
            (Decimal("5.00"), "5.00"),
            (Fraction(1, 2), "0.5"),
        ),
        *((True, "True"), (np.bool_(False), "False"), (datetime.date(2024, 1, 31), "2024-01-31")),
        *(
            (datetime.datetime(2024, 1, 31), "2024-01-31"),
            (datetime.datetime(2024, 1, 31, 9, 5), "2024-01-31 09:05:00"),
        ),
        *(
            (datetime.time(9, 5), "09:05:00"),
            (None, None),
            (float("nan"), None),
            (float("inf"), None),
            (["7"], None),
        ),
        *((Decimal("NaN"), None), ({"a": 1}, None), (b"7", None), (1j, None), (np.float64("nan"), None)),
    ],
)
def test_a_number_is_written_in_digits_and_what_is_none_is_not(value: object, text: str | None) -> None:
    assert written(value) == text


@pytest.mark.parametrize(
    ("column", "text"),
    [
        (pa.array([0.1], pa.float32()), "0.1"),
        (pa.array([np.float16(0.1)], pa.float16()), "0.1"),
        (pa.array([1e-7], pa.float64()), "0.0000001"),
        (pa.array([Decimal("0.10")], pa.decimal128(5, 2)), "0.10"),
        *((pa.array([7], kind), "7") for kind in (pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8())),
        (pa.array([2**64 - 1], pa.uint64()), "18446744073709551615"),
        (pa.array(["7"]).dictionary_encode(), "7"),
        (pa.array(["7"], pa.large_string()), "7"),
        (pa.array(["7"], pa.string_view()), "7"),
        (pa.array([True]), "True"),
        (pa.array([datetime.date(2024, 1, 31)]), "2024-01-31"),
        (pa.array([{"value": 0.1}], pa.struct([("value", pa.float32())])), "0.1"),
        (pa.array([[{"value": 0.1}]], pa.list_(pa.struct([("value", pa.float32())]))), "0.1"),
    ],
)
def test_parquet_holds_numbers_of_every_width(tmp_path: Path, column: pa.Array, text: str) -> None:
    path = "answer"
    path += ".0" if pa.types.is_list(column.type) else ""
    path += ".value" if "struct<" in str(column.type) else ""
    assert answers(parquet(tmp_path, question=["a"], answer=column), answer=path) == [text]


def test_the_right_answer_to_a_number_of_a_file_is_judged_right(tmp_path: Path) -> None:
    rows = [{"question": f"n{i}", "answer": x} for i, x in enumerate((1e-7, 1e16, 0.000025, 0.5, 5.0))]
    path = file(tmp_path, "rows.jsonl", "\n".join(map(json.dumps, rows)).encode())
    judge = build_judge({"fn": "math"})
    right = ["0.0000001", "10000000000000000", "0.000025", "0.5", "5"]
    for reference, answer in zip(answers(path), right, strict=True):
        assert judge(rf"\boxed{{{answer}}}", Prompt("p", "q", (1,), reference)).correct


def test_a_null_among_numbers_and_what_is_not_finite_are_named_by_line(tmp_path: Path) -> None:
    nulls = parquet(tmp_path, question=["a", "b", "c"], answer=[1.0, None, 3.0])
    with pytest.raises(PreflightError, match=r"line 2: 'answer'.*None"):
        table(str(nulls))
    assert answers(nulls, bad_rows=0.5) == ["1", "3"]
    lines = b'{"question": "a", "answer": NaN}\n{"question": "b", "answer": 1e400}\n{"question": "c"}'
    with pytest.raises(PreflightError, match=r"(?s)line 1: 'answer'.*nan.*line 2: 'answer'.*inf.*line 3"):
        table(str(file(tmp_path, "odd.jsonl", lines)))
    long = b'{"question": "a", "answer": %s}' % (b"9" * 5000)
    with pytest.raises(PreflightError, match=r"line 1: not JSON"):
        table(str(file(tmp_path, "long.jsonl", long)))


# Files.


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(
            (name, LINES)
            for name in ("rows.jsonl", "rows.ndjson", "rows.json", "ROWS.JSONL", "rows.txt", "rows")
        ),
        *((name, json.dumps(ROWS).encode()) for name in ("array.json", "array.jsonl", "ARRAY.JSON")),
        ("pretty.json", json.dumps(ROWS, indent=2).encode()),
        *(("rows.jsonl.gz", gzip.compress(LINES, mtime=0)), ("rows.json.bz2", bz2.compress(LINES))),
        ("two.jsonl.gz", gzip.compress(LINES[:70], mtime=0) + gzip.compress(LINES[70:], mtime=0)),
        ("rows.zst", pa.compress(LINES, "zstd", asbytes=True)),
        *(
            ("rows.csv", b"question,answer\nSay 0,0\nSay 1,1\nSay 2,2\n"),
            ("rows.tsv", b"question\tanswer\nSay 0\t0\nSay 1\t1\nSay 2\t2"),
        ),
        ("rows.CSV", "question;answer\r\nSay 0;0\r\nSay 1;1\r\nSay 2;2\r\n".encode("utf-8-sig")),
        ("quoted.csv", b'question , answer\n"Say ""0""\nnow, please",0\n"Say, 1",1\nSay 2,2\n'),
        *(("crlf.jsonl", LINES.replace(b"\n", b"\r\n")), ("cr.jsonl", LINES.replace(b"\n", b"\r"))),
        *(
            ("bom.jsonl", b"\xef\xbb\xbf" + LINES),
            ("boms.jsonl", b"\n".join(b"\xef\xbb\xbf" + x for x in LINES.split(b"\n"))),
        ),
        *(
            ("bom.json", b"\xef\xbb\xbf" + json.dumps(ROWS).encode()),
            ("boms.json", b"\xef\xbb\xbf" * 2 + json.dumps(ROWS).encode()),
            ("two.jsonl", b"\xef\xbb\xbf" * 2 + LINES),
            ("two.csv", b"\xef\xbb\xbf" * 2 + b"question,answer\nSay 0,0\nSay 1,1\nSay 2,2"),
            ("blank.jsonl", b"\n\n" + LINES + b"\n\n"),
        ),
    ],
    ids=shown,
)
def test_rows_are_read_from_every_file_that_holds_them(tmp_path: Path, name: str, content: bytes) -> None:
    assert answers(file(tmp_path, name, content)) == ["0", "1", "2"]


@pytest.mark.parametrize("before", [b"", b"  ", b"\xef\xbb\xbf", b"\xef\xbb\xbf\t", b"\n \n"])
def test_an_array_may_lie_in_one_line_longer_than_a_row_may_be_whatever_stands_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: bytes
) -> None:
    monkeypatch.setattr(text_rows, "LONGEST", len(array := json.dumps(ROWS).encode()) // 2)
    assert answers(file(tmp_path, "rows.json", before + array)) == answers(file(tmp_path, "a.jsonl", LINES))
    with pytest.raises(PreflightError, match="line 2 is longer"):
        table(str(file(tmp_path, "late.jsonl", b'{"question": "a", "answer": "b"}\n' + array)))


def test_parquet_is_known_by_its_content_whatever_it_is_called(tmp_path: Path) -> None:
    columns = {"question": ["a"], "answer": ["1"]}
    for name in ("rows.parquet", "rows.PARQUET", "rows.pq", "rows.json", "rows"):
        assert answers(parquet(tmp_path, name, **columns)) == ["1"]


def test_a_glob_is_its_files_one_after_the_other_and_names_them_in_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    parquet(tmp_path, "b.parquet", question=["b"], answer=["7"])
    assert answers(tmp_path / "*") == ["0", "1", "2", "7"] and answers(tmp_path / "[ab].*") == [
        "0",
        "1",
        "2",
        "7",
    ]
    parquet(tmp_path, "c.parquet", question=["b", None], answer=["7", "8"])
    with pytest.raises(PreflightError, match=r"c\.parquet line 2: 'question'.*None"):
        table(str(tmp_path / "*"))
    with pytest.raises(PreflightError, match=r"data\.task=.*nothing-\*\.jsonl"):
        table(str(tmp_path / "nothing-*.jsonl"))


def test_a_file_is_called_by_its_name_alone_and_prompts_keep_their_ids() -> None:
    assert (
        table_name("/somewhere/rows.jsonl") == table_name("rows.jsonl.gz") == table_name("rows.CSV") == "rows"
    )
    assert table_name("openai/gsm8k") == "openai/gsm8k" and table_name("my.set/shards") == "my.set/shards"


@pytest.mark.parametrize(
    ("name", "content", "error", "says"),
    [
        (
            "rows.jsonl",
            LINES.decode().encode("utf-16"),
            PreflightError,
            r"rows\.jsonl.*iconv -f UTF-16 -t UTF-8",
        ),
        ("rows.csv", "a,b\n1,2".encode("utf-16-be"), PreflightError, r"rows\.csv.*iconv -f UTF-16"),
        ("rows.jsonl", bytes(64), PreflightError, r"rows\.jsonl.*UTF-16"),
        *(
            (
                name,
                "question,answer\na,1".encode(codec),
                PreflightError,
                rf"\.csv is .*iconv -f {said} -t UTF-8",
            )
            for name, codec, said in (
                ("marked.csv", "utf-32", "UTF-32"),
                ("be.csv", "utf-32-be", "UTF-32BE"),
                ("le.csv", "utf-32-le", "UTF-32LE"),
                ("le.csv", "utf-16-le", "UTF-16LE"),
                ("be.csv", "utf-16-be", "UTF-16BE"),
            )
        ),
        *(
            (
                "rows.json",
                b'{"version": 1, "%s": [{"question": "a"}]}' % name,
                PreflightError,
                f"jq -c '\\.{name.decode()}",
            )
            for name in (b"data", b"rows", b"examples")
        ),
        ("rows.json", b'{"train": [{"question": "a"}], "test": []}', PreflightError, r"jq -c '\.train\[\]'"),
        (
            "rows.jsonl",
            LINES + b'\n{"question": "a", "answer": "1", "answer": "2"}',
            PreflightError,
            "line 4: .*'answer'",
        ),
        (
            "rows.jsonl",
            b'{"question": "a", "answer": 1, "x": [{"k": 1, "k": 2}]}',
            PreflightError,
            "line 1: .*'k'",
        ),
        (
            "rows.json",
            b'[{"question": "a"},\n{"question": "b", "question": "c"}]',
            PreflightError,
            r"rows\.json: .*'question'",
        ),
        *(
            ("rows.json", content, PreflightError, r"rows\.json.*jq -c \.")
            for content in (b'[{"question": "a"},]', b'[{"question": "a"} {}]', b'[{"question": "a"}] 7')
        ),
        (
            "rows.csv",
            "question,answer\nGröße,1".encode("latin-1"),
            PreflightError,
            r"line 2.*iconv -f LATIN1",
        ),
        (
            "rows.json",
            '[\n{"question": "Größe"}]'.encode("latin-1"),
            PreflightError,
            r"line 2.*iconv -f LATIN1",
        ),
        (
            "rows.jsonl",
            b"version https://git-lfs.github.com/spec/v1\n",
            PreflightError,
            r"rows\.jsonl.*git lfs pull",
        ),
        ("rows.xlsx", b"PK\x03\x04rest", PreflightError, r"rows\.xlsx.*\.csv"),
        ("rows.parquet", b"PAR1 and no more", PreflightError, r"rows\.parquet.*Parquet"),
        ("rows.jsonl.gz", gzip.compress(LINES, mtime=0)[:-20], PreflightError, r"rows\.jsonl\.gz"),
        (
            "rows.json",
            b'{\n  "data": [{"question": "a"}]\n}',
            PreflightError,
            r"rows\.json.*data.*jq -c '\.data\[\]'",
        ),
        ("rows.json", b"[\n{},\n", PreflightError, r"rows\.json.*jq -c \."),
        (
            "rows.jsonl",
            b'{\n"question": "a"\n}\n{\n"question": "b"\n}',
            PreflightError,
            r"rows\.jsonl.*jq -c \.",
        ),
        ("rows.yaml", b"question: a", ConfigError, r"rows\.yaml.*\.jsonl.*\.csv.*\.parquet.*\.gz"),
        ("rows.csv", b"question,answer\na,1,2\n", PreflightError, r"line 2: more than 2"),
        ("rows.csv", b"question,answer\na\n", PreflightError, r"line 2: 'answer'.*None"),
        ("rows.jsonl", b"", PreflightError, "no rows"),
        ("rows.csv", b"", PreflightError, "no rows"),
    ],
    ids=shown,
)
def test_what_is_no_table_is_refused_with_what_to_do(
    tmp_path: Path, name: str, content: bytes, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=f"(?s){says}"):
        table(str(file(tmp_path, name, content)))


def test_two_columns_of_one_name_are_refused_whatever_the_file(tmp_path: Path) -> None:
    twice = pa.Table.from_arrays(
        [pa.array(["a"]), pa.array(["1"]), pa.array(["2"])], ["question", "answer", "answer"]
    )
    pq.write_table(twice, tmp_path / "rows.parquet")
    with pytest.raises(PreflightError, match=r"rows\.parquet: .*'answer'"):
        answers(tmp_path / "rows.parquet")


def test_a_csv_as_excel_writes_it(tmp_path: Path) -> None:
    sep = file(
        tmp_path,
        "sep.csv",
        'sep=;\r\nquestion;answer\r\n"1,5";="007"\r\nb;="say ""x"""\r\n'.encode("utf-8-sig"),
    )
    assert answers(sep) == ["007", 'say "x"'] and table(str(sep))[0][0].text == "1,5"
    bad = file(tmp_path, "bad.csv", b"sep=\t\nquestion\tanswer\na\t1\nb\n")
    with pytest.raises(PreflightError, match=r"line 4: 'answer'.*None"):
        answers(bad)


def test_one_row_with_a_list_of_objects_in_it_is_a_row(tmp_path: Path) -> None:
    rows = {"question": "q", "answer": "7", "train": [{"input": 1}], "tools": [{"name": "x"}]}
    assert answers(file(tmp_path, "rows.jsonl", json.dumps(rows).encode())) == ["7"]


def test_latin_1_is_named_by_line_with_its_remedy_and_may_be_left_out(tmp_path: Path) -> None:
    path = file(tmp_path, "rows.jsonl", LINES + b'\n{"question": "caf\xe9", "answer": "2"}')
    with pytest.raises(
        PreflightError, match=r"(?s)line 4: not UTF-8 at byte 17.*iconv -f LATIN1 .*data\.settings\.bad_rows"
    ):
        table(str(path))
    assert answers(path, bad_rows=0.25) == ["0", "1", "2"]


def test_a_field_of_a_csv_may_be_longer_than_python_expects(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as target:
        csv.writer(target).writerows([["question", "answer"], ["x" * 200_000, "1"]])
    assert answers(path) == ["1"]


def test_a_csv_may_begin_with_empty_lines_and_has_each_column_once(tmp_path: Path) -> None:
    assert answers(file(tmp_path, "late.csv", b"\n\nquestion,answer\nq,7\n")) == ["7"]
    twice = file(tmp_path, "twice.csv", b"question,answer,answer\nq,7,8\n")
    with pytest.raises(PreflightError, match=r"twice\.csv line 1: .*'answer'"):
        answers(twice)


@pytest.mark.parametrize("name", ["", "x" * 300 + ".jsonl", "a\0b.jsonl", "https://example.com/rows.jsonl"])
def test_what_can_be_no_file_is_refused_by_its_setting(name: str) -> None:
    with pytest.raises(PreflightError, match=r"^data\.task="):
        answers(name)
    with pytest.raises(PreflightError, match=r"~nobody/"):
        answers("~nobody/rows.jsonl")
