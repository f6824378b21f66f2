"""The documentation site: built by sphinx, warnings being errors, read as files, looked at in chromium."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path

import pytest

from docs import sources
from entroray.rows import objective_names
from tests.pages.conftest import SCHEMES, WIDTHS

pytestmark = pytest.mark.timeout(900)
WIDE = """() => [...document.querySelectorAll('article *')].filter(e => {
  if (e.getBoundingClientRect().right <= innerWidth + 1) return false;
  for (let p = e; p; p = p.parentElement) if (getComputedStyle(p).overflowX != 'visible') return false;
  return true;
}).map(e => e.outerHTML.slice(0, 80))"""
"""What is wider than the screen and cannot be scrolled to."""
CLIPPED = """() => [...document.querySelectorAll('math')].filter(m => {
  const box = m.getBoundingClientRect();
  return !box.width || box.height < 5;
}).length"""
GRAVE = ("serious", "critical")
FETCHED = {"link": "href", "script": "src", "img": "src", "iframe": "src", "source": "src", "object": "data"}
"""What a browser fetches by itself."""
PLAIN = """a article aside body br button circle code dd details div dl dt em figure footer form g h1 h2
h3 h4 h5 h6 head header hr html i img input label li line link main marker meta nav noscript ol option p
path polyline pre rect script section select small span strong sub summary sup svg symbol table tbody td
text th thead title tr u ul use defs style blockquote caption colgroup col polygon"""
"""Elements that a page is made of, beside MathML's; another is a `<word>` of a text, taken for one."""


class Page(HTMLParser):
    """What a built page links to, fetches and can be linked at."""

    def __init__(self, file: Path):
        super().__init__()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.ids: set[str] = set()
        self.elements: set[str] = set()
        self.feed(file.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.elements.add(tag)
        self.ids |= {value for name in ("id", "name") if (value := given.get(name))}
        if tag == "a" and (link := given.get("href")):
            self.links.append(link)
        if fetched := given.get(FETCHED.get(tag, "")):
            self.fetched.append(fetched)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The folder that `python -m docs.build` wrote without a warning, where no network is."""
    if find_spec("sphinx") is None:
        pytest.skip("NOT TESTED: the extra `docs` is not installed (ENTRORAY_EXTRAS=docs launch/setup.sh)")
    folder = tmp_path_factory.mktemp("site")
    nowhere = {
        name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy", "HTTPS_PROXY", "HTTP_PROXY")
    }
    command = [sys.executable, "-m", "docs.build", str(folder)]
    done = subprocess.run(
        command, cwd=sources.ROOT, env=os.environ | nowhere, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def read(site) -> dict[str, Page]:
    return {str(file.relative_to(site)): Page(file) for file in site.rglob("*.html")}


def test_every_link_within_the_site_leads_to_a_file_and_a_place_in_it(site, read):
    assert {f"{name}.html" for name in sources.pages()} <= read.keys()
    for name, page in read.items():
        for link in page.links:
            path, _, place = link.partition("#")
            if re.match(r"\w+:", link):
                continue
            target = (site / name).parent / path if path else site / name
            assert target.is_file(), f"{name}: {link}"
            there = read.get(os.path.relpath(target, site))
            assert not place or there is None or place in there.ids, f"{name}: {link}"


def test_nothing_is_fetched_from_elsewhere(site, read):
    for name, page in read.items():
        for address in page.fetched:
            assert not re.match(r"(\w+:)?//", address), f"{name}: {address}"
    for style in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(https?:)?//", style.read_text()), style


def test_a_text_in_angle_brackets_is_no_element(read):
    known = set(PLAIN.split())
    for name, page in read.items():
        strange = {e for e in page.elements - known if not re.match(r"m[a-z]+$", e)}
        assert not strange, f"{name}: {strange}"


def test_equations_are_mathml_and_errors_of_latex_are_none(site):
    text = (site / "objectives.html").read_text()
    assert text.count('<math xmlns="http://www.w3.org/1998/Math/MathML" display="block"') == len(
        objective_names()
    )
    assert (
        "mathjax@" not in text.lower()
        and "mathjax.js" not in text.lower()
        and "<merror" not in text
        and "\\frac" not in text
    )


@pytest.mark.parametrize("words", ["KL-Cov", "entropy collapse", "clip-higher", "importance sampling"])
def test_the_search_finds_what_people_search_for_without_a_server(site, browser, words):
    page = browser.new_page()
    page.set_default_timeout(120_000)
    page.goto(f"{(site / 'search.html').as_uri()}?q={words.replace(' ', '+')}")
    page.wait_for_selector("#search-results li a")
    assert "Glossary" in page.inner_text("#search-results")
    page.close()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_pages_fit_their_screen_and_no_script_fails(site, browser, width, scheme):
    told: list[str] = []
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.set_default_timeout(120_000)
    page.on("console", lambda m: told.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: told.append(str(error)))
    page.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else told.append(r.url))
    for name in sources.pages():
        page.goto((site / f"{name}.html").as_uri())
        assert page.evaluate(WIDE) == [], name
        assert page.evaluate(CLIPPED) == 0, name
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), name
    page.close()
    assert not told


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["index", "objectives", "settings", "notebook", "troubleshooting"])
def test_axe_finds_nothing_serious(site, browser, name, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    page = browser.new_page(color_scheme=scheme)
    page.set_default_timeout(120_000)
    page.goto((site / f"{name}.html").as_uri())
    found = axe.Axe().run(page).response["violations"]
    page.close()
    assert [f"{v['id']}: {v['nodes'][0]['html'][:120]}" for v in found if v["impact"] in GRAVE] == []
