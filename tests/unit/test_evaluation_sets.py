"""Evaluation sets of one's own: said, read, compared with the training data, judged."""

import asyncio
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from entroray.cli import judge_trial, submit, train
from entroray.data.overlap import count_shared, question_hash
from entroray.errors import ConfigError, PreflightError
from entroray.policy.tiny_model import build_tiny_model
from entroray.policy.tokenizer import byte_tokenizer
from entroray.reward import build_verification
from entroray.rows import conf_folder
from entroray.types import Prompt, Rollout, Verdict
from entroray.wiring import actors, compose, dataset, preflight, run_directory, sampler
from entroray.wiring.parts import build_parts
from tests.composed import configured

TOKENIZER = byte_tokenizer()
ROWS = [("What is 3 + 4?", "7"), ("What is 3 - 4?", "-1"), ("What is 30 - 4?", "26")]


def written(path: Path, rows: Sequence[tuple[str, str]] = ROWS, question: str = "problem") -> Path:
    path.write_text("".join(json.dumps({question: q, "answer": a}) + "\n" for q, a in rows))
    return path


@pytest.fixture
def mine(tmp_path: Path) -> str:
    """The word that gives the set `mine`."""
    file = written(tmp_path / "mine.jsonl")
    judge = "judge: {fn: math, extract: response}"
    return f"evaluate.sets.mine={{task: {file}, settings: {{question: problem}}, {judge}}}"


TABLE = ("data=table", "data.task=chain_sum", "data.source=reasoning_gym", "data.settings={size: 40}")
"""Sums of reasoning-gym, judged as the last line of an answer."""


# Said.


@pytest.mark.parametrize("name", sorted(p.stem for p in (conf_folder() / "evaluate").glob("*.yaml")))
def test_a_shipped_set_composes_binds_and_reads_a_local_file_of_its_columns(
    name: str, tmp_path: Path
) -> None:
    file = tmp_path / "local.parquet"
    column = configured(f"evaluate={name}").evaluate.sets[name].settings.get("question", "question")
    answer = "so 3+4 is\n#### 7" if name == "gsm8k" else "7"
    pq.write_table(pa.table({"id": [1], column: ["What is 3 + 4?"], "answer": [answer]}), file)
    told = (f"evaluate={name}", f"evaluate.sets.{name}.task={file}", *TABLE)
    config = configured(*told, "data.heldout=0")
    read = dataset.read_dataset(config, TOKENIZER)
    (prompt,) = read.sets[name].prompts
    assert prompt.reference == "7" and prompt.text.startswith("What is 3 + 4?\n")
    judge = build_verification(**read.judge)
    end = "#### 7" if name == "gsm8k" else r"\boxed{7}"
    assert (
        judge(f"It is {end}", prompt).correct and not judge(f"It is {end.replace('7', '8')}", prompt).correct
    )
    assert "unproved against the hub" in (conf_folder() / f"evaluate/{name}.yaml").read_text()


def test_several_sets_are_chosen_at_once_and_single_fields_said() -> None:
    told = ["evaluate=[aime24,aime25]", "evaluate.sets.aime24.samples=4", "evaluate.sets.mine={task: x.csv}"]
    told += ["evaluate.sets.mine.top_p=0.5", r"evaluate.sets.mine.template='{question}\n'"]
    sets = compose.load_config(told)[0].evaluate.sets
    assert {n: s.samples for n, s in sets.items()} == {"aime24": 4, "aime25": 32, "mine": None}
    assert (sets["mine"].top_p, sets["mine"].template, sets["mine"].source) == (0.5, "{question}\n", "table")


@pytest.mark.parametrize(
    ("told", "said"),
    [
        (["evaluate.sets.mine.samples=4"], r"evaluate\.sets\.\w+=\{task: "),
        (["evaluate.sets.mine=q3.jsonl"], r"'evaluate\.sets\.mine=\{task: q3\.jsonl\}'$"),
        (["evaluate.sets=q3.jsonl"], r"'evaluate\.sets=\{NAME: \{task: q3\.jsonl\}\}'$"),
        (
            ["evaluate.sets.mine={task: x, settings: y}"],
            r"^evaluate\.sets\.mine\.settings must be a mapping, got 'y'",
        ),
        (
            ["evaluate.sets.mine={task: x, k: many}"],
            r"^evaluate\.sets\.mine\.k must be a list, got 'many'",
        ),
        (["evaluate=aime24", "evaluate.sets.aime24.k=many"], r"aime24\.k must be a list, got 'many'"),
        (["evaluate=aime24", "evaluate.sets.aime24.task=[a,b]"], r"aime24\.task must be text, got"),
        (
            ["evaluate=aime24", "evaluate.sets.aime.samples=4"],
            r"no `evaluate\.sets\.aime`: did you mean `aime24`",
        ),
        (["evaluate=aime24", "evaluate.sets.aime24.settings.splt=x"], r"`splt`: did you mean `split`"),
        (
            ["evaluate=aime24", "evaluate.sets.aime24.template='{{question}}'"],
            r"^evaluate\.sets\.aime24\.template=",
        ),
        (["evaluate.sets.mine={tsk: x}"], r"evaluate\.sets\.mine\.tsk`: did you mean `task`"),
        (
            ["evaluate.sets.mine={task: x, samples: many}"],
            r"^evaluate\.sets\.mine\.samples must be a whole number.*'many'",
        ),
        (["evaluate=aime24", "evaluate.sets.aime24.sampels=4"], r"evaluate\.sets\.aime24\.samples`"),
        (["evaluate=aime24", "evaluate.sets.aime24.samples=0"], r"^evaluate\.sets\.aime24\.samples=0 .*1"),
        (["evaluate=aime24", "evaluate.sets.aime24.prompts=0"], r"^evaluate\.sets\.aime24\.prompts=0 .*1"),
        (["evaluate=aime24", "evaluate.sets.aime24.top_p=0"], r"^evaluate\.sets\.aime24\.top_p=0"),
        (
            ["evaluate=aime24", "evaluate.sets.aime24.temperature=-1"],
            r"^evaluate\.sets\.aime24\.temperature=-1",
        ),
        (
            ["evaluate=aime24", "evaluate.sets.aime24.temperature=0.001"],
            r"aime24\.temperature=0\.001: .*0\.01",
        ),
        (["evaluate=aime24", "evaluate.sets.aime24.k=[64]"], r"aime24\.k=\[64\] .*aime24\.samples to 64"),
        (["evaluate=gsm8k", "evaluate.sets.gsm8k.k=[2]"], r"gsm8k\.samples .*gsm8k\.temperature above 0"),
        (["evaluate=aime24", "evaluate.sets.aime24.judge={fn: mth}"], r"aime24\.judge .*did you mean `math`"),
        (["evaluate=aime24", "evaluate.sets.aime24.source=tabl"], r"aime24\.source .*did you mean `table`"),
        (["evaluate.sets.mine={samples: 4}"], r"^evaluate\.sets\.mine\.task "),
        (["evaluate.sets={a/b: {task: x}}"], r"^evaluate\.sets: 'a/b' .*metric"),
        (["evaluate.sets={sets.a: {task: x}}"], r"^evaluate\.sets\.sets\.a: "),
        (
            ["evaluate.sets.mine={task: x}", "reward.judge={}"],
            r"evaluate\.sets\.mine\.judge .*reward\.parts ",
        ),
    ],
)
def test_a_mistake_in_a_set_is_said_by_its_setting(told: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        configured(*told)


def test_a_single_k_is_a_list_of_one_wherever_it_is_said() -> None:
    said = ["evaluate=aime24", "evaluate.sets.aime24.k=16", "evaluate.sets.mine={task: x, samples: 8, k: 4}"]
    config = configured(*said, "evaluate.k=2", "evaluate.sets.aime24.settings.revision=main")
    assert [config.evaluate.k, *(s.k for s in config.evaluate.sets.values())] == [[2], [16], [4]]
    assert config.evaluate.sets["aime24"].settings["revision"] == "main"


def test_what_a_set_leaves_open_is_the_runs_own(mine: str) -> None:
    config = configured(mine, "sampler.temperature=0.9", "rollout.max_tokens=50", "evaluate.samples=3")
    draw = sampler.set_draw(config, config.evaluate.sets["mine"])
    assert (draw.temperature, draw.top_p, draw.max_tokens, draw.notes) == (0.9, 1.0, 50, True)
    assert dataset.set_plan(config, "mine", config.evaluate.sets["mine"]).ks == (1, 2, 3)
    own = {"temperature": 0.0, "top_p": 0.5, "max_tokens": 70, "samples": 9}
    greedy = replace(config.evaluate.sets["mine"], **own)
    draw = sampler.set_draw(config, greedy)
    assert (draw.temperature, draw.top_p, draw.max_tokens, draw.notes) == (0.0, 0.5, 70, False)
    assert dataset.set_plan(config, "mine", greedy).samples == 1


def test_an_engine_holds_the_longest_answer_and_notes_only_where_there_are_sets(mine: str) -> None:
    plain = configured("data.max_prompt=30")
    longer = configured("data.max_prompt=30", mine, "evaluate.sets.mine.max_tokens=90")
    assert actors.sequence_length(plain) == 62 and actors.sequence_length(longer) == 120
    assert actors.logits_processors(plain, build_parts(plain)) == {}
    assert actors.logits_processors(longer, build_parts(longer))
    fast = configured(mine, "generator.engine.speculative_config={method: ngram}")
    assert actors.logits_processors(fast, build_parts(fast)) == {}
    much = configured(mine, "evaluate.sets.mine.max_tokens=9000", "model.warm_start.cache=/nowhere")
    with pytest.raises(PreflightError, match=r"data\.max_prompt \+ evaluate\.sets\.mine\.max_tokens = 9016 "):
        preflight.model(much)


def test_a_resumed_run_may_have_other_sets() -> None:
    assert run_directory.resume_rule("evaluate.sets.aime24.samples")[0] == "free"
    assert "curve" in run_directory.resume_rule("evaluate.sets.aime24.samples")[1]


def test_files_of_sets_go_along_with_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    written(Path("mine.jsonl"))
    told = ["evaluate.sets.mine={task: mine.jsonl, settings: {question: problem}}", "run.dir=/runs/x"]
    words = submit.pack(tmp_path / "job", configured(*told), told, None)
    (packed,) = [w for w in words if w.startswith("evaluate.sets.mine.task=")]
    assert (tmp_path / "job" / packed.partition("=")[2].strip('"')).is_file()


# Read.


def test_a_set_has_the_judge_of_training_unless_it_has_its_own(tmp_path: Path) -> None:
    file = written(tmp_path / "mine.jsonl")
    both = [f"evaluate.sets.{n}={{task: {file}, settings: {{question: problem}}}}" for n in ("a", "b")]
    told = [*TABLE, *both, "evaluate.sets.b.judge={fn: math, extract: response}"]
    spec = lambda *more: dataset.judge_spec(configured(*told, *more))["judges"]
    assert spec()["evaluate.sets:a"] == {"fn": "math", "extract": "last_line"}
    assert spec()["evaluate.sets:b"] == {"fn": "math", "extract": "response"}
    own = spec("reward.path=my.py:judge")
    assert own["evaluate.sets:a"] == own[""] and own[""]["fn"] == "custom"
    assert own["evaluate.sets:b"] == {"fn": "math", "extract": "response"}


def test_a_set_may_be_called_like_a_part_of_the_mixture(tmp_path: Path) -> None:
    file = written(tmp_path / "mine.jsonl")
    word = f"evaluate.sets.countdown={{task: {file}, settings: {{question: problem}}, judge: {{fn: math}}}}"
    config = configured(
        *("data=mixture", "data.parts.chain_sum.settings.size=300", "data.parts.countdown.settings.size=200"),
        *("data.max_prompt=40", word),
    )
    read = dataset.read_dataset(config, TOKENIZER)
    assert read.judge["judges"]["countdown"]["fn"] == "gym"
    assert read.judge["judges"][read.sets["countdown"].prompts[0].domain] == {"fn": "math"}
    assert read.sets["countdown"].label == "sets.countdown"


def test_what_is_left_out_of_a_set_is_counted_and_said(tmp_path: Path) -> None:
    rows = [*ROWS, ROWS[0], ("What is " + "1 + " * 30 + "1?", "31"), ("", "8")]
    file = written(tmp_path / "mine.jsonl", rows)
    settings = "settings: {question: problem, bad_rows: 0.5}"
    word = f"evaluate.sets.mine={{task: {file}, {settings}, judge: {{fn: math}}, samples: 2}}"
    config = configured(*TABLE, "data.max_prompt=100", word)
    read = dataset.read_dataset(config, TOKENIZER)
    assert len(read.sets["mine"].prompts) == 3
    (line,) = dataset.set_lines(config, read)
    assert line.startswith(f"mine: {file}, 3 prompts x 2 samples, temperature 1, top-p 1, at most 256 tokens")
    assert "LEFT OUT: 1 bad rows, 1 duplicates, 1 longer than data.max_prompt=100 tokens" in line
    assert line.endswith("; none of 3 questions are in the training data, too")
    few = configured(*TABLE, "data.max_prompt=100", word, "evaluate.sets.mine.prompts=2")
    assert dataset.read_dataset(few, TOKENIZER).sets["mine"].prompts == read.sets["mine"].prompts[:2]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("task=/nowhere.jsonl", r"^evaluate\.sets\.mine\.task=/nowhere\.jsonl"),
        ("settings={question: qestion}", r"^evaluate\.sets\.mine\.task=.*qestion.*mine\.settings\.bad_rows"),
        ("template='{qustion}'", r"^evaluate\.sets\.mine\.task=.*'\{qustion\}'.*did you mean"),
    ],
)
def test_a_set_that_cannot_be_read_is_refused_by_its_setting(mine: str, change: str, said: str) -> None:
    config = configured(*TABLE, "data.max_prompt=100", mine, f"evaluate.sets.mine.{change}")
    with pytest.raises((ConfigError, PreflightError), match=re.compile(said, re.DOTALL)):
        dataset.read_dataset(config, TOKENIZER)


def test_prompts_too_long_for_any_room_name_the_setting_that_gives_it(mine: str) -> None:
    config = configured("data=chain_sum", "data.settings.size=300", mine, "data.max_prompt=12")
    with pytest.raises(PreflightError, match=r"^evaluate\.sets\.mine\.task=.*data\.max_prompt=12"):
        dataset.read_dataset(config, TOKENIZER)


def test_a_copy_of_a_set_under_another_file_name_has_the_same_prompts(tmp_path: Path, mine: str) -> None:
    other = written(tmp_path / "copy.ndjson")
    read = lambda *more: dataset.read_dataset(
        configured(*TABLE, "data.max_prompt=100", mine, *more), TOKENIZER
    )
    ids = [p.id for p in read().sets["mine"].prompts]
    assert ids == [p.id for p in read(f"evaluate.sets.mine.task={other}").sets["mine"].prompts]


def test_held_out_prompts_are_not_needed_where_there_are_sets(mine: str) -> None:
    told = [*TABLE, "data.max_prompt=100", "data.heldout=0", "evaluate.every=2"]
    config = configured(*told, mine)
    read = dataset.read_dataset(config, TOKENIZER)
    dataset.check_heldout(config, build_parts(config), read)
    for more in (["evaluate.final=true"], ["learner.reset_after=2"]):
        asking = configured(*told, mine, *more)
        with pytest.raises(PreflightError, match=r"data\.heldout"):
            dataset.check_heldout(asking, build_parts(asking), read)
    bare = configured(*told)
    with pytest.raises(PreflightError, match=r"^evaluate\.every=2 .*data\.heldout"):
        dataset.check_heldout(bare, build_parts(bare), replace(read, sets={}))


# Overlap.


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("What is 3 + 4?", "what  is 3+4", True),
        ("Hello, World!", "hello world", True),
        ("Find the well-known sum (in cm).", "find the well known sum in cm", True),
        ("It costs 1,000 dollars – “cheap”.", "It costs 1000 dollars - 'cheap'", True),
        ("Ｗｈａｔ is ½?", "what is ½", True),
        ("Сколько будет 2+2?", "сколько будет 2 + 2", True),
        ("What is 3 + 4?", "What is 3 - 4?", False),
        ("What is (3+4)*2?", "What is 3+(4*2)?", False),
        ("What is 1.5 + 1?", "What is 15 + 1?", False),
        ("Use 35, 7", "Use 3, 57", False),
        ("x - 1 = 2", "x + 1 = 2", False),
        ("√2?", "√3?", False),
        ("😀", "😁", False),
    ],
)
def test_a_question_is_the_same_whatever_its_case_white_space_and_punctuation(
    one: str, other: str, same: bool
) -> None:
    assert (question_hash(one) == question_hash(other)) is same


def test_overlap_is_counted_over_a_stream_of_which_nothing_is_kept() -> None:
    hashes = tuple(frozenset({question_hash(text), 7}) for text in ("a b", "c?", "d", "C"))
    training = (text for text in ["x", "A  B", "c", "y", "A b"])
    assert count_shared(training, {"one": hashes, "two": hashes[2:3], "none": ()}) == {
        **{"one": 3, "two": 0, "none": 0},
    }
    assert count_shared(iter([]), {"one": hashes}) == {"one": 0}


def test_the_overlap_with_the_training_data_is_said(tmp_path: Path) -> None:
    training = written(tmp_path / "train.jsonl", [("what  is 3+4", "7"), ("What is 8+1?", "9")], "question")
    file = written(tmp_path / "mine.jsonl")
    word = (
        f"evaluate.sets.mine={{task: {file}, settings: {{question: problem}}, template: 'Now: {{question}}'}}"
    )
    config = configured("data=table", f"data.task={training}", "data.heldout=0", word)
    read = dataset.read_dataset(config, TOKENIZER)
    (line,) = dataset.set_lines(config, read)
    assert line.startswith("mine: ") and line.endswith("; 1 of 3 questions is in the training data, too")
    parts = build_parts(config)
    size = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16}
    build_tiny_model(tmp_path / "model", size | {"num_attention_heads": 2, "num_key_value_heads": 1}, 0)
    facts = {"parameters": 1, "resources": "", "start_seconds": 0, "sync/probe_error": 0.0}
    facts |= {"model": str(tmp_path / "model"), "evaluation_sets": [line]}
    header = train._header(config, parts, read, tmp_path, facts)
    assert f"evaluated  {line}" in header
    assert "evaluated: mine: " in train._dry(config, parts)


# Judged before anything starts.


def test_references_that_the_judge_cannot_read_are_refused_by_the_set(mine: str) -> None:
    config = configured(*TABLE, "data.max_prompt=100", mine)
    read = dataset.read_dataset(config, TOKENIZER)
    judge, one = build_verification(**read.judge), read.sets["mine"]

    class Here:
        async def judge(self, prompt: Prompt, rollouts: Sequence[Rollout]) -> list[Verdict]:
            return [judge(r.text, prompt) for r in rollouts]

    told = lambda one: asyncio.run(judge_trial._check_references("mine", one, read, Here()))  # type: ignore
    told(one)
    unread = replace(one, prompts=(*one.prompts, replace(one.prompts[0], id="x", reference="$$")))
    said = r"^evaluate\.sets\.mine\.task=.*: 1 of 4 .*evaluate\.sets\.mine\.judge"
    with pytest.raises(PreflightError, match=said):
        told(unread)
    line = asyncio.run(judge_trial._judged(config, read, Here(), one.prompts[0]))  # type: ignore
    assert line.startswith("evaluate.sets.mine: math gives 1 for ")
