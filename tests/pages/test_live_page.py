"""The page of `entroray watch` in a browser: it follows a folder and keeps what is looked at."""

import fcntl
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from entroray.observe import page_server
from entroray.observe.page_server import PageServer
from entroray.observe.token_records import record_path
from tests.pages.conftest import Browse
from tests.pages.folders import SMALL, metrics_line, write_run

playwright = pytest.importorskip(
    "playwright.sync_api", reason="NOT TESTED: the extra `pages` is not installed"
)
SOON = 60.0


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], PageServer]]:
    monkeypatch.setattr(page_server, "LOOK", 0.05)
    started: list[PageServer] = []

    def watch(folder: Path) -> PageServer:
        started.append(PageServer(folder))
        threading.Thread(target=started[-1].serve_forever, args=(0.05,), daemon=True).start()
        return started[-1]

    yield watch
    for server in started:
        server.shutdown()
        server.server_close()


def until(page: Any, holds: str) -> None:
    """Waits for a script of the page; its policy forbids playwright's own wait."""
    end = time.monotonic() + SOON

    def held() -> bool:
        try:
            return bool(page.evaluate(holds))
        except playwright.Error:  # between two pages: another name is another page
            return False

    while not held():
        assert time.monotonic() < end, f"{holds} never came true"
        page.wait_for_timeout(50)


def measure(folder: Path, *steps: int) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(metrics_line(step) for step in steps)


def record(folder: Path, step: int, recorded: Path) -> None:
    for kind in ("rollouts", "tokens"):
        file = record_path(folder, step, kind)
        shutil.copy(record_path(recorded, step, kind), file.with_suffix(".part"))
        file.with_suffix(".part").rename(file)


AT = "document.querySelector('#curves output').textContent === '{}'"


def test_a_run_is_followed_from_before_it_is_there_and_what_is_looked_at_stays(
    tmp_path: Path, watch: Callable[[Path], PageServer], browse: Browse
) -> None:
    folder, recorded = tmp_path / "run", write_run(tmp_path / "all", SMALL, recorded=[1, 3, 5])
    server = watch(folder)
    page = browse(server.address)
    assert page.url == server.address.partition("?")[0], "the token is no longer in the address"
    assert "There is no folder" in page.inner_text("#top") and "Live" in page.inner_text(".live")
    begun = tmp_path / "begun"
    begun.mkdir()
    with (begun / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        begun.rename(folder)
        until(page, "document.querySelector('#top').textContent.includes('The run is starting')")
        assert not page.locator("#top .missing").all_inner_texts(), "nothing is missing yet"
    write_run(folder, SMALL, steps=2, recorded=[1], ends=False)
    until(page, "document.querySelectorAll('.plot path.line').length > 10")
    until(page, "document.title === '<i>name</i>/run: dapo but for surrogate.high=0.3 · entroray'")
    until(page, AT.format(2))
    page.get_by_label("Search").fill("group")
    page.evaluate("document.querySelector('#tokens').scrollIntoView()")
    page.wait_for_selector(".rollout .t")
    page.get_by_label("Group", exact=True).select_option("1")
    page.locator(".rollout .t").nth(3).focus()
    chosen = page.inner_text(".detail")
    record(folder, 3, recorded)
    measure(folder, 3, 4)
    until(page, AT.format(4))
    until(page, "document.querySelector('#tokens select').textContent === '13'")
    assert page.inner_text(".detail") == chosen and page.input_value("[aria-label=Group]") == "1"
    assert page.evaluate("document.activeElement.dataset.i") is not None, "the focus is where it was"
    assert page.input_value("#settings [type=search]") == "group"
    page.locator("#curves svg.plot").first.focus()
    page.keyboard.press("Home")
    measure(folder, 5, 6)
    until(page, "document.querySelector('[aria-label=\"last step shown\"]').value === '6'")
    assert page.evaluate(AT.format(1)), "a marker that was moved stays"
    assert page.evaluate("document.activeElement.classList.contains('plot')")


def test_what_a_resumed_run_cuts_goes_from_the_page(
    tmp_path: Path, watch: Callable[[Path], PageServer], browse: Browse
) -> None:
    folder = write_run(tmp_path / "run", SMALL, steps=6, recorded=[1, 5])
    page = browse(watch(folder).address, lost=True)  # what is asked for may go meanwhile
    until(page, AT.format(6))
    assert "It finished." in page.inner_text("#top")
    page.evaluate("document.querySelector('#tokens').scrollIntoView()")
    page.wait_for_selector(".rollout .t")
    assert page.input_value("[aria-label=Step]") == "5"
    record_path(folder, 5).unlink()
    write_run(folder, SMALL, steps=2, recorded=[], ends=False)
    until(page, AT.format(2))
    until(page, "document.querySelector('#tokens select').value === '1'")
    until(page, "document.querySelector('.sure h3').textContent.includes('step 1 ')")
    until(page, "!document.querySelector('#top').textContent.includes('It finished.')")
    record_path(folder, 1).unlink()
    until(page, "document.querySelector('#tokens .missing') !== null")
    shutil.rmtree(folder)
    until(page, "document.querySelector('#top').textContent.includes('There is no folder')")


@pytest.mark.slow
def test_a_server_that_ends_is_said_and_a_hidden_page_asks_nothing(
    tmp_path: Path, watch: Callable[[Path], PageServer], browse: Browse
) -> None:
    server = watch(write_run(tmp_path / "run", SMALL, steps=3, recorded=[1]))
    page = browse(server.address, lost=True)
    until(page, "document.querySelector('.live').textContent.startsWith('Live')")
    (tmp_path / "run" / "tokens" / "step-000001.parquet").write_bytes(b"half")
    until(page, "document.querySelector('#top').textContent.includes('it is damaged')")
    page.evaluate("Object.defineProperty(document, 'hidden', { value: true, configurable: true })")
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    version = server.version
    measure(tmp_path / "run", 4)
    end = time.monotonic() + SOON
    while server.version == version:
        assert time.monotonic() < end
        page.wait_for_timeout(50)
    page.wait_for_timeout(300)
    assert page.evaluate(AT.format(3)), "nobody looks"
    page.evaluate("delete document.hidden; document.dispatchEvent(new Event('visibilitychange'))")
    until(page, AT.format(4))
    server.cookie = "another"  # as of a server that was started again on this port
    page.reload()
    assert "entroray watch" in page.inner_text("body")


@pytest.mark.slow
def test_seven_pages_of_one_browser_follow_a_run_though_it_has_six_connections(
    tmp_path: Path, watch: Callable[[Path], PageServer], browse: Browse
) -> None:
    folder = write_run(tmp_path / "run", SMALL, steps=2, recorded=[])
    server = watch(folder)
    first = browse(server.address)
    pages = [first, *(first.context.new_page() for _ in range(6))]
    for page in pages[1:]:
        page.goto(first.url)
        page.wait_for_selector("#settings h2")
    measure(folder, 3)
    for page in pages:
        until(page, AT.format(3))
    first.close()  # another listens in its place
    measure(folder, 4)
    for page in pages[1:]:
        until(page, AT.format(4))
