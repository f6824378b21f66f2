"""The look of every page, light and dark, and the page around its content: no network."""

from html import escape
from pathlib import Path

COLOURS = 8
"""Told apart by colour; a ninth line is dashed, and so on."""

STYLE = Path(__file__).with_name("style.css").read_text() + "".join(
    f".c{i}{{stroke:var(--c{i})}} circle.c{i}{{fill:var(--c{i})}}\n" for i in range(COLOURS)
)


def render_html(name: str, kind: str, body: str) -> str:
    """A whole page called `name`; `kind` says what it is about, `body` is HTML."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        f"<title>{escape(name)} · {kind}</title><style>{STYLE}</style></head><body>{body}</body></html>\n"
    )
