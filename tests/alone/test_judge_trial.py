"""A judge and a tool of the user's, tried by `doctor` and `train` before anything starts."""

import json
import re
from pathlib import Path

import pytest

from entroray.cli import doctor, judge_trial, train
from entroray.errors import ConfigError, DataError, PreflightError
from tests.composed import configured

SMALL = ("data.max_prompt=32", "++data.settings.size=50", "model.warm_start.cache=/nowhere")
"""Of a run whose first prompt is a sum; nothing is started but its judge."""


def test_the_doctor_looks_at_rows_and_judge() -> None:
    small = configured(*SMALL)
    said = doctor.judge(small)
    assert "training" in doctor.data(small) and "gym gives 1" in said
    assert "0 for an empty response" in said and "0 for 32 words" in said


TRIED = """
import time
def none(response, prompt): return None
def dictionary(response, prompt): return {"score": 1.0}
def raises(response, prompt): return float(response.split()[-1] == prompt.reference)
def hangs(response, prompt): time.sleep(60 if len(response) > 100 else 0); return 1.0
def prints(response, prompt): print("x" * 1000); return float(len(response))
def tool(call, prompt): return call.upper()[:4] or 1 / 0
def slow(call, prompt): time.sleep(60)
"""


@pytest.mark.parametrize(
    ("judge", "says"),
    [
        ("none", r"no verdict on .*returned None"),
        ("dictionary", r"no verdict on .*mine\.py:dictionary returned .*score"),
        ("raises", r"no verdict on '': .*IndexError.*mine\.py:5"),
        ("hangs", r"no verdict on 'word .*timeout.*reward\.deadline=1"),
    ],
)
def test_a_judge_that_fails_is_found_before_anything_starts(tmp_path: Path, judge: str, says: str) -> None:
    (tmp_path / "mine.py").write_text(TRIED)
    mine = configured(*SMALL, f"reward.path={tmp_path}/mine.py:{judge}", "reward.deadline=1.0")
    with pytest.raises(DataError, match=says):
        doctor.judge(mine)


def test_what_a_judge_and_a_tool_say_is_shown_and_what_they_print_counted(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(TRIED)
    mine = configured(
        *SMALL, f"reward.path={tmp_path}/mine.py:prints", f"rollout.tool.path={tmp_path}/mine.py:tool"
    )
    said = doctor.judge(mine)
    assert "mine.py:prints gives" in said and "0 for an empty response" in said and "160 for 32 words" in said
    assert "print 3003 characters" in said and "'xxxx" in said
    assert "mine.py:tool answers 'error' (ZeroDivisionError" in said and "'WORD' to a long one" in said
    slow = configured(*SMALL, f"rollout.tool.path={tmp_path}/mine.py:slow", "reward.deadline=0.5")
    with pytest.raises(DataError, match=r"rollout\.tool\.path.*timeout.*reward\.deadline=0\.5"):
        doctor.judge(slow)


def test_train_tries_a_judge_of_the_users_before_it_makes_a_model_or_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text(TRIED)
    monkeypatch.setenv("ENTRORAY_CACHE", str(tmp_path / "cache"))
    told = [
        "data.max_prompt=32",
        "++data.settings.size=50",
        f"run.dir={tmp_path}/run",
        "rollout.max_tokens=32",
    ]
    with pytest.raises(DataError, match=r"no verdict on .*score"):
        train.main([*told, f"reward.path={tmp_path}/mine.py:dictionary"])
    with pytest.raises(ConfigError, match=r"reward\.path: .*mine\.py .*no_such"):
        (tmp_path / "mine.py").write_text("import no_such")
        train.main([*told, f"reward.path={tmp_path}/mine.py:dictionary"])
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()


def test_a_file_that_is_never_loaded_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text("import time\ntime.sleep(600)\ndef judge(r, p): return 1.0")
    monkeypatch.setattr(judge_trial, "LOADING", 1.0)
    with pytest.raises(PreflightError, match=r"reward\.path=.*mine\.py:judge.*1 s"):
        doctor.judge(configured(*SMALL, f"reward.path={tmp_path}/mine.py:judge"))


@pytest.mark.parametrize(("unread", "wrong"), [(2, False), (15, True)])
def test_references_that_no_parser_reads_are_found_before_the_start(
    tmp_path: Path, unread: int, wrong: bool
) -> None:
    rows = [{"question": f"{n}?", "answer": "%" if n < unread else str(n)} for n in range(40)]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    mine = configured("data=table", f"data.task={tmp_path}/mine.jsonl", "data.heldout=0")
    if wrong:
        with pytest.raises(DataError, match=r"15 of the first 40 references.*'%'.*reward\.max_failed=0\.2"):
            doctor.judge(mine)
    else:
        assert "2 of the first 40 references cannot be judged" in doctor.judge(mine)


@pytest.mark.parametrize(
    "form", ["extract: boxed", "extract: after, marker: 'A:'", "extract: answer_tag", "extract: last_line"]
)
def test_a_reference_is_tried_in_the_form_that_its_judge_looks_for(tmp_path: Path, form: str) -> None:
    rows = [{"question": f"{n}?", "answer": str(n)} for n in range(40)]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    table = (
        "data=table",
        f"data.task={tmp_path}/mine.jsonl",
        "data.heldout=0",
        "data.max_prompt=64",
        "reward.deadline=60",
    )
    assert "math gives 1 for " in doctor.judge(configured(*table, f"reward.judge={{fn: math, {form}}}"))
    parts = f"reward.parts={{a: {{fn: math, {form}}}, b: {{fn: length, maximum: 99}}}}"
    assert " 1 (a 1, b 0) for " in doctor.judge(
        configured(*table, "reward.judge=null", parts, "reward.correct=a")
    )


def test_a_judge_without_a_verdict_is_named_by_its_setting(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(TRIED)
    (tmp_path / "mine.jsonl").write_text(json.dumps({"question": "1?", "answer": "1"}))
    none, table = (
        f"{{path: {tmp_path}/mine.py:none}}",
        ("data=table", f"data.task={tmp_path}/mine.jsonl", "data.heldout=0"),
    )
    for words, place in (
        ([*SMALL, f'reward.judge={{path: "{tmp_path}/mine.py:none"}}'], "reward.judge"),
        (
            [*table, f"evaluate.sets.m={{task: {tmp_path}/mine.jsonl, judge: {none}}}"],
            "evaluate.sets.m.judge",
        ),
        ([*table, "reward.judge=null", f"reward.parts={{a: {none}}}"], "reward.parts"),
    ):
        with pytest.raises(DataError, match=f"; {re.escape(place)} must judge every response"):
            doctor.judge(configured(*words, "data.max_prompt=64", "reward.deadline=60"))


def test_what_is_wrong_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert doctor.main([*SMALL, f"evaluate.sets.m={{task: {tmp_path}/none.jsonl}}"]) == 3
    said = capsys.readouterr().out
    assert said.count("there is no file") == 1 and said.count("not asked: `data` says why") == 2
