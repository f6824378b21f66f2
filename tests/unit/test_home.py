"""Where caches go for a uid that has no home folder, and the tiny model that is made there."""

import asyncio
import os
import pwd
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest

from entroray import cli, home
from entroray.config import Config
from entroray.errors import PreflightError
from entroray.home import LONGEST, ensure_home, home_folder, shorten_temporary
from entroray.wiring import preflight, warm_start
from tests.composed import configured


@pytest.fixture
def stranger(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A uid without an entry in passwd, without HOME and USER; the folder of temporary files."""

    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(home, "LONGEST", 1000)  # no link is left in /tmp
    with patch.dict(os.environ):
        for name in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME", "ENTRORAY_CACHE"):
            os.environ.pop(name, None)
        yield tmp_path


def test_a_uid_without_a_home_keeps_its_caches_in_a_temporary_folder(stranger: Path) -> None:
    assert stranger in home_folder().parents and not home_folder().exists()
    assert home_folder() in warm_start.cached_folder(Config()).parents


def test_every_command_has_a_home_and_a_user(stranger: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["train", "experiment=quickstart", "run.dry=true"]) == 0
    assert os.environ["HOME"] == str(home_folder()) and home_folder().stat().st_mode & 0o777 == 0o700
    assert os.environ["USER"] == f"uid-{os.getuid()}" and os.environ["HOME"] in capsys.readouterr().err
    assert Path("~").expanduser() == home_folder()
    ensure_home()
    assert not capsys.readouterr().err, "it is said once"


@pytest.mark.parametrize("home", ["/nonexistent", "/proc"])
def test_a_home_that_nothing_can_be_kept_in_is_none(
    stranger: Path, monkeypatch: pytest.MonkeyPatch, home: str
) -> None:
    os.environ["HOME"] = home
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert stranger in home_folder().parents


def test_a_home_that_exists_stays(stranger: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.environ |= {"HOME": str(stranger), "USER": "somebody"}
    ensure_home()
    assert home_folder() == stranger and (os.environ["HOME"], os.environ["USER"]) == (
        str(stranger),
        "somebody",
    )
    (stranger / ".cache").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert home_folder() == stranger, "read-only, but with a cache of its own"


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PreflightError, match=r"model\.warm_start\.cache .*ENTRORAY_CACHE"):
        asyncio.run(warm_start.make_model(Config(), tmp_path / "file" / "models" / "x"))


def test_two_processes_make_one_model_and_the_second_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, made = tmp_path / "model", list[str]()

    async def make(config: Config, folder: Path) -> None:
        made.append("begun")
        await asyncio.sleep(0.2)
        folder.mkdir()

    async def both() -> None:
        await asyncio.gather(*(warm_start.make_model(Config(), folder) for _ in range(2)))

    monkeypatch.setattr(warm_start, "_make", make)
    asyncio.run(both())
    waits, has = capsys.readouterr().out.splitlines()
    assert made == ["begun"] and f"another process is making {folder}" in waits and has.endswith(str(folder))


def test_what_another_user_has_locked_is_waited_for_though_it_cannot_be_written(tmp_path: Path) -> None:
    lock = tmp_path / ".model.lock"
    lock.touch(0o444)
    (tmp_path / "model").mkdir()
    asyncio.run(warm_start.make_model(Config(), tmp_path / "model"))
    lock.unlink()
    lock.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PreflightError, match=r"model\.warm_start\.cache"):
        asyncio.run(warm_start.make_model(Config(), tmp_path / "model"))


def test_a_folder_for_temporary_files_with_a_long_path_gets_a_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    long = tmp_path / ("long" * 20)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    monkeypatch.setenv("TMPDIR", str(long))
    shorten_temporary()
    link = Path(os.environ["TMPDIR"])
    try:
        assert link.resolve() == long and tempfile.gettempdir() == str(link) and len(str(link)) <= LONGEST
        assert str(link) in capsys.readouterr().err
        shorten_temporary()
        assert os.environ["TMPDIR"] == str(link) and not capsys.readouterr().err, "once"
        link.unlink()
        link.symlink_to("/etc")
        monkeypatch.setattr(tempfile, "tempdir", str(long))
        with pytest.raises(PreflightError, match="TMPDIR to a shorter path"):
            shorten_temporary()
    finally:
        link.unlink()


def test_a_folder_called_as_the_built_in_model_is_no_guess(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    told = configured("model.warm_start.cache=/nowhere")
    preflight.model(told)
    (tmp_path / "tiny").mkdir()
    preflight.model(told)
    (tmp_path / "tiny" / "config.json").write_text("{}")
    with pytest.raises(PreflightError, match=r"model\.path=\./tiny"):
        preflight.model(told)
