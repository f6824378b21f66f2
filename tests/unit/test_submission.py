"""What `entroray submit` asks of a head, with stand-ins for Ray's client; the real one is in tests/ray."""

import sys
import threading
import time
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from entroray.cli import submit
from entroray.cli.submit import _accepted, _hint, pack
from entroray.config import USER_FILES, Config
from entroray.errors import PreflightError
from entroray.reward.user_file import _module
from tests.composed import configured

YOUNG = "Request failed with status code 500: No available agent to submit job, please try again later."


def test_a_head_without_its_agent_yet_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([RuntimeError(YOUNG), RuntimeError(YOUNG), "job-1"])
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)

    def give() -> str:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert _accepted(give) == "job-1" and len(waits) == 2


@pytest.mark.parametrize("said", [YOUNG, "Request failed with status code 400: no such folder"])
def test_it_is_not_asked_for_ever_and_only_where_ray_says_so(said: str) -> None:
    asked: list[str] = []

    def give() -> str:
        asked.append(said)
        raise RuntimeError(said)

    with pytest.raises(RuntimeError, match="Request failed"):
        _accepted(give, within=0.0)
    assert len(asked) == 1
    assert ("--dashboard-agent-listen-port" in _hint(said)) == (said == YOUNG)


def packed(folder: Path, config: Config) -> dict[str, str]:
    """The settings that the command of a job adds."""
    command = pack(folder, config, [], None)
    pairs = (word.split("=", 1) for word in command if "=" in word)
    return {name: value.strip("\"'") for name, value in pairs}


def test_every_setting_that_names_a_file_is_packed_with_what_lies_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, job = tmp_path / "home", tmp_path / "job"
    for name, text in {
        "judge.py": "import helpers\nfrom lexicon import words\n",
        "helpers.py": "",
        "lexicon/__init__.py": "words = 1",
        "lexicon/words.txt": "a",
        "notes.txt": "",
        "runs/large.bin": "",
        "mine/__init__.py": "",
        "mine/tools.py": "from . import inner",
        "mine/inner/__init__.py": "",
        "my_lab/__init__.py": "",
        "rows.jsonl": "{}",
        "chat.jinja": "{{ messages }}",
    }.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(text)
    monkeypatch.chdir(home)
    monkeypatch.setattr(sys, "path", [str(home), *sys.path])
    told = ("reward.path=judge.py:score", "rollout.tool.path=mine/tools.py:answer", "packages=[my_lab]")
    template = "model.template=chat.jinja"
    config = configured("data=table", "data.task=rows.jsonl", "run.dir=/runs/x", template, *told)
    job.mkdir()
    settings = packed(job, config)
    files = {name: job / settings[name].partition(":")[0] for name in USER_FILES}
    assert all(file.is_file() for file in files.values()), "a setting that names a file is not packed"
    assert settings["reward.path"].endswith(":score") and settings["rollout.tool.path"].endswith(":answer")
    judge, tool, chat = (files[name] for name in ("reward.path", "rollout.tool.path", "model.template"))
    assert [p.name for p in chat.parent.iterdir()] == ["chat.jinja"]
    assert {p.name for p in judge.parent.iterdir()} == {"judge.py", "helpers.py", "lexicon", "mine", "my_lab"}
    assert (judge.parent / "lexicon" / "words.txt").is_file() and (
        tool.parent / "inner" / "__init__.py"
    ).is_file()
    assert (job / "my_lab" / "__init__.py").is_file() and (job / settings["data.task"]).read_text() == "{}"
    assert _module(tool, "rollout.tool.path").inner


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ("reward.path=nowhere.py:score", r"^reward\.path=nowhere\.py:score: .*nowhere\.py"),
        ("rollout.tool.path=nowhere.py:answer", r"^rollout\.tool\.path=nowhere\.py:answer: .*nowhere\.py"),
        ("data.task=tests/unit", r"^data\.task=tests/unit .*absolute"),
        ("data.task=rows-*.jsonl", r"^data\.task=rows-\*\.jsonl .*absolute"),
        ("packages=[no_such_lab]", r"^packages=\[no_such_lab\]: .*PYTHONPATH"),
    ],
)
def test_what_is_not_there_is_refused_before_anything_is_sent(tmp_path: Path, told: str, says: str) -> None:
    with pytest.raises(PreflightError, match=says):
        packed(tmp_path, configured("data=table", "run.dir=/runs/x", told))


def test_what_the_nodes_have_is_left_there(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}")
    (tmp_path / "job").mkdir()
    config = configured(
        "data=table", f"data.task={tmp_path}/rows.jsonl", "run.dir=/runs/x", "packages=[numpy]"
    )
    settings = packed(tmp_path / "job", config)
    assert "data.task" not in settings and not (tmp_path / "job" / "numpy").exists()


def test_a_template_lies_where_it_is_looked_for_and_a_task_is_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("lab/__init__.py", "lab/prompts/my.jinja", "chain_sum"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("x")
    Path("job").mkdir()
    settings = packed(tmp_path / "job", configured("model.template=lab/prompts/my.jinja"))
    assert (tmp_path / "job" / settings["model.template"]).is_file() and "data.task" not in settings
    with pytest.raises(PreflightError, match=r"^model\.path=lab .*absolute"):
        packed(tmp_path, configured("model.path=lab", "learner.lr=1e-6"))


@pytest.mark.parametrize(
    ("status", "mode", "refused"), [(200, "token", True), (401, "token", False), (200, "disabled", False)]
)
def test_a_job_server_that_takes_jobs_of_anybody_is_refused(
    monkeypatch: pytest.MonkeyPatch, status: int, mode: str, refused: bool
) -> None:
    class Server(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append((self.path, self.headers.get("Authorization")))
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    asked: list[tuple[str, str | None]] = []
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a" * 64)
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        place = f"http://127.0.0.1:{server.server_port}"
        submit._refuse_open(place)  # on loopback nobody else is
        assert not asked
        monkeypatch.setattr(submit, "is_loopback", lambda host: False)
        with pytest.raises(PreflightError, match="RAY_AUTH_MODE=token") if refused else nullcontext():
            submit._refuse_open(place)
        server.shutdown()
    assert asked == ([("/api/jobs/", None)] if mode == "token" else [])
