"""Flags of every command: what is taken, what is refused, and that what is refused starts nothing."""

import asyncio
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from entroray import cli, rows
from entroray.cli import doctor, flags, lab, objectives, submit, train, verify_resume
from entroray.cli import warm_start as command
from entroray.cli.flags import Flag
from entroray.config import Config
from entroray.errors import ConfigError, InfrastructureError, PreflightError
from entroray.wiring import compose, warm_start
from entroray.wiring.parts import build_parts
from entroray.wiring.reused_actors import ReusedActors

ALLOWED = (Flag("cfg", "job", short="-c"), Flag("dir", "FOLDER"), Flag("many", short="-m"))


@pytest.mark.parametrize(
    ("told", "found", "others"),
    [
        ("a=1 --dir=x b=-2", {"dir": "x"}, ["a=1", "b=-2"]),
        ("--dir x ~a +b=3", {"dir": "x"}, ["~a", "+b=3"]),
        ("--dir=-x --dir=a=b", {"dir": "a=b"}, []),
        ("-c job -m seed=1,2", {"cfg": "job", "many": ""}, ["seed=1,2"]),
        ("--many --cfg=job", {"cfg": "job", "many": ""}, []),
    ],
)
def test_flags_are_told_from_settings(told: str, found: dict[str, str], others: list[str]) -> None:
    assert flags.parse_flags("it", told.split(), ALLOWED) == (found, others)


@pytest.mark.parametrize(
    "told", ["--di=x", "--dir", "--dir=", "--cfg all", "-c=all", "--many=2", "-x", "--", "-d"]
)
def test_another_flag_or_value_is_refused_with_those_there_are(told: str) -> None:
    said = f"it does not take {told.replace('=', ' ').strip()}: it takes --cfg job, --dir FOLDER, --many, and"
    with pytest.raises(ConfigError) as refused:
        flags.parse_flags("it", ["a=1", *told.split()], ALLOWED)
    assert str(refused.value).startswith(said)


def blocks() -> dict[str, str]:
    """The lines of the usage about each command."""
    found, name = dict[str, str](), ""
    for line in cli.USAGE.splitlines()[2:]:
        if line.startswith("  ") and line[2:3].isalpha():
            name = line.split()[0]
        found[name] = found.get(name, "") + line
    return found


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_the_usage_lists_every_flag_of_a_command(command: str) -> None:
    told = blocks()[command]
    for flag in getattr(import_module(cli.COMMANDS[command]), "FLAGS", ()):
        assert str(flag) in told


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (verify_resume, ["--dry"]),
        (verify_resume, ["--dry=yes"]),
        (submit, ["--dir=x"]),
        (submit, ["--config-dri", "mine"]),
        (command, ["--multirun"]),
        (doctor, ["--all"]),
        (lab, ["-x"]),
        (objectives, ["show", "--cfg", "job"]),
    ],
)
def test_a_flag_of_no_command_starts_nothing(command: Any, told: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"does not take --?[a-z]"):
        command.main([*told, "experiment=quickstart"])


@pytest.mark.parametrize("steps", ["x", "0", "-1", "1.5"])
def test_steps_that_are_no_number_are_refused(steps: str) -> None:
    with pytest.raises(ConfigError, match=rf"verify-resume --steps={steps} must be a whole number"):
        verify_resume.main([f"--steps={steps}", "experiment=quickstart"])


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A folder of settings with one experiment."""
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\nrun: {name: mine, steps: 7}\nobserve: {report: false}\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(text)
    return tmp_path


@pytest.mark.parametrize("joined", [True, False])
def test_every_command_with_settings_reads_a_folder_of_ones_own(
    mine: Path, joined: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    told = [f"--config-dir={mine}"] if joined else ["--config-dir", str(mine)]
    told += ["experiment=mine", f"model.warm_start.cache={tmp_path}"]
    seen: list[Config] = []

    async def make(config: Config, folder: Path) -> None:
        seen.append(config)

    def pack(folder: Path, config: Config, overrides: list[str], config_dir: str) -> list[str]:
        assert overrides == told[-2:] and config_dir == str(mine)
        seen.append(config)
        raise PreflightError("no cluster here")

    monkeypatch.setattr(warm_start, "make_model", make)
    monkeypatch.setattr(submit, "pack", pack)
    monkeypatch.setattr(doctor.preflight, "run_checks", lambda config, checks: seen.append(config) or [])
    assert command.main(told) == doctor.main(told) == objectives.main(["show", *told]) == 0
    with pytest.raises(PreflightError):
        submit.main(told)
    assert [config.run.steps for config in seen] == [7, 7, 7]


def test_a_folder_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="--config-dir=experiment=mine is no folder"):
        submit.main(["--config-dir", "experiment=mine"])


def test_the_warm_start_of_a_run_reads_the_same_folder(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`train` and the lab start `entroray warm-start`: its arguments compose to the run's own settings."""
    started: list[list[str]] = []

    def run(command: list[str], **_: object) -> SimpleNamespace:
        started.append(command)
        return SimpleNamespace(returncode=9)

    monkeypatch.setattr("subprocess.run", run)
    monkeypatch.setattr(train.preflight, "refuse_wrong", lambda config: None)
    overrides = ["experiment=mine", f"model.warm_start.cache={mine}"]
    with pytest.raises(SystemExit):
        train.main([*overrides, "--config-dir", str(mine)])
    config, _ = compose.load_config(overrides, str(mine))
    benches: list[ReusedActors] = []
    monkeypatch.setattr(lab, "_run", lambda folder, jobs, tell, bench: benches.append(bench))
    lab.main([*overrides, f"--config-dir={mine}", f"--dir={mine}/lab"])
    with pytest.raises(InfrastructureError, match="exit code 9"):
        asyncio.run(benches[0].ready(config, overrides, build_parts(config)))
    expected = [sys.executable, "-m", "entroray", "warm-start", *overrides, f"--config-dir={mine}"]
    assert started == [expected, expected]
    found: list[Path] = []
    monkeypatch.setattr(warm_start, "make_model", lambda config, folder: found.append(folder))
    monkeypatch.setattr("asyncio.run", lambda made: None)
    assert command.main(expected[4:]) == 0 and found == [warm_start.cached_folder(config)]


def test_an_installation_without_conf_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "PACKAGE", tmp_path / "entroray")
    rows.conf_folder.cache_clear()
    with pytest.raises(
        PreflightError, match=r"no conf/ .*entroray: reinstall entroray, or run it from a check"
    ):
        compose.load_config([])
    rows.conf_folder.cache_clear()


def test_verify_resume_deletes_nothing_but_its_own_two_runs(tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "thesis.tex").write_text("years")
    with pytest.raises(ConfigError, match=r"holds thesis\.tex: give an empty folder"):
        verify_resume.main([f"--dir={tmp_path}", "experiment=quickstart"])
    assert (tmp_path / "thesis.tex").exists() and (tmp_path / "whole").exists()


def test_help_is_about_the_command_and_a_misspelt_one_is_told_what_was_meant(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.run(["watch", "--help"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("usage: entroray watch") and "[--port N]" in said and "doctor" not in said
    assert cli.run(["help", "train"]) == 0
    said = capsys.readouterr().out
    assert "--cfg job, -c job" in said and "--multirun, -m" in said
    assert cli.run(["--help"]) == 0
    assert cli.USAGE in capsys.readouterr().out
    assert cli.run(["trian"]) == 2
    assert "did you mean `train`" in capsys.readouterr().err
    assert cli.run(["report", "runs/nothere"]) == 2
    assert "runs/nothere, which does not exist" in capsys.readouterr().err


def test_a_terminal_that_lacks_a_character_shows_another() -> None:
    told = {**os.environ, "PYTHONIOENCODING": "ascii"}
    words = [sys.executable, "-m", "entroray", "objectives"]
    done = subprocess.run(words, env=told, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 and "grpo" in done.stdout and "; ? per token" in done.stdout, done.stderr


def test_a_closed_output_is_no_error() -> None:
    command = f"{sys.executable} -m entroray objectives >&- 2>&-"
    assert subprocess.run(["bash", "-c", command], timeout=120, check=False).returncode == 0
