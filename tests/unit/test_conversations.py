"""Columns by path, conversations as questions, templates with braces, duplicates that differ."""

import json
import re
from collections.abc import Callable
from csv import DictWriter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from entroray.data import large
from entroray.data.prompts import make_prompts, prompt_id, render
from entroray.data.sources import Question, table
from entroray.data.tables import lookup
from entroray.errors import ConfigError, PreflightError
from entroray.policy.tokenizer import byte_tokenizer, chat
from entroray.wiring.dataset import read_dataset
from tests.composed import configured


def file(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).write_bytes(content)
    return folder / name


# Columns and conversations.


def test_columns_are_named_by_their_path() -> None:
    row = {"a": {"b": [{"c": 1}, {"c": 2}]}, "a.b": "whole", "x.y": {"z": 3}}
    assert lookup(row, "a.b") == "whole" and lookup(row, "x.y.z") == 3
    assert [lookup(row["a"], path) for path in ("b.0.c", "b.1.c", "b.-1.c")] == [1, 2, 2]
    for path in ("b.2.c", "b.c", "b.0.d", "c", ""):
        with pytest.raises(KeyError):
            lookup(row["a"], path)


VERL = [
    {
        "prompt": [{"role": "user", "content": f"Say {i}"}],
        "reward_model": {"ground_truth": str(i), "style": "rule"},
    }
    for i in range(2)
]
COLUMNS = {"question": "prompt", "answer": "reward_model.ground_truth"}


def test_verls_layout_is_read_from_json_and_parquet_alike(tmp_path: Path) -> None:
    lines = file(tmp_path, "verl.jsonl", "\n".join(map(json.dumps, VERL)).encode())
    pq.write_table(pa.Table.from_pylist(VERL), tmp_path / "verl.parquet")
    for path in (lines, tmp_path / "verl.parquet"):
        rows, _ = table(str(path), **COLUMNS)
        assert [(q.text, q.answer, q.before, q.task) for q in rows] == [
            ("Say 0", "0", (), "verl"),
            ("Say 1", "1", (), "verl"),
        ]
    with pytest.raises(PreflightError, match=r"'reward_model\.truth'.*reward_model\.ground_truth"):
        table(str(lines), question="prompt", answer="reward_model.truth")


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], r"\[\]"),
        ([{"from": "human", "text": "Say 1"}], "role and content"),
        *(([{"from": x, "value": "Say 1"}], "role and content") for x in ([1], 3)),
        ([{"from": "human", "value": None}], "role and content"),
        (
            [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
            r"'assistant'.*question=messages\.0\.value",
        ),
        (
            [*({"role": r, "content": "a"} for r in ("system", "user", "assistant"))],
            r"'assistant'.*question=messages\.1\.content",
        ),
        (
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
            r"'assistant'.*question=messages\.0\.content",
        ),
        ([{"role": "user", "content": " "}], "empty"),
        ([{"role": "user", "content": [{"type": "image", "image": "x"}]}], "role and content"),
        ([{"role": "user", "content": None}], "role and content"),
        (["Say 1"], "messages"),
        ({"text": "a"}, r"question=messages\.text"),
    ],
)
def test_a_conversation_that_cannot_be_answered_is_named(tmp_path: Path, messages: object, says: str) -> None:
    row = json.dumps({"messages": messages, "answer": "1"}).encode()
    with pytest.raises(PreflightError, match=f"line 1: 'messages'.*{says}"):
        table(str(file(tmp_path, "rows.jsonl", row)), question="messages")


@pytest.mark.parametrize("write", [json.dumps, repr])
@pytest.mark.parametrize("count", [2, large.LARGE])
def test_a_column_is_found_within_a_text_that_holds_it(
    tmp_path: Path, write: Callable[[Any], str], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(large, "LARGE", 5)
    count = min(count, 20)
    given = [
        {"prompt": write(VERL[i % 2]["prompt"]), "reward_model": write(VERL[i % 2]["reward_model"])}
        for i in range(count)
    ]
    given[-1] = {**given[0], "reward_model": write({"ground_truth": ["0", "00"]})} if count > 2 else given[-1]
    pq.write_table(pa.Table.from_pylist(given), tmp_path / "verl.parquet")
    with (tmp_path / "verl.csv").open("w", newline="") as opened:
        writer = DictWriter(opened, ["prompt", "reward_model"])
        writer.writeheader()
        writer.writerows(given)
    for name in ("verl.parquet", "verl.csv"):
        rows, _ = table(str(tmp_path / name), **COLUMNS)
        assert [(q.text, q.answer) for q in rows][:2] == [("Say 0", "0"), ("Say 1", "1")]
        made = make_prompts(
            rows, tokenize=lambda text: (1,), template="{reward_model.ground_truth}: {prompt}"
        )
        assert {p.text for p in made.prompts} >= {"0: Say 0", "1: Say 1"}
    with pytest.raises(PreflightError, match=r"reward_model\.truth'.*not within .*ground_truth.*JSON"):
        table(str(tmp_path / name), question="prompt", answer="reward_model.truth")


HUMAN = [{"from": "system", "value": "Add."}, {"from": "human", "value": "1+1", "weight": 1}]


@pytest.mark.parametrize("write", [lambda given: given, json.dumps, repr])
def test_sharegpts_form_is_a_conversation(tmp_path: Path, write: Callable[[Any], Any]) -> None:
    answered = write([*HUMAN, {"from": "gpt", "value": "2"}])
    row = {"asked": write(HUMAN), "conversations": answered, "answer": "2"}
    lines = str(file(tmp_path, "rows.jsonl", json.dumps(row).encode()))
    (question,), _ = table(lines, question="asked")
    assert (question.text, question.before) == ("1+1", (SAID[0],))
    (question,), _ = table(lines, question="conversations.1.value", answer="conversations.2.value")
    assert (question.text, question.answer) == ("1+1", "2")


def test_a_message_that_stands_alone_is_a_conversation(tmp_path: Path) -> None:
    for said in ({"role": "user", "content": "1+1"}, {"from": "human", "value": "1+1"}):
        row = json.dumps({"messages": said, "answer": "2"}).encode()
        (question,), _ = table(str(file(tmp_path, "rows.jsonl", row)), question="messages")
        assert question.text == "1+1"


def test_messages_in_a_text_may_begin_with_another_key_and_other_lists_are_texts(tmp_path: Path) -> None:
    named = [{"name": "me", **message} for message in SAID]
    texts = ['[{"x": 1}, {"x": 2}] has how many?', '[{"x": 1}]', "[{'a': 1"]
    rows = [{"question": text, "answer": "2"} for text in (json.dumps(named), repr(named), *texts)]
    found, _ = table(str(file(tmp_path, "rows.jsonl", "\n".join(map(json.dumps, rows)).encode())))
    assert [q.text for q in found] == ["1+1", "1+1", *texts]
    assert [len(q.before) for q in found] == [1, 1, 0, 0, 0]


@pytest.mark.parametrize("template", ["{{question}}", "Answer this.", "", "{}"])
@pytest.mark.parametrize("place", ["data", "data.parts.countdown"])
def test_a_template_that_names_no_field_is_refused(template: str, place: str) -> None:
    data = "mixture" if "parts" in place else "chain_sum"
    with pytest.raises(ConfigError, match=rf"^{re.escape(place)}\.template=.*\{{question\}}.*single braces"):
        configured(f"data={data}", f'{place}.template="{template}"')


SAID = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1+1"}]


@pytest.mark.parametrize(
    "messages",
    [
        *(json.dumps(SAID), repr(SAID), repr(SAID).replace("}, {", "}\n {"), f" {json.dumps([None, *SAID])}"),
        *([None, *SAID], [SAID[0], None, SAID[1]]),
    ],
    ids=["json", "python", "numpy", "null in json", "null first", "null between"],
)
def test_messages_written_as_a_text_or_with_nulls_among_them_are_a_conversation(
    tmp_path: Path, messages: object
) -> None:
    row = {"messages": messages, "answer": "2"}
    (question,), _ = table(str(file(tmp_path, "rows.jsonl", json.dumps(row).encode())), question="messages")
    assert (question.text, question.before) == ("1+1", (SAID[0],))
    assert render(question, "{messages}=") == "1+1="


def test_a_text_about_messages_is_a_text_and_messages_that_nobody_can_read_are_named(tmp_path: Path) -> None:
    text = "[1, 2]: which role has its content?"
    row = json.dumps({"question": text, "answer": "2"}).encode()
    assert table(str(file(tmp_path, "rows.jsonl", row)))[0][0].text == text
    row = json.dumps({"question": "[{'role': 'user', 'content': array(['x'])}]", "answer": "2"}).encode()
    with pytest.raises(PreflightError, match=r"line 1: 'question' .*array"):
        table(str(file(tmp_path, "rows.jsonl", row)))


def test_the_question_of_a_template_is_the_one_that_is_asked(tmp_path: Path) -> None:
    row = {"problem": "1+1", "question": "id-7", "metadata": {"question": "no"}, "answer": "2"}
    (question,), _ = table(str(file(tmp_path, "rows.jsonl", json.dumps(row).encode())), question="problem")
    assert render(question, "{question}= {problem}") == "1+1= 1+1"


@pytest.mark.parametrize(
    ("written", "answers"),
    [
        *(('["7"]', ("7", ())), (r'["\\frac12"]', (r"\frac12", ())), (r'["\frac12"]', (r"\frac12", ()))),
        *(("[7]", ("[7]", ())), ('["a", "b"]', ('["a", "b"]', ())), ("a #### 7", ("a #### 7", ()))),
    ],
)
def test_one_answer_in_a_list_in_a_text_is_it(
    written: str, answers: tuple[str, tuple[str, ...]], tmp_path: Path
) -> None:
    row = {"question": "1+1", "answer": written}
    (question,), _ = table(str(file(tmp_path, "rows.jsonl", json.dumps(row).encode())), marker="")
    assert (question.answer, question.alternatives) == answers


def test_a_list_of_answers_is_a_reference_and_its_alternatives(tmp_path: Path) -> None:
    lists = [["7", "seven", "7"], [0.5, "1/2", True], ["so #### 7", "#### 8"], 7]
    rows = [{"question": f"q{i}", "answer": answer} for i, answer in enumerate(lists)]
    lines = file(tmp_path, "rows.jsonl", "\n".join(map(json.dumps, rows)).encode())
    found = [(q.answer, q.alternatives) for q in table(str(lines))[0]]
    assert found == [("7", ("seven",)), ("0.5", ("1/2", "True")), ("7", ("8",)), ("7", ())]
    made = make_prompts(table(str(lines))[0], tokenize=lambda text: (1,)).prompts
    assert {(p.reference, p.alternatives) for p in made} == {*found}
    for answer in ([], [None], [["7"]], [""], {"a": 1}):
        row = json.dumps({"question": "q", "answer": answer}).encode()
        with pytest.raises(PreflightError, match="line 1: 'answer'"):
            table(str(file(tmp_path, "bad.jsonl", row)))


def test_two_rows_contradict_each_other_where_no_answer_is_right_in_both() -> None:
    row = lambda *right: Question("t", "q", right[0], {}, (), right[1:])
    made = make_prompts(
        [row("7", "seven"), row("seven"), row("8"), row("9", "7")], tokenize=lambda text: (1,)
    )
    assert (made.duplicates, made.contradictions) == (3, 1)


def test_a_conversation_is_rendered_by_the_chat_template_and_its_own_system_message_wins(
    tmp_path: Path,
) -> None:
    shot = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2", "name": None}]
    own = [
        {"role": "system", "content": "Be brief."},
        *shot,
        {"role": "user", "content": [{"type": "text", "text": "2+2"}]},
    ]
    rows = [
        {"messages": own, "answer": "4"},
        {"messages": own[1:], "answer": "4"},
        {"messages": "2+2", "answer": "4"},
    ]
    path = file(tmp_path, "rows.jsonl", "\n".join(map(json.dumps, rows)).encode())
    questions, _ = table(str(path), question="messages")
    tokenizer = byte_tokenizer()
    made = make_prompts(questions, tokenize=chat(tokenizer, "Add."), template="{messages}=")
    assert {tokenizer.decode(p.token_ids) for p in made.prompts} == {
        "<|system|>Be brief.<|user|>1+1<|assistant|>2<|end|><|user|>2+2=<|assistant|>",
        "<|system|>Add.<|user|>1+1<|assistant|>2<|end|><|user|>2+2=<|assistant|>",
        "<|system|>Add.<|user|>2+2=<|assistant|>",
    }
    assert made.duplicates == 0 and {p.text for p in made.prompts} >= {
        "2+2=",
        "user: 1+1\nassistant: 2\nuser: 2+2=",
    }
    assert prompt_id("rows", "2+2=") in {p.id for p in made.prompts}, (
        "a text is the prompt that it always was"
    )


# Templates and duplicates.


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (r"{question} Put it in \boxed{}.", r"{question} Put it in \\boxed{{}}."),
        ('{question} Reply as {"answer": 1}', '{question} Reply as {{"answer": 1}}'),
        (r"\frac{a}{b} of {question}", r"\\frac{{a}}{{b}} of {question}"),
        ("{question", "{{question"),
        ("{0}", "{{0}}"),
    ],
)
def test_a_brace_that_is_text_is_shown_as_it_is_written(template: str, says: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)):
        render(Question("t", "q", "1", {"question": "q", "answer": "1"}), template)


def test_a_template_names_fields_by_path_and_reaches_nothing_else() -> None:
    question = Question("t", "What?", "1", {"choices": ["a", "b"], "meta": {"x": 1}})
    assert (
        render(question, "{question} {choices:/} {choices.1} {choices[0]} {meta[x]} {meta.x}")
        == "What? a/b b a 1 1"
    )
    for template in ("{question.__class__}", "{meta.__class__}", "{question[0]}"):
        with pytest.raises(ConfigError, match=re.escape(template)):
            render(question, template)


def test_duplicates_that_contradict_each_other_are_counted_and_said(tmp_path: Path) -> None:
    rows = [
        Question("t", "Say it", str(i % 2), {"question": "Say it", "answer": str(i % 2)}) for i in range(40)
    ]
    made = make_prompts(rows, tokenize=lambda text: tuple(map(ord, str(text))))
    assert (made.duplicates, made.contradictions, made.differing) == (39, 20, {"answer"})
    which = [{"question": "Which?", "choices": [str(i), "b"], "answer": 0} for i in range(4)]
    said = [{"question": f"Say {i}", "choices": [], "answer": 0} for i in range(30)]
    path = file(tmp_path, "rows.jsonl", "\n".join(map(json.dumps, [*which, *said])).encode())
    config = configured("data=table", f"data.task={path}", "data.heldout=0")
    assert read_dataset(config, byte_tokenizer()).dropped.startswith(
        "3 duplicates (they differ in choices), 0 too long"
    )
    again = [{"question": "Which?", "answer": i} for i in (0, 1, 1, 0)]
    path.write_bytes("\n".join(map(json.dumps, [*again, *said])).encode())
    dropped = read_dataset(config, byte_tokenizer()).dropped
    assert dropped.startswith("3 duplicates (2 with another answer; they differ in answer), 0 too long")
