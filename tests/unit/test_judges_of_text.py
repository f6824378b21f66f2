"""The judges `text`, `format` and `length`, and a reward that is made of several judges."""

import json
import math
import pickle
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from entroray.cli import train
from entroray.cli.submit import pack
from entroray.config import user_files
from entroray.errors import ConfigError
from entroray.reward import build_judge
from entroray.reward.parts import describe_judge, judge_parts, sum_parts
from entroray.reward.text_match import normalise
from entroray.reward.verdicts import Response, failed, graded
from entroray.types import Prompt, Status, Verdict
from entroray.wiring import compose, dataset, warm_start
from entroray.wiring.parts import build_parts
from entroray.wiring.run_directory import _alike, resume_rule
from tests.composed import configured


def prompt(reference: str, *alternatives: str, **entry: Any) -> Prompt:
    return Prompt("p", "?", (1,), reference, entry, alternatives=alternatives)


# Texts.


@pytest.mark.parametrize(
    ("one", "other"),
    [
        *(("Paris", "paris"), ("The  Beatles", "beatles"), ("the\nU.S.A.", "USA"), ("“Hello”", "hello")),
        *(("well-known", "well known"), ("don’t", "DON'T"), ("ﬁne", "fine"), ("①", "1"), ("ＡＢＣ", "abc")),
        *(
            ("Straße", "STRASSE"),
            ("e\u0301te\u0301", "\u00e9t\u00e9"),
            ("a\u00a0b", "A b"),
            ("x\u200by", "xy"),
        ),
        *(("1,000", "1000"), ("New York,NY", "New York, NY"), ("(A)", "a"), ("A.", "A"), ("10–20", "10-20")),
        *(("−5", "-5"), ("an apple, a pear", "apple pear"), ("Yes!", "yes"), ("İstanbul", "i̇stanbul")),
        *(("1,234,567.5", "1234567.5"), ("\ufeffParis", "Paris"), ("`x`", "x"), ("**Paris**", "Paris")),
    ],
)
def test_texts_that_are_one(one: str, other: str) -> None:
    assert normalise(one) == normalise(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        *(
            ("3.14", "314"),
            ("-5", "5"),
            ("A, C", "C"),
            ("1/2", "12"),
            ("C++", "C"),
            ("C#", "C"),
            ("50%", "50"),
            ("A", "the"),
        ),
        *(("a", "an"), ("!", "?"), ("vitamin A", "vitamin"), ("10:30", "1030"), ("2024-01-02", "20240102")),
        *(("cat", "act"), ("cat", "cats"), (".5", "5"), ("1.5", "15"), ("café", "cafe"), ("1,5", "15")),
    ],
)
def test_texts_that_are_not(one: str, other: str) -> None:
    assert normalise(one) != normalise(other)


def test_one_of_several_references_is_enough_and_none_is_a_failure_of_the_data() -> None:
    judge = build_judge({"fn": "text", "extract": "after", "marker": "Answer:"})
    verdict = judge("I think.\nAnswer: The Big Apple!", prompt("New York", "big apple", "NYC"))
    assert (verdict.reward, verdict.correct, verdict.answer) == (1.0, True, "The Big Apple!")
    assert judge("Answer: Boston", prompt("New York", "NYC")).correct is False
    nothing = judge("New York", prompt("New York"))
    assert (nothing.status, nothing.reward, nothing.correct) == (Status.OK, 0.0, False)
    assert judge("Answer: x", prompt("", "X")).correct is True
    for empty in ("", "  "):
        assert judge("Answer: x", prompt(empty)).status is Status.DATA_FAILED


def test_a_difference_counts_where_it_is_kept() -> None:
    kept = build_judge({"fn": "text", "keep": ["case", "punctuation"]})
    assert kept("the NaCl", prompt("NaCl")).correct and not kept("nacl", prompt("NaCl")).correct
    assert not kept("Na-Cl", prompt("Na Cl")).correct
    assert not build_judge({"fn": "text", "keep": ["articles"]})("The Who", prompt("Who")).correct
    with pytest.raises(ConfigError, match=r"`text\.keep` .*case, punctuation, articles.*'cases'"):
        build_judge({"fn": "text", "keep": ["cases"]})


# Forms and lengths.

R1 = r"<think>.*</think>\s*<answer>.*</answer>"


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("<think>\na\nb\n</think>\n<answer>4</answer>\n", True),
        ("<think></think><answer></answer>", True),
        ("sure: <think>a</think><answer>4</answer>", False),
        ("<think>a</think><answer>4</answer> and more", False),
        ("<think>a</think>", False),
        ("", False),
    ],
)
def test_a_form_is_of_the_whole_response(response: str, right: bool) -> None:
    verdict = build_judge({"fn": "format", "pattern": R1})(response, prompt("4"))
    assert (verdict.reward, verdict.correct) == (float(right), right)
    assert build_judge({"fn": "format", "pattern": rf".*{R1}.*"})(
        f"x {response} y", prompt("")
    ).correct is right or ("<answer>" in response)


@pytest.mark.parametrize("pattern", ["(", "*a", "[", "(?P<x>a)(?P<x>b)", "a{2,1}"])
def test_a_pattern_that_does_not_compile_is_refused_with_its_setting(pattern: str) -> None:
    with pytest.raises(ConfigError, match=r"reward\.judge: pattern="):
        configured(f'reward.judge={{fn: format, pattern: "{pattern}"}}')


@pytest.mark.parametrize(
    ("spec", "count", "reward"),
    [
        *(
            ({"maximum": 100, "buffer": 20}, n, r)
            for n, r in ((0, 0.0), (80, 0.0), (90, -0.5), (100, -1.0), (500, -1.0))
        ),
        *(({"maximum": 100}, n, r) for n, r in ((100, 0.0), (101, -1.0))),
        *(({"target": 50}, n, r) for n, r in ((50, 0.0), (25, -0.5), (75, -0.5), (0, -1.0), (900, -1.0))),
        *(({"target": "gold"}, n, r) for n, r in ((40, 0.0), (20, -0.5))),
    ],
)
def test_a_length_costs_what_dapo_and_l1_say(spec: dict[str, Any], count: int, reward: float) -> None:
    verdict = build_judge({"fn": "length", **spec})(Response("x", count), prompt("", gold=40))
    assert (verdict.reward, verdict.correct) == (pytest.approx(reward), reward == 0)
    assert math.copysign(1.0, verdict.reward) == (1.0 if reward == 0 else -1.0), "0, not -0"
    assert verdict.detail == f"{count} tokens"


def test_a_length_may_be_in_words_or_characters_and_its_column_must_be_there() -> None:
    measure = lambda unit: build_judge({"fn": "length", "unit": unit, "target": 4})(
        Response("ab cd", 9), prompt("")
    )
    assert [measure(unit).reward for unit in ("words", "characters", "tokens")] == [-0.5, -0.25, -1.0]
    lost = build_judge({"fn": "length", "target": "gold"})(Response("x", 1), prompt(""))
    assert lost.status is Status.DATA_FAILED and "length.target=gold: None" in lost.detail
    for value in (0, "x", None, -5, float("nan")):
        assert build_judge({"fn": "length", "target": "n"})(Response("x", 1), prompt("", n=value)).status is (
            Status.DATA_FAILED
        )


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({}, "target=N or maximum=N"),
        ({"target": 5, "maximum": 6}, "target=N or maximum=N"),
        ({"target": 0}, "target=0"),
        ({"maximum": 5, "buffer": 6}, "buffer=6 .*maximum=5"),
        ({"maximum": 5, "buffer": -1}, "buffer=-1"),
        ({"maximum": 5, "unit": "bytes"}, r"`length\.unit` .*tokens, words, characters"),
    ],
)
def test_a_length_that_says_nothing_is_refused(spec: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=rf"^reward\.judge: .*{says}"):
        build_judge({"fn": "length", **spec})


def test_a_response_keeps_its_tokens_on_its_way_to_a_judge_process() -> None:
    copy = pickle.loads(pickle.dumps(Response("ab", 7)))
    assert (copy, copy.tokens, type(copy.upper())) == ("ab", 7, str)


# Several judges at once.

SUM = {
    "parts": {"answer": {"fn": "text"}, "form": {"fn": "format", "pattern": "x", "weight": 0.5}},
    "correct": "answer",
}


def test_a_reward_is_the_weighted_sum_and_correct_is_the_named_parts() -> None:
    found = {
        "answer": graded(True, "4"),
        "form": Verdict(-0.5, True, "other", {"tags": 2.0}, detail="no tag"),
    }
    verdict = sum_parts(SUM, found)
    assert (verdict.reward, verdict.correct, verdict.answer) == (0.75, True, "4")
    assert (
        verdict.parts == {"answer": 1.0, "form": -0.5, "form.tags": 2.0} and verdict.detail == "form: no tag"
    )
    other = sum_parts({**SUM, "correct": "form"}, found | {"form": Verdict(1.0, False)})
    assert (other.reward, other.correct, other.answer) == (1.5, False, None)
    assert sum_parts({"fn": "text"}, {"": graded(True, "4")}) == graded(True, "4")


@pytest.mark.parametrize("status", [Status.TIMEOUT, Status.DATA_FAILED, Status.INFRA_FAILED])
def test_a_part_that_fails_fails_the_whole_by_its_name(status: Status) -> None:
    verdict = sum_parts(SUM, {"answer": graded(True, "4"), "form": failed("it\nhung", status)})
    assert verdict.status is status and math.isnan(verdict.reward) and verdict.correct is False
    assert verdict.detail == "reward.parts.form: it hung"


def test_a_sum_that_is_not_finite_is_a_failure() -> None:
    huge = {**SUM, "parts": {name: {**spec, "weight": 1e308} for name, spec in SUM["parts"].items()}}
    verdict = sum_parts(huge, {"answer": Verdict(1.0, True), "form": Verdict(1.0, True)})
    assert verdict.status is Status.DATA_FAILED


def parted(*told: str, parts: str = "answer: {fn: text}, form: {fn: format, pattern: x, weight: 0.2}") -> Any:
    return configured("reward.judge={}", f"reward.parts={{{parts}}}", *told)


def test_parts_are_what_a_verifier_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = parted(
        "reward.correct=mine", parts="mine: {path: my.py:score, weight: -2}, form: {fn: format, pattern: x}"
    )
    judge = dataset.judge_spec(config)["judges"][""]
    assert judge["correct"] == "mine" and json.loads(json.dumps(judge)) == judge
    assert judge_parts(judge)["mine"] == {
        "fn": "custom",
        "path": f"{tmp_path}/my.py:score",
        "setting": "reward.parts.mine.path",
    }
    assert describe_judge(judge) == f"-2 x mine ({tmp_path}/my.py:score) + 1 x form (format), right by mine"
    said = train._dry(config, build_parts(config))
    assert ", judged by -2 x mine (" in said and "right by mine" in said
    (only,) = dataset.judge_spec(parted(parts="a: {fn: text}"))["judges"].values()
    assert only["correct"] == "a", "the only one"


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ([], r"reward\.parts has answer, form.*reward\.correct=answer"),
        (["reward.correct=style"], r"reward\.correct=style .*answer, form"),
        (["reward.correct=form", "reward.path=a.py:f"], r"reward\.path=a\.py:f.*reward\.path=null"),
        (
            ["reward.correct=form", "reward.judge={fn: text}"],
            r"reward\.judge=\{fn: text.*reward\.judge=null",
        ),
        (["reward.correct=form", "reward.parts.form.weight=nan"], r"reward\.parts\.form\.weight=nan"),
        (["reward.correct=form", "reward.parts.form.weight=much"], r"reward\.parts\.form\.weight='much'"),
        (["reward.correct=form", "reward.parts.form.weight=true"], r"reward\.parts\.form\.weight=True"),
        (
            ["reward.correct=form", "reward.parts.form.patern=y"],
            r"^reward\.parts\.form: .*`patern`.*`pattern`",
        ),
        (
            ["reward.correct=form", "reward.parts.form.fn=formt"],
            r"^reward\.parts\.form has no `formt`: .*`format`",
        ),
        (
            ["reward.correct=form", "reward.parts.form=5"],
            r"reward\.parts\.form=5: .*'reward\.parts\.form=\{fn: \.\.\.\}'",
        ),
        (["reward.correct=form", "+reward.parts.a:b={fn: text}"], "a:b"),
        (["reward.correct=form", "reward.parts.form.wieght=2"], "did you mean `weight`"),
        (["reward.correct=form", "reward.parts.own={path: a.py:f, wieght: 2}"], "did you mean `weight`"),
    ],
)
def test_parts_that_make_no_reward_are_refused(told: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parted(*told)


def test_parts_beside_the_judge_of_a_row_of_data_are_refused_with_what_to_say(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"reward\.parts and reward\.judge=\{fn: gym.*reward\.judge=null"):
        compose.load_config(["data=chain_sum", "reward.parts={a: {fn: text}}"])
    for none in ("null", "{}"):
        told = ["data=chain_sum", f"reward.judge={none}", "reward.parts={a: {fn: text}}"]
        config, _ = compose.load_config(told)
        assert not config.reward.judge and config.reward.parts == {"a": {"fn": "text"}}
    (tmp_path / "experiment").mkdir()
    mine = "# @package _global_\nreward: {judge: null, parts: {a: {fn: text}}}\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(mine)
    config, _ = compose.load_config(
        ["experiment=mine", "reward.parts.a.weight=2", "reward.parts.b={fn: math}", "reward.correct=a"],
        str(tmp_path),
    )
    assert (
        config.reward.parts == {"a": {"fn": "text", "weight": 2}, "b": {"fn": "math"}}
        and not config.reward.judge
    )
    with pytest.raises(ConfigError, match=r"reward\.parts=\[.*'reward\.parts=\{NAME: \{fn: \.\.\.\}\}'"):
        compose.load_config(["reward.judge=null", "reward.parts=[{fn: text}]"])
    with pytest.raises(ConfigError, match=r"^reward\.correct=a .*reward\.parts"):
        compose.load_config(["reward.correct=a"])
    with pytest.raises(ConfigError, match="every weight is 0"):
        parted(parts="a: {fn: text, weight: 0}")


def test_a_judge_of_a_part_of_the_mixture_goes_before_parts() -> None:
    told = ["data=mixture", "reward.parts={a: {fn: text}}"]
    with pytest.raises(ConfigError, match=r"'data\.parts\.chain_sum\.judge=\{\}'"):
        compose.load_config(told)
    config, _ = compose.load_config([*told, "data.parts.chain_sum.judge={}"])
    judges = dataset.judge_spec(config)["judges"]
    assert judges["countdown"]["fn"] == "gym" and judge_parts(judges["chain_sum"]) == {"a": {"fn": "text"}}


def test_a_file_of_a_part_is_taken_along_hashed_and_compared_as_one_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    Path("my.py").write_text("import beside\ndef score(r, p): return 1.0")
    Path("beside.py").write_text("")
    config = parted(parts="mine: {path: my.py:score}")
    assert user_files(config) == {"reward.parts.mine.path": "my.py:score"}
    Path("job").mkdir()
    command = pack(tmp_path / "job", replace(config, run=replace(config.run, dir="/runs/x")), [], None)
    (word,) = (word for word in command if word.startswith("reward.parts.mine.path="))
    packed = Path("job", word.partition("=")[2].strip('"').partition(":")[0])
    assert packed.is_file() and (packed.parent / "beside.py").is_file()
    again, _ = compose.load_config(["reward.judge={}", "reward.parts={mine: {path: my.py:score}}", word])
    assert again.reward.parts["mine"]["path"] == word.partition("=")[2].strip('"')
    first = warm_start.cached_folder(config)
    Path("my.py").write_text("def score(r, p): return 0.0")
    assert warm_start.cached_folder(config) != first != warm_start.cached_folder(configured())
    assert _alike("reward.parts.mine.path", "my.py:score", "./my.py:score")


def test_where_a_server_is_may_change_when_a_run_goes_on_and_what_it_judges_may_not() -> None:
    for path in ("reward.parts.style.base_url", "reward.judge.url", "data.parts.a.judge.key_env"):
        assert resume_rule(path)[0] == "free"
    for path in (
        "reward.parts.style.model",
        "reward.parts.style.weight",
        "reward.correct",
        "data.settings.url",
    ):
        assert resume_rule(path)[0] == "fixed"


def test_a_part_of_a_reward_may_be_a_signal() -> None:
    rule = "knob: learner.lr, fn: band, at_least: 0, at_most: 1, step: 0.1, low: 0, high: 1"
    parted("reward.correct=form", f"+control.c={{signal: reward/part_form, {rule}}}")
    with pytest.raises(ConfigError, match=r"reward/part_style`: .*reward\.parts\.style"):
        parted("reward.correct=form", f"+control.c={{signal: reward/part_style, {rule}}}")


def test_line_breaks_of_a_rubric_are_read_as_those_of_a_template() -> None:
    llm = r'{fn: llm, base_url: "http://h/v1", model: m, rubric: "A:\n{response}"}'
    assert compose.load_config([f"reward.judge={llm}"])[0].reward.judge["rubric"] == "A:\n{response}"
    assert parted(parts=f"a: {llm}").reward.parts["a"]["rubric"] == "A:\n{response}"
