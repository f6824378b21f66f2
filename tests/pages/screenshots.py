"""README's two screenshots of a run: `python -m tests.pages.screenshots RUN [FOLDER]`, each below 200 KB.

`response.png` is the token view of the last recorded step, `curves.png` the verdict and the first curves.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

from entroray.observe.report import write_report
from tests.pages.conftest import CHROMIUM

MOST = 200_000
SIZE = {"width": 1280, "height": 780}


def draw(browser: Any, run: Path, folder: Path) -> list[Path]:
    """Both files in `folder`; of a copy of the page, so that the run is only read."""
    with tempfile.TemporaryDirectory() as copy:
        place = Path(copy) / run.resolve().name
        place.mkdir()
        for each in run.resolve().iterdir():
            if each.name != "report.html":
                (place / each.name).symlink_to(each)
        page = browser.new_page(viewport=SIZE, color_scheme="light")
        page.goto(write_report(place).as_uri())
        page.wait_for_selector("#settings h2")
        made = [_saved(page, folder / "curves.png", "#curves .cards", above=64)]
        page.locator("#tokens").scroll_into_view_if_needed()
        page.wait_for_selector(".rollout .t")
        page.locator(".rollout .t").first.focus()
        page.keyboard.press("u")  # the token that the policy was least sure of
        made.append(_saved(page, folder / "response.png", ".sure", above=8))
        page.close()
    return made


def _saved(page: Any, file: Path, top: str, above: int = 0) -> Path:
    """What is on the screen with `top` at its upper end; SystemExit if that is too large a file."""
    page.evaluate(
        f"scrollTo(0, document.querySelector('{top}').getBoundingClientRect().top + scrollY - {above})"
    )
    page.screenshot(path=file)
    if (size := file.stat().st_size) >= MOST:
        raise SystemExit(f"{file} has {size} bytes, {MOST} are allowed: lower SIZE")
    return file


if __name__ == "__main__":
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for made in draw(chromium, Path(sys.argv[1]), Path(*(sys.argv[2:] or ["docs"]))):
            print(f"{made} {made.stat().st_size // 1000} kB")
