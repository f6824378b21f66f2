"""The command that makes README's screenshots."""

from pathlib import Path
from typing import Any

import pytest

from tests.pages.folders import SMALL, write_run


@pytest.mark.slow
def test_two_screenshots_are_made_of_a_run_that_is_only_read(
    tmp_path: Path, browser: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.pages import screenshots  # needs the extra `pages`, as the fixture has found out

    run = write_run(tmp_path / "run", SMALL, steps=4, recorded=[1])
    before = {file: file.stat().st_mtime_ns for file in run.rglob("*")}
    made = screenshots.draw(browser, run, tmp_path)
    assert [file.name for file in made] == ["curves.png", "response.png"]
    assert all(
        file.read_bytes()[:4] == b"\x89PNG" and 20_000 < file.stat().st_size < 200_000 for file in made
    )
    assert {file: file.stat().st_mtime_ns for file in run.rglob("*")} == before
    monkeypatch.setattr(screenshots, "MOST", 20_000)
    with pytest.raises(SystemExit, match=r"curves\.png has \d+ bytes, 20000 are allowed"):
        screenshots.draw(browser, run, tmp_path)
