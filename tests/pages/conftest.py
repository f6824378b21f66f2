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
Browse = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium without a window; NOT TESTED without it or without the extra `pages`.

    Playwright's event loop runs until it is closed, and nothing else of the process can run one meanwhile.
    """
    api = pytest.importorskip("playwright.sync_api", reason="NOT TESTED: the extra `pages` is not installed")
    if CHROMIUM is None:
        pytest.skip("NOT TESTED: there is no chromium (apt-get install -y chromium)")
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def browse(browser: Any) -> Iterator[Browse]:
    """Opens an address; no script may fail, and nothing beside it be asked for, or `lost` to a server."""
    told: list[str] = []
    contexts = []

    def browse(
        url: str, scheme: str = "light", width: int = 1280, *, ready: str = SETTINGS, lost: bool = False
    ) -> Any:
        size = {"width": width, "height": 900}
        context = browser.new_context(viewport=size, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        wrong = lambda m: m.type in ("error", "warning") and not (lost and "Failed to load" in m.text)
        page.on("console", lambda m: told.append(m.text) if wrong(m) else None)
        page.on("pageerror", lambda error: told.append(str(error)))
        page.on("dialog", lambda dialog: told.append(dialog.message))
        place = url.partition("?")[0].partition("#")[0]
        asked = lambda request: None if request.url.startswith(place) else told.append(request.url)
        page.on("request", asked)
        page.goto(url)
        page.wait_for_selector(ready)
        return page

    yield browse
    for context in contexts:
        context.close()
    assert not told


@pytest.fixture
def show(browse: Browse) -> Open:
    """Opens a page of a folder, report.html if no other is named."""

    def opened(
        folder: Path, *look: Any, name: str = "report.html", ready: str = SETTINGS, fragment: str = ""
    ) -> Any:
        return browse((folder / name).as_uri() + fragment, *look, ready=ready)

    return opened
