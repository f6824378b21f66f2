"""Large tables: the prompts of small ones, each made when it is drawn; what is passed over and said."""

import gzip
import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from entroray.config import Config
from entroray.data import large, large_questions, prompts
from entroray.data.curriculum import Curriculum, Rule
from entroray.data.large_questions import LargeQuestions
from entroray.data.mixture import Interleaved
from entroray.data.prompts import LargePrompts, PromptStream
from entroray.data.sources import table
from entroray.errors import ConfigError, DataError, PreflightError
from entroray.policy.tokenizer import byte_tokenizer
from entroray.types import Prompt
from entroray.wiring import dataset
from entroray.wiring.selection import build_selection
from tests.composed import configured

COUNT = 60
ROWS = [
    {"question": f"Say {i}", "answer": str(i), "level": i % 3, "choices": [f"a{i}", "b"]}
    for i in range(COUNT)
]
AGAIN = [{**ROWS[3], "answer": "x"}, ROWS[4], {**ROWS[5], "answer": "y"}]
TOKENIZER = byte_tokenizer()


@pytest.fixture
def lowered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A table of 10 rows is large, and is taken in by 16."""
    monkeypatch.setenv("ENTRORAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(large, "LARGE", 10)
    monkeypatch.setattr(large_questions, "BATCH", 16)
    yield
    assert not [*(tmp_path / "cache").glob("*")], "the file has no name"


def wide(name: str, *more: str) -> Config:
    return configured("data=table", f'data.task="{name}"', "data.max_prompt=200", *more)


def parquet(path: Path, rows: list[dict[str, Any]], **how: Any) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, **how)
    return path


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text(
        "question,answer,level\n" + "\n".join(f"{r['question']},{r['answer']},{r['level']}" for r in rows)
    )
    return path


def everything(read: dataset.Dataset) -> list[tuple[Any, ...]]:
    split = read.split
    found = [p for part in (split.heldout, split.demonstrations, split.training) for p in part]
    return sorted((p.id, p.text, p.token_ids, p.reference, p.alternatives, repr(p.entry)) for p in found)


VERL = [
    {
        "prompt": [{"role": "system", "content": "Add."}, {"role": "user", "content": f"Say {i}"}],
        "reward_model": {"ground_truth": [str(i), f"{i}.0"], "style": "rule"},
        "weight": np.float32(0.1).item(),
    }
    for i in range(COUNT)
]
VERL_COLUMNS = ("data.settings.question=prompt", "data.settings.answer=reward_model.ground_truth")
MAKERS = {
    "parquet": lambda folder: parquet(folder / "rows.parquet", ROWS + AGAIN, row_group_size=7),
    "jsonl": lambda folder: lines(folder / "rows.jsonl", ROWS + AGAIN),
    "csv": lambda folder: csv(folder / "rows.CSV", ROWS + AGAIN),
    "array": lambda folder: _written(folder / "rows.json", json.dumps(ROWS + AGAIN, indent=1).encode()),
    "gz": lambda folder: _written(
        folder / "rows.jsonl.gz", gzip.compress("\n".join(map(json.dumps, ROWS + AGAIN)).encode())
    ),
    "shards": lambda folder: [
        parquet(folder / "rows-0.parquet", ROWS[:20]),
        parquet(folder / "rows-1.parquet", [{**r, "more": 1} for r in ROWS[20:] + AGAIN]),
        folder / "rows-*.parquet",
    ][-1],
    "mixed": lambda folder: [
        parquet(folder / "rows-0.parquet", ROWS[:20]),
        lines(folder / "rows-1.jsonl", ROWS[20:] + AGAIN),
        folder / "rows-*",
    ][-1],
}


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("kind", MAKERS)
def test_a_large_table_gives_the_prompts_that_a_small_one_gives(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lowered: None
) -> None:
    config = wide(str(MAKERS[kind](tmp_path)))
    found = dataset.read_dataset(config, TOKENIZER)
    assert isinstance(found.split.training, LargePrompts) and len(everything(found)) == COUNT
    assert found.dropped.startswith("3 duplicates (2 with another answer), 0 too long, 0 bad rows; ")
    assert 0 < len(found.split.heldout) < 20
    monkeypatch.setattr(large, "LARGE", 1000)
    small = dataset.read_dataset(config, TOKENIZER)
    assert isinstance(small.split.training, tuple) and everything(found) == everything(small)


def test_conversations_alternatives_and_templates_are_those_of_a_small_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lowered: None
) -> None:
    packed, text = parquet(tmp_path / "verl.parquet", VERL), lines(tmp_path / "verl.jsonl", VERL)
    template = 'data.template="{choices:/} {level} of {question}"'
    same = [{**row, "question": "Which?"} for row in ROWS]
    other = parquet(tmp_path / "same.parquet", same), lines(tmp_path / "same.jsonl", same)
    configs = [wide(str(p), *VERL_COLUMNS) for p in (packed, text)] + [wide(str(p), template) for p in other]
    found = [everything(dataset.read_dataset(config, TOKENIZER)) for config in configs]
    assert all(len(each) == COUNT for each in found) and found[0][0][4]
    monkeypatch.setattr(large, "LARGE", 1000)
    assert found == [everything(dataset.read_dataset(config, TOKENIZER)) for config in configs]


def test_a_template_that_cannot_be_filled_is_refused_before_a_prompt_is_drawn(
    tmp_path: Path, lowered: None
) -> None:
    config = wide(str(parquet(tmp_path / "rows.parquet", ROWS)))
    for template, says in (("{levle}", r"levle.*`level`"), ("{", r"^template '\{'")):
        with pytest.raises(ConfigError, match=says):
            dataset.read_dataset(replace(config, data=replace(config.data, template=template)), TOKENIZER)


def test_questions_that_are_none_are_refused_before_a_prompt_is_drawn(tmp_path: Path, lowered: None) -> None:
    rows = [{"question": ["no message"], "answer": "1"}] * 20
    with pytest.raises(PreflightError, match=r"(?s)1 of 20 .*line 1: 'question' .*data\.settings\.bad_rows"):
        dataset.read_dataset(wide(str(parquet(tmp_path / "rows.parquet", rows))), TOKENIZER)


def test_the_part_of_a_row_does_not_depend_on_the_process(tmp_path: Path, lowered: None) -> None:
    """Pinned: sets of names have another order in every process."""
    template = "{choices.0} {level} {question} {answer}"
    config = wide(str(parquet(tmp_path / "rows.parquet", ROWS)), "data.heldout=0.1")
    read = dataset.read_dataset(replace(config, data=replace(config.data, template=template)), TOKENIZER)
    assert [p.reference for p in read.split.heldout] == ["14", "15", "22", "42"]


# The order.


def test_the_order_is_by_row_new_every_epoch_and_goes_on_where_it_stood(
    tmp_path: Path, lowered: None
) -> None:
    config = wide(str(parquet(tmp_path / "rows.parquet", ROWS)), "data.heldout=0")
    training = dataset.read_dataset(config, TOKENIZER).split.training
    whole = [p.text for p in islice(PromptStream(training, seed=3), 3 * COUNT)]
    epochs = [whole[i : i + COUNT] for i in range(0, 3 * COUNT, COUNT)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2]) and epochs[0] != epochs[1]
    for position in (0, 7, COUNT - 1, COUNT, 2 * COUNT + 3):
        resumed = PromptStream(
            dataset.read_dataset(config, TOKENIZER).split.training, seed=3, position=position
        )
        assert [p.text for p in islice(resumed, 10)] == whole[position : position + 10]
    assert "".join(f"{text[4:]} " for text in whole[:8]) == "20 28 0 31 4 47 9 51 "


def test_more_rows_never_move_a_prompt_to_another_part(tmp_path: Path, lowered: None) -> None:
    def places(rows: list[dict[str, Any]]) -> dict[str, str]:
        path = parquet(tmp_path / "rows.parquet", rows)
        split = dataset.read_dataset(
            wide(str(path), "data.heldout=0.2", "data.demonstrations=0.3"), TOKENIZER
        ).split
        names = ("heldout", "demonstrations", "training")
        found = [(p.text, name) for name in names for p in getattr(split, name)]
        assert len(dict(found)) == len(found) == len(rows)
        return dict(found)

    few, many = places(ROWS[:30]), places([*ROWS[30:], *ROWS[:30]])
    assert few.items() <= many.items() and len({*many.values()}) == 3


# Passed over.


def test_what_is_too_long_is_passed_over_counted_and_kept_in_the_checkpoint(
    tmp_path: Path, lowered: None
) -> None:
    rows = [{**row, "question": row["question"] * (50 if i % 4 == 0 else 1)} for i, row in enumerate(ROWS)]
    config = wide(str(parquet(tmp_path / "rows.parquet", rows)), "data.heldout=0")
    training = dataset.read_dataset(config, TOKENIZER).split.training
    observers, (measure,) = dataset.count_drawn(training)
    stream = PromptStream(training, seed=0)
    drawn = [next(stream) for _ in range(45)]
    assert len({p.id for p in drawn}) == 45 and all(len(p.token_ids) <= 200 for p in drawn)
    assert stream.position >= 59 and len(training) == COUNT
    assert measure((), (), 1) == {"prompts/too_long": 15.0, "prompts/bad": 0.0}
    again, (measured,) = dataset.count_drawn(dataset.read_dataset(config, TOKENIZER).split.training)
    again["data"].restore(json.loads(json.dumps(observers["data"].state())))
    assert measured((), (), 1)["prompts/too_long"] == 15.0
    known = [stream.at(position) for position in range(COUNT)]
    assert sum(p is None for p in known) == 15 and [p.id for p in known if p][:45] == [p.id for p in drawn]


def test_a_curriculum_passes_over_what_is_too_long(tmp_path: Path, lowered: None) -> None:
    rows = [{**row, "question": row["question"] * (50 if i % 2 else 1)} for i, row in enumerate(ROWS)]
    training = dataset.read_dataset(
        wide(str(parquet(tmp_path / "rows.parquet", rows)), "data.heldout=0"), TOKENIZER
    ).split.training
    chosen = Curriculum(PromptStream(training, seed=0), COUNT, Rule(retire=1.0), seed=0)
    assert len({next(chosen).id for _ in range(30)}) == 30 and chosen.passed == 0


def test_nothing_short_enough_is_said_before_the_run_or_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lowered: None
) -> None:
    path = parquet(tmp_path / "rows.parquet", ROWS)
    with pytest.raises(PreflightError, match=r"60 rows, no prompt: .*data\.max_prompt=3"):
        dataset.read_dataset(wide(str(path), "data.max_prompt=3"), TOKENIZER)
    monkeypatch.setattr(prompts, "PATIENCE", 5)
    rows = [{**row, "question": row["question"] * (50 if i else 1)} for i, row in enumerate(ROWS)]
    training = dataset.read_dataset(
        wide(str(parquet(tmp_path / "long.parquet", rows)), "data.heldout=0"), TOKENIZER
    ).split.training
    with pytest.raises(DataError, match=r"data\.max_prompt"):
        [*islice(PromptStream(training, seed=0), 2)]


def test_rows_with_nothing_in_their_columns_are_listed_by_line_as_ever(tmp_path: Path, lowered: None) -> None:
    rows = [{"question": f"Say {i}", "answer": float(i)} for i in range(20)]
    rows[2]["question"], rows[7]["answer"], rows[11]["question"], rows[13]["answer"] = (
        None,
        None,
        " ",
        float("nan"),
    )
    first = parquet(tmp_path / "a.parquet", rows[:10])
    parquet(tmp_path / "b.parquet", rows[10:])
    with pytest.raises(PreflightError) as caught:
        table(str(tmp_path / "*.parquet"))
    said = str(caught.value)
    assert "4 of 20" in said and "data.settings.bad_rows" in said
    for place in (
        "a.parquet line 3: 'question'",
        "a.parquet line 8: 'answer'",
        "b.parquet line 2: 'question'",
    ):
        assert place in said
    questions, bad = table(str(tmp_path / "*.parquet"), bad_rows=0.2)
    assert isinstance(questions, LargeQuestions) and bad == 4 and len(questions) == 16
    config = wide(f"{tmp_path}/*.parquet", "data.settings.bad_rows=0.2", "data.heldout=0")
    read = dataset.read_dataset(config, TOKENIZER)
    assert len(everything(read)) == 16 and ", 4 bad rows" in read.dropped
    with pytest.raises(PreflightError, match=r"line 1: no 'problem' \(columns: question, answer\)"):
        table(str(first), question="problem")


def test_a_text_that_is_not_utf8_and_a_long_list_are_refused_by_line(tmp_path: Path, lowered: None) -> None:
    raw = pa.array([b"fine"] * 20 + [b"caf\xe9"] * 30, pa.binary()).view(pa.string())
    pq.write_table(pa.table({"question": raw, "answer": ["1"] * 50}), tmp_path / "rows.parquet")
    with pytest.raises(
        PreflightError, match=r"(?s)30 of 50 .*line 21: not UTF-8 at byte 3.*and 10 more.*LATIN1"
    ):
        table(str(tmp_path / "rows.parquet"))


def test_what_shows_when_a_row_is_drawn_is_passed_over_until_it_is_too_much(
    tmp_path: Path, lowered: None
) -> None:
    rows = [{"question": f"Say {i}", "answer": "work ####" if i in (4, 9) else str(i)} for i in range(40)]
    path = str(parquet(tmp_path / "rows.parquet", rows))
    training = dataset.read_dataset(wide(path, "data.heldout=0"), TOKENIZER).split.training
    with pytest.raises(
        DataError, match=r"(?s)1 of 40 .*line (5|10): 'answer' .*'####'.*data\.settings\.bad_rows"
    ):
        [*islice(PromptStream(training, seed=0), 40)]
    training = dataset.read_dataset(
        wide(path, "data.heldout=0", "data.settings.bad_rows=0.05"), TOKENIZER
    ).split.training
    drawn = [*islice(PromptStream(training, seed=0), 38)]
    assert len({p.id for p in drawn}) == 38
    observers, (measure,) = dataset.count_drawn(training)
    assert measure((), (), 1) == {"prompts/too_long": 0.0, "prompts/bad": 2.0}
    resumed = dataset.read_dataset(wide(path, "data.heldout=0", "data.settings.bad_rows=0.05"), TOKENIZER)
    again, (measured,) = dataset.count_drawn(resumed.split.training)
    again["data"].restore(json.loads(json.dumps(observers["data"].state())))
    assert len([*islice(PromptStream(resumed.split.training, seed=0, position=40), 76)]) == 76
    assert measured((), (), 1) == {"prompts/too_long": 0.0, "prompts/bad": 2.0}


@pytest.mark.parametrize("write", [parquet, lines], ids=["columns", "texts"])
def test_overlap_with_a_set_is_counted_over_the_rows_that_are_good(
    write: Any, tmp_path: Path, lowered: None
) -> None:
    bad = {**ROWS[0], "question": "Say no", "answer": "work ####"}
    path = write(tmp_path / "rows.data", [*ROWS, {**ROWS[0], "question": " "}, bad, ROWS[0]])
    mine = lines(tmp_path / "mine.jsonl", [ROWS[7], ROWS[8], {"question": "Other", "answer": "1"}])
    word = f'evaluate.sets.mine={{task: "{mine}"}}'
    config = wide(str(path), "data.settings.bad_rows=0.1", "data.heldout=0.2", word)
    read = dataset.read_dataset(config, TOKENIZER)
    assert isinstance(read.split.training, LargePrompts)
    assert dataset.set_lines(config, read)[0].endswith("2 of 3 questions are in the training data, too")


def test_questions_of_texts_that_differ_in_the_metadata_of_the_template_are_two(
    tmp_path: Path, lowered: None
) -> None:
    rows = [{"question": "Work", "answer": str(i), "metadata": {"expression": f"{i}+0"}} for i in range(20)]
    config = wide(str(lines(tmp_path / "rows.jsonl", rows)), "data.heldout=0", 'data.template="{expression}"')
    assert len([*dataset.read_dataset(config, TOKENIZER).split.training]) == 20


# Beside other parts, and resumed.


def test_a_large_part_of_a_mixture_gives_way_to_a_small_one(tmp_path: Path, lowered: None) -> None:
    big = parquet(tmp_path / "big.parquet", ROWS)
    other = parquet(
        tmp_path / "other.parquet", [*ROWS[:5], *({**r, "question": "Tell" + r["question"]} for r in ROWS)]
    )
    few = lines(tmp_path / "few.jsonl", [ROWS[7], {"question": "Few", "answer": "1"}])
    parts = {
        name: {"source": "table", "task": str(path), "judge": {"fn": "math"}}
        for name, path in (("big", big), ("few", few), ("other", other))
    }
    config = configured(
        "data=table", f"data.parts={json.dumps(parts).replace(chr(34), '')}", "data.heldout=0", "data.task=x"
    )
    read = dataset.read_dataset(config, TOKENIZER)
    assert isinstance(read.split.training, Interleaved)
    found = {p.text: p.domain for p in read.split.training}
    assert len(found) == 2 * COUNT + 1 and found["Say 7"] == "few" and found["Say 0"] == "big"
    assert [p.domain for p in read.split.training[:3]] == ["big", "few", "other"]
    stream = dataset.prompt_order(config.data, read.split.training, 0)
    assert {p.domain for p in islice(stream, 100)} == {"big", "few", "other"} and stream.position >= 100
    assert {*dataset.count_drawn(read.split.training)[0]} == {"data.parts.big", "data.parts.other"}
    assert dataset.identity(config, read)["data.task"] == dataset.identity(config, read)["data.task"]


def test_a_file_with_another_answer_is_another_file(tmp_path: Path, lowered: None) -> None:
    config = wide(str(tmp_path / "rows.parquet"))
    named = []
    for rows in (ROWS, ROWS, [*ROWS[:-1], {**ROWS[-1], "answer": "0"}], ROWS[::-1]):
        parquet(tmp_path / "rows.parquet", rows)
        named.append(dataset.identity(config, dataset.read_dataset(config, TOKENIZER))["data.task"])
    assert named[0] == named[1] and len({*named}) == 3


def test_a_run_counts_what_was_passed_over(tmp_path: Path, lowered: None) -> None:
    config = wide(str(parquet(tmp_path / "rows.parquet", ROWS)), "data.heldout=0")
    training = dataset.read_dataset(config, TOKENIZER).split.training
    assert dataset.count_drawn((Prompt("p", "q", (1,), ""),)) == ({}, [])
    _, chosen = build_selection(config.rollout, PromptStream(training, seed=0), 9, 0)
    assert "data" not in chosen.observers


def test_contradictions_are_of_what_stands_behind_the_marker(tmp_path: Path, lowered: None) -> None:
    rows = [*ROWS, {**ROWS[0], "answer": "so it is #### 0"}, {**ROWS[1], "answer": "#### 7"}]
    read = dataset.read_dataset(wide(str(parquet(tmp_path / "rows.parquet", rows))), TOKENIZER)
    assert read.dropped.startswith("2 duplicates (1 with another answer), ")


def test_a_data_set_of_the_hub_is_read_where_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lowered: None
) -> None:
    import datasets

    held = datasets.Dataset.from_list(ROWS)
    asked: list[Any] = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or held)
    config = wide(
        "BytedTsinghua-SIA/DAPO-Math-17k",
        "data.settings.subset=main",
        'data.settings.split="train[:10%]"',
        "data.settings.revision=abc123",
        "data.heldout=0",
    )
    read = dataset.read_dataset(config, TOKENIZER)
    assert asked == [
        (("BytedTsinghua-SIA/DAPO-Math-17k", "main"), {"split": "train[:10%]", "revision": "abc123"})
    ]
    assert len(everything(read)) == COUNT and isinstance(read.split.training, LargePrompts)
    assert replace(read).split.training[0].entry["level"] in (0, 1, 2)
