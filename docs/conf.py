"""Sphinx's settings. Everything is made from the checkout; nothing is fetched while building or reading."""

import sys
from pathlib import Path
from typing import Any

from docutils.nodes import SkipNode

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from docs import sources  # noqa: E402
from docs.equations import mathml  # noqa: E402
from entroray import __version__  # noqa: E402

project = "entroray"
author = copyright = "the entroray authors"
release = version = __version__
extensions = ["myst_parser"]
exclude_patterns = ["notebooks"]
smartquotes = False  # `--flag` and 'text' are to be copied
html_theme = "furo"
html_title = f"entroray {release}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_copy_source = False
html_show_copyright = False
html_show_sphinx = False
pygments_style, pygments_dark_style = "xcode", "monokai"
myst_enable_extensions = ["dollarmath", "attrs_block", "attrs_inline", "colon_fence", "deflist"]
myst_heading_anchors = 4
myst_dmath_double_inline = True
suppress_warnings = ["misc.highlighting_failure"]  # consoles and settings that are no whole language


def visit_math(translator: Any, node: Any) -> None:
    """Mathematics within a line."""
    translator.body.append(mathml(node.astext()))
    raise SkipNode


def visit_math_block(translator: Any, node: Any) -> None:
    """Mathematics of its own."""
    translator.body.append(f'<div class="math">{mathml(node.astext(), block=True)}</div>\n')
    raise SkipNode


def setup(app: Any) -> None:
    """MathML for mathematics; pages filled in as they are read."""
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))
    app.connect("source-read", fill_in)
    app.connect("html-page-context", reachable, priority=900)  # after furo's


def fill_in(app: Any, name: str, source: list[str]) -> None:
    """A page's text with what it includes."""
    source[0] = sources.page_text(name)


def reachable(app: Any, page: str, template: str, context: dict[str, Any], tree: Any) -> None:
    """What scrolls can be reached by keys, and captions have a level, which sphinx gives them not."""
    changes = {"body": ("<pre>", '<pre tabindex="0">')}
    changes["furo_navigation_tree"] = ('role="heading"', 'role="heading" aria-level="2"')
    for part, (old, new) in changes.items():
        context[part] = context.get(part, "").replace(old, new)
