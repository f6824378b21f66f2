"""A page of `docs/` with what it takes from elsewhere in the checkout: text in, text out, without sphinx.

Two comments, alone on their lines, are filled in:

    <!-- include: conf/README.md # Data -->    a file without its title, or a part of it; a notebook's cells
    <!-- generate: objectives -->              made by a function of generated.py, messages.py

Links between files become links between pages, `learner.lr` in prose becomes a link to the setting, and
arXiv 2402.03300 one to the paper.
"""

import json
import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from docs import generated, messages

DOCS = Path(__file__).parent
ROOT = DOCS.parent
COMMENT = re.compile(r"^<!-- (include|generate): (\S+)(?: # (.+?))? -->$", re.MULTILINE)
FENCE = re.compile(r"^ *```.*?^ *```\s*?$", re.MULTILINE | re.DOTALL)
PROSE = re.compile(
    r"(?P<link>(?P<text>!?\[(?:[^\[\]`]|`[^`]*`)*\])\((?P<target>[^()\s]+)\))"
    r"|(?<![`\\])(?P<code>(?P<ticks>`+)(?!`)(?P<name>.+?)(?<!`)(?P=ticks)(?![`]))(?P<marked>\{)?"
    r"|arXiv\s+(?P<paper>\d{4}\.\d{4,5})",
    re.DOTALL,
)
HEADING = re.compile(r"^(#+) (.+)$", re.MULTILINE)


class Include(NamedTuple):
    """Where a file, or the part of it under one heading, stands in the site."""

    page: str
    path: str
    part: str


def pages() -> list[str]:
    """The names of all pages."""
    return sorted(file.stem for file in DOCS.glob("*.md"))


@cache
def page_text(name: str) -> str:
    """The Markdown of a page, complete."""
    text = (DOCS / f"{name}.md").read_text(encoding="utf-8")
    filled = COMMENT.sub(_filled, text)
    return _outside_fences(filled, lambda prose: linked_prose(prose, DOCS / f"{name}.md"))


def _filled(comment: re.Match) -> str:
    kind, what, part = comment.groups()
    if kind == "generate":
        return str(getattr(messages if what.startswith("error_") else generated, what)())
    text = (ROOT / what).read_text(encoding="utf-8")
    text = _part(notebook_text(text) if what.endswith(".ipynb") else text, part)
    return _outside_fences(text, lambda prose: linked_prose(prose, ROOT / what))


def notebook_text(text: str) -> str:
    """The cells of a notebook, in order."""
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(text)["cells"]]
    return "\n\n".join(f"```python\n{said}\n```" if kind == "code" else said for kind, said in cells)


def _part(text: str, title: str | None) -> str:
    """All behind the title, or what stands under `## title`, its headings raised by one.

    `(top)` is what stands above the first of them, without a table between `<!-- rows -->`, and
    `(rest)` all from there on.
    """
    body = re.sub(r"\A# .+\n", "", text)
    if title is None:
        return body
    top, *parts = re.split(r"^(?=## )", body, flags=re.MULTILINE)
    if title in ("(top)", "(rest)"):
        shown = re.sub(r"^<!-- rows -->.*^<!-- /rows -->$", "", top, flags=re.MULTILINE | re.DOTALL)
        return shown if title == "(top)" else "".join(parts)
    found = next(part for part in parts if part.startswith(f"## {title}\n")).partition("\n")[2]
    return FENCED_OR_HEADING.sub(lambda m: m[0] if m[0].lstrip().startswith("```") else m[0][1:], found)


FENCED_OR_HEADING = re.compile(rf"{FENCE.pattern}|^###* .+$", re.MULTILINE | re.DOTALL)


def _outside_fences(text: str, change) -> str:  # type: ignore[no-untyped-def]
    parts, at = list[str](), 0
    for fence in FENCE.finditer(text):
        parts += [change(text[at : fence.start()]), fence[0]]
        at = fence.end()
    return "".join([*parts, change(text[at:])])


def linked_prose(prose: str, home: Path) -> str:
    lines = re.split(r"(^#+ .+$)", prose, flags=re.MULTILINE)
    return "".join(x if x.startswith("#") else PROSE.sub(lambda m: _linked(m, home), x) for x in lines)


def _linked(found: re.Match, home: Path) -> str:
    if found["link"]:
        return f"{found['text']}({_target(found['target'], home)})"
    if paper := found["paper"]:
        return f"[arXiv {paper}](https://arxiv.org/abs/{paper})"
    name, known = found["name"], targets()
    key, equals, _ = name.partition("=")
    place = known.get(name) or known.get(key) or known.get(key + equals)
    return f"[{found['code']}](#{place})" if place and not found["marked"] else found[0]


def _target(target: str, home: Path) -> str:
    """Where a link of the file `home` leads on the site: a page, a place in it, or the file itself."""
    if home.parent == DOCS or re.match(r"\w+:", target):
        return target
    path, _, place = target.partition("#")
    file = (home.parent / path).resolve() if path else home
    return _page_of(file, place) or (os.path.relpath(file, DOCS) if path else target)


def _page_of(file: Path, place: str) -> str:
    """`page.md#place` of a file that is included somewhere; empty for others."""
    found = [each for each in includes() if ROOT / each.path == file]
    if not found:
        return ""
    part = _part_of(file, place)
    wanted = (part, "", "(rest)") if part else ("", "(top)")
    best = next((each for name in wanted for each in found if each.part == name), found[0])
    at_top = not place or slug(best.part) == place
    return f"{best.page}.md" + ("" if at_top else f"#{place}")


def _part_of(file: Path, place: str) -> str:
    """The `##` heading that the heading with the slug `place` stands under."""
    part = ""
    for marks, title in HEADING.findall(FENCE.sub("", file.read_text(encoding="utf-8"))):
        part = title if marks == "##" else part
        if slug(title) == place:
            return part
    return ""


def slug(title: str) -> str:
    """The name of a heading in a link, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


@cache
def includes() -> tuple[Include, ...]:
    """Every include comment of every page."""
    return tuple(_includes())


def _includes() -> Iterator[Include]:
    for name in pages():
        for kind, what, part in COMMENT.findall((DOCS / f"{name}.md").read_text(encoding="utf-8")):
            if kind == "include":
                yield Include(name, what, part)


@cache
def targets() -> dict[str, str]:
    """What in backticks becomes a link, and where to: settings, metrics, columns, choices of conf/."""
    return generated.targets()
