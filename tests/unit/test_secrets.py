"""Secrets of the environment are in nothing that is shown or written, and in no setting."""

import io
import json
import sys
from pathlib import Path

import pytest

from entroray import cli
from entroray.errors import ConfigError, DataError
from entroray.observe.journal import Journal
from entroray.observe.run_summary import summarize
from entroray.redaction import HidingStream, hide_secrets, is_secret
from tests.composed import configured

KEY = "canary-7f3a/9+c2="


@pytest.fixture(autouse=True)
def shell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("DB_PASSWORD", "short")
    monkeypatch.setenv("PIN_KEY", "123456789")


@pytest.mark.parametrize(
    "name",
    [
        *("HF_TOKEN", "WANDB_API_KEY", "MY_SECRET", "PGPASSWORD", "MYSQL_PWD", "AWS_SECRET_ACCESS_KEY"),
        *("AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN", "github_token", "RAY_AUTH_TOKEN", "GOOGLE_CREDENTIALS"),
        *("API_KEY2", "MY_TOKEN1", "GH_PAT", "SLACK_WEBHOOK"),
    ],
)
def test_a_variable_is_secret_by_its_name(name: str) -> None:
    assert is_secret(name, "x")


@pytest.mark.parametrize(
    "name",
    [
        "PWD",
        "OLDPWD",
        "TOKENIZERS_PARALLELISM",
        "GIT_AUTHOR_NAME",
        "RAY_AUTH_MODE",
        "SSH_AUTH_SOCK",
        "KEY_DIR",
        "GLIBC_COMPAT",
    ],
)
def test_other_variables_are_not(name: str) -> None:
    assert not is_secret(name, "x") and is_secret(name, "https://me:word@host")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"401 for {KEY}", "401 for ***"),
        ("in a URL: canary-7f3a%2F9%2Bc2%3D.", "in a URL: ***."),
        ("https://me:p@ss@host:80/x y@z", "https://***@host:80/x y@z"),
        ("https://user:pa/ss@host/x", "https://***@host/x"),
        ("https://user:p@a/ss@host", "https://***@host"),
        ("http://host:4873/@scope/a:b", "http://host:4873/@scope/a:b"),
        ("https://ghp_0123456789abcdef@host/x", "https://***@host/x"),
        ("http://host/?n=1&api_key=abc&m=2", "http://host/?n=1&***&m=2"),
        ("http://host/judge?max_tokens=256&tokenizer=q", "http://host/judge?max_tokens=256&tokenizer=q"),
        ("ssh://git@host, a:b@c, 2:3", "ssh://git@host, a:b@c, 2:3"),
        ("short, 123456789 and 0.123456789", "short, 123456789 and 0.123456789"),
    ],
)
def test_secrets_are_stars(text: str, shown: str) -> None:
    assert hide_secrets(text) == shown


def test_an_error_that_has_a_key_in_its_words_is_written_and_told_without_it(tmp_path: Path) -> None:
    error = DataError(f'the server says "no" to {KEY}')
    with Journal(tmp_path, tokens_every=0) as journal:
        journal.event("failed", why=str(error), rows=[{"detail": error}])
    written = (tmp_path / "events.jsonl").read_text()
    assert KEY not in written and json.loads(written)["fields"]["why"] == 'the server says "no" to ***'
    assert summarize(error).reason == 'the server says "no" to ***'


def test_both_streams_of_the_command_hide_them(monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = (io.TextIOWrapper(io.BytesIO(), write_through=True) for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setattr(sys, "argv", ["entroray", KEY])
    monkeypatch.setattr(cli.threading.Timer, "start", lambda timer: None)
    with pytest.raises(SystemExit):
        cli.main()
    assert isinstance(sys.stdout, HidingStream)
    told = [stream.buffer.getvalue().decode() for stream in (out, err)]
    assert "unknown command `***`" in told[1] and KEY not in told[0]


@pytest.mark.parametrize(
    "override",
    [
        f"run.name={KEY.rstrip('=')}x",
        "run.name=mine",
        "observe.trackers=[{fn: mlflow, uri: 'https://me:word@host'}]",
        "reward.judge={fn: http, url: 'https://host/judge?token=abc'}",
        "data.settings={mirror: {urls: ['https://me:word@host']}}",
    ],
)
def test_a_setting_that_holds_one_is_refused_without_showing_it(
    monkeypatch: pytest.MonkeyPatch, override: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "canary-7f3a/9+c2")
    if override == "run.name=mine":
        assert configured(override).run.name == "mine"
        return
    with pytest.raises(ConfigError) as caught:
        configured(override)
    said = str(caught.value)
    assert said.startswith(override.partition("=")[0])
    assert not any(part in said for part in ("canary", "word@", "token=abc"))
