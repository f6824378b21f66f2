"""A real browser on report.html: Debian's chromium, driven by playwright; nothing is loaded by a page."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTHS, SCHEMES = (390, 1280), ("light", "dark")
Open = Callable[..., Any]
SETTINGS = "#settings h2"
"""The last that report.html draws."""


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium without a window; NOT TESTED without it or without the extra `pages`."""
    api = pytest.importorskip("playwright.sync_api", reason="NOT TESTED: the extra `pages` is not installed")
    if CHROMIUM is None:
        pytest.skip("NOT TESTED: there is no chromium (apt-get install -y chromium)")
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def show(browser: Any) -> Iterator[Open]:
    """Opens a page of a folder; no script may fail, and nothing but the file be asked for."""
    told: list[str] = []
    contexts = []

    def show(
        folder: Path,
        scheme: str = "light",
        width: int = 1280,
        name: str = "report.html",
        ready: str = SETTINGS,
    ) -> Any:
        size = {"width": width, "height": 900}
        context = browser.new_context(viewport=size, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("console", lambda m: told.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: told.append(str(error)))
        page.on("dialog", lambda dialog: told.append(dialog.message))
        url = (folder / name).as_uri()
        asked = lambda request: None if request.url.split("#")[0] == url else told.append(request.url)
        page.on("request", asked)
        page.goto(url)
        page.wait_for_selector(ready)
        return page

    yield show
    for context in contexts:
        context.close()
    assert not told
