"""Columns of large tables: found by path, hashed by value, the first of each key."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from entroray.data import large
from entroray.data.large_questions import LargeQuestions
from entroray.data.sources import table
from entroray.data.tables import lookup


def test_a_hash_is_of_the_value_whatever_holds_it() -> None:
    texts = ["", "a", "ab", "eight by", "nine byte", "x" * 100, "x" * 101, "ä" * 7, "\0", "\0\0"]
    plain = large.hash_column(pa.array(texts))
    assert len({*plain.tolist()}) == len(texts)
    for column in (
        pa.array(texts, pa.large_string()),
        pa.array(texts, pa.string_view()),
        pa.array(texts).dictionary_encode(),
        pa.array(["drop", *texts, "drop"]).slice(1, len(texts)),
        pa.array([text.encode() for text in texts]),
    ):
        assert large.hash_column(column).tolist() == plain.tolist()
    assert [hex(word) for word in plain[1:5:3]] == ["0x103d4fa17e6f8a70", "0xf38f4453735e10ac"]
    assert (
        large.hash_column(pa.array([7, 8], pa.int8())).tolist()
        == large.hash_column(pa.array(["7", "8"])).tolist()
    )


def test_a_hash_of_lists_and_structs_tells_their_order_and_their_ends() -> None:
    rows = [[["a", "b"]], [["b", "a"]], [["a"], ["b"]], [["ab"]], [[]], [], None, [["a", "b"]]]
    hashes = large.hash_column(pa.array(rows)).tolist()
    assert hashes[0] == hashes[-1] and len({*hashes}) == 6 and hashes[5] == hashes[6]
    structs = [{"a": "x", "b": "y"}, {"a": "y", "b": "x"}, {"a": "xy", "b": ""}]
    assert len({*large.hash_column(pa.array(structs)).tolist()}) == 3


def test_a_column_is_found_where_a_row_has_it() -> None:
    rows = [
        {"a": {"b": [{"c": 1}, {"c": 2}]}, "x.y": {"z": i}, "n": None, "list": [[1], [2, 3]][: i + 1]}
        for i in range(3)
    ]
    column = pa.Table.from_pylist(rows).to_batches()[0].slice(1).to_struct_array()
    for path in ("a.b", "a.b.0.c", "a.b.-1.c", "x.y.z", "n", "list.1", "list.-1.0", "a.b.2.c"):
        found = large.find_column(column, path)
        known = [_found(row, path) for row in rows[1:]]
        assert found is not None and found.to_pylist() == known, path
    for path in ("c", "a.c", "a.b.c", "x.z", "n.0"):
        assert large.find_column(column, path) is None, path


def _found(row: Any, path: str) -> Any:
    try:
        return lookup(row, path)
    except KeyError:
        return None


def test_a_column_is_found_within_texts_that_hold_it() -> None:
    texts = ['{"a": {"b": "x"}}', "{'a': {'b': [1, 2]}}", "{'a': {'b': []}}", "no", None, '{"a": 3}']
    column = pa.Table.from_pydict({"t": texts}).to_batches()[0].to_struct_array()
    found = large.find_column(column, "t.a.b")
    assert found.to_pylist() == ["x", "[1, 2]", "", "", "", ""]
    assert large.find_blank(found, numbers=True).tolist() == [False, False, True, True, True, True]
    assert large.find_column(column, "t.c") is None


def test_the_first_of_each_stays_and_others_are_compared_with_it() -> None:
    keys = np.array([5, 1, 5, 9, 1, 5], np.uint64)
    rows, contradictions = large.first_of_each(keys, np.array([1, 1, 2, 3, 1, 2], np.uint64))
    assert rows.tolist() == [0, 1, 3] and contradictions == 2
    rows, contradictions = large.first_of_each(keys[:0], keys[:0])
    assert rows.tolist() == [] and contradictions == 0
    assert large.first_of_each(keys[[0, 1]], keys[[0, 1]])[0].tolist() == [0, 1]


def test_what_conversations_ask_is_read_by_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENTRORAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(large, "LARGE", 10)
    said = lambda i: [{"role": "system", "content": "Add."}, {"role": "user", "content": f"Say {i}"}]
    forms = [
        [{"asked": said(i)} for i in range(20)],
        [{"asked": [{"from": "human", "value": f"Say {i}"}]} for i in range(20)],
        [{"asked": f"Say {i}"} for i in range(20)],
        [{"asked": [*said(i), None]} for i in range(20)],
    ]
    for number, rows in enumerate(forms):
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
        found = table(str(tmp_path / "rows.parquet"), question="asked", answer=None)[0]
        assert isinstance(found, LargeQuestions)
        with monkeypatch.context() as columns:
            if number < 3:  # the last ends in nulls, and is read row by row
                columns.setattr(LargeQuestions, "__getitem__", lambda *_: 1 / 0)
            assert [*found.texts(np.array([0, 7, 19]))] == ["Say 0", "Say 7", "Say 19"]
