"""Code as an answer across processes: verdicts of a verifier, a slot that is stuck, the trial of a judge."""

import asyncio
import json
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from entroray.cli import doctor
from entroray.errors import ConfigError, DataError
from entroray.policy.tiny_model import build_tiny_model
from entroray.reward import isolation
from entroray.types import Prompt, Status, Verdict
from entroray.workers import verifier
from entroray.workers.verifier import Verifier
from tests.alone.test_verifier import rollout
from tests.composed import configured
from tests.ray.test_recipes import SIZE, lines

ROW = {"text": "Square x.", "code": "def f(x):\n    return x * x", "test_list": ["assert f(2) == 4"]}
PROMPT = Prompt("0" * 16, "?", (1,), "", ROW)
RIGHT = "```python\ndef f(x):\n    return x * x\n```"


def code(**settings: object) -> dict[str, object]:
    return {"judges": {"": {"fn": "code", "timeout": 2.0, **settings}}}


async def judged(
    reward: dict, texts: list[str], **limits: float
) -> tuple[list[Verdict], float, list[psutil.Process]]:
    """Verdicts, the seconds that they took together, and what was started for them."""
    asked = Verifier(reward, slots=2, **limits)
    try:
        await asked.warm_up()
        began = time.monotonic()
        verdicts = await asked.judge(PROMPT, [rollout(text) for text in texts])
        started = psutil.Process(asked._server.pid).children(recursive=True)
        return verdicts, time.monotonic() - began, started
    finally:
        asked.close()


def test_a_program_that_hangs_has_its_own_deadline_and_leaves_the_other_slot_to_others() -> None:
    texts = ["while True: pass", *[RIGHT, "def f(x): return 0"] * 8]
    verdicts, took, started = asyncio.run(judged(code(), texts, deadline=1.0))
    assert [v.reward for v in verdicts] == [0.0, *[1.0, 0.0] * 8]
    assert all(v.status is Status.OK for v in verdicts) and took < 60.0
    assert "took too long" in verdicts[0].detail
    assert len(started) >= 3 and psutil.wait_procs(started, 20)[1] == []


def test_parts_share_a_server_and_what_passes_half_of_its_tests_is_worth_a_part() -> None:
    row = {**ROW, "test_list": ["assert f(2) == 4", "assert f(3) == 9"]}
    parts = {"all": {"fn": "code"}, "share": {"fn": "code", "partial": True, "weight": 0.5}}
    reward = {"judges": {"": {"parts": parts, "correct": "all"}}}

    async def half() -> list[Verdict]:
        asked = Verifier(reward, slots=2)
        try:
            return await asked.judge(replace(PROMPT, entry=row), [rollout("def f(x): return 4")])
        finally:
            asked.close()

    (verdict,) = asyncio.run(half())
    assert (verdict.reward, verdict.correct) == (0.25, False)
    assert verdict.parts == {"all": 0.0, "all.tests": 0.5, "share": 0.5, "share.tests": 0.5}


def test_a_judge_process_killed_at_its_deadline_takes_its_program_along(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(verifier, "_SAYING", -28.0)
    reward = code(timeout=20.0, deadline=30.0)
    (verdict,), took, started = asyncio.run(judged(reward, ["import time\ntime.sleep(60)"]))
    assert verdict.status is Status.TIMEOUT and took < 60.0
    assert psutil.wait_procs(started, 20)[1] == []


def test_without_layers_a_verifier_does_not_start_unless_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fork server that refuses is another process: what it would do is asked of the judge's factory."""
    from entroray.reward import build_verification, judges, programs

    bare = programs.Programs(())
    monkeypatch.setattr(judges, "_programs", lambda: bare)
    try:
        with pytest.raises(ConfigError, match=r"verifier\.isolation=contained"):
            build_verification(**code())
        config = configured("data=code", "data.task=none.jsonl", "verifier.isolation=contained")
        from entroray.wiring.dataset import judge_spec

        asked = judge_spec(config)
        assert asked["judges"][""] == {"fn": "code", "isolation": "contained"}
        assert build_verification(**asked)(RIGHT, PROMPT).reward == 1.0
    finally:
        bare.close()
    with pytest.raises(ConfigError, match=r"verifier\.isolation.*auto or contained"):
        configured("verifier.isolation=none")


def settings(folder: Path, rows: list[dict]) -> list[str]:
    lines(folder / "tasks.jsonl", rows)
    build_tiny_model(folder / "model", SIZE | {"num_attention_heads": 2, "num_key_value_heads": 1}, seed=0)
    small = ["rollout.max_tokens=16", "learner.lr=1e-5", "data.max_prompt=1024"]
    return ["data=code", f"data.task={folder}/tasks.jsonl", f"model.path={folder}/model", *small]


def test_the_doctor_runs_the_reference_of_a_row_and_says_what_holds(tmp_path: Path) -> None:
    rows = [{**ROW, "text": f"Square x, the {n}th time."} for n in range(20)]
    config = configured(*settings(tmp_path, rows))
    said = doctor.judge(config)
    assert "code gives 1 (1 of 1 tests passed) for 'def f(x)" in said and "0 (no code) for an empty" in said
    assert "assert f(2) == 4\nWrite it in one block" in json.loads(json.dumps(doctor.prompt(config))).replace(
        "\\n", "\n"
    )
    assert "refused: a socket, a process, a file outside" in doctor.isolation(config)
    assert {*isolation.CALLS_TRIED, *isolation.FILES_TRIED} == {"a socket", "a process", "a file outside"}


def test_rows_whose_tests_cannot_be_read_are_refused_before_anything_starts(tmp_path: Path) -> None:
    rows = [{**ROW, "text": f"Task {n}.", "test_list": ["assert f("]} for n in range(20)]
    with pytest.raises(DataError, match="test_list cannot be read as tests"):
        doctor.judge(configured(*settings(tmp_path, rows)))
