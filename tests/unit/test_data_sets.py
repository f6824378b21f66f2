"""Data sets of the hub and folders of shards, which `datasets` reads."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from entroray.data.sources import table
from entroray.errors import PreflightError


def answers(name: Path | str, **settings: Any) -> list[str]:
    return [q.answer for q in table(str(name), **settings)[0]]


def test_a_data_set_of_the_hub_is_read_with_the_digits_of_its_own_width(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    columns = pa.table({"question": ["a", "b"], "answer": pa.array([0.1, 1e-7], pa.float32())})
    found = SimpleNamespace(with_format=lambda kind: SimpleNamespace(iter=lambda batch_size: iter([columns])))
    library = SimpleNamespace(
        load_dataset=lambda *_, **__: found, exceptions=SimpleNamespace(DatasetsError=KeyError)
    )
    monkeypatch.setitem(sys.modules, "datasets", library)
    assert answers("somebody/set") == ["0.1", "0.0000001"]


def test_a_name_of_the_hub_has_a_subset_a_split_and_a_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    columns = pa.table({"question": ["a"], "answer": ["1"]})
    held = SimpleNamespace(with_format=lambda kind: SimpleNamespace(iter=lambda batch_size: iter([columns])))

    def load_dataset(*names: Any, **settings: Any) -> Any:
        asked.append((names, settings))
        if settings.get("revision") == "gone":
            raise ValueError("no such revision")
        return held

    library = SimpleNamespace(load_dataset=load_dataset, exceptions=SimpleNamespace(DatasetsError=KeyError))
    monkeypatch.setitem(sys.modules, "datasets", library)
    assert answers("openai/gsm8k", subset="main", split="train[:10%]", revision="v1") == ["1"]
    assert asked == [(("openai/gsm8k", "main"), {"split": "train[:10%]", "revision": "v1"})]
    with pytest.raises(PreflightError, match=r"data\.task=openai/gsm8k .*revision gone.*no such revision"):
        answers("openai/gsm8k", revision="gone")


def test_a_folder_of_shards_is_read_by_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    shards = tmp_path / "shards"
    shards.mkdir()
    for name, numbers in (("train-0", "ab"), ("train-1", "cd"), ("test-0", "e")):
        pq.write_table(
            pa.table({"question": list(numbers), "answer": list(numbers)}), shards / f"{name}.parquet"
        )
    for split, found in (("train", "abcd"), ("test", "e"), ("train[:50%]", "ab"), ("train+test", "abcde")):
        assert answers(shards, split=split) == list(found)
    with pytest.raises(PreflightError, match=r"data\.task=.*split dev"):
        answers(shards, split="dev")
