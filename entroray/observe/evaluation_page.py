"""One self-contained page about an evaluation: accuracy over k, calibration, entropy, responses."""

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from entroray.observe.css import render_html
from entroray.observe.evaluation import (
    TEXTS,
    Found,
    accuracy,
    calibration,
    head,
    ks,
    lines,
    named_parts,
    number,
)
from entroray.observe.journal import replace_text
from entroray.observe.svg import Area, Frame, Line, chart, frame, legend_entry

LONGEST = 400
"""Tokens shown of a response."""


def write_evaluation_page(path: Path, found: Found) -> Path:
    """Write the page of an evaluation to `path`."""
    title = Path(found["model"]).name
    body = [f"<header><h1>{escape(title)}</h1><p><code>{escape(found['model'])}</code></p></header>"]
    body += [section for name, part in named_parts(found).items() for section in _sections(name, part)]
    replace_text(path, render_html(title, "entroray eval", "".join(body)))
    return path


def _sections(name: str, found: Found) -> list[str]:
    """Of the held-out prompts, or of a set by its name."""
    title = f"<h1>{escape(name)}</h1>" if name else ""
    task = f"<code>{escape(found['task'])}</code><br>" if name else ""
    said = "<br>".join(map(escape, [head(found), *lines(found)]))
    return [
        f"<header>{title}<p>{task}{said}</p></header>",
        _section("Accuracy over k", _accuracy(found)),
        *_part(found, "cot", "CoT-decoding", _cot),
        _section("Calibration", _calibration(found)),
        *_part(found, "positions", "Entropy by position", _positions),
        *_part(found, "uncertain", "Most frequent high-entropy tokens", _uncertain),
        _section("Responses", "".join(map(_response, found["responses"]))),
    ]


def _part(found: Found, name: str, title: str, draw: Any) -> list[str]:
    """A section about a part that not every evaluation has."""
    return [_section(title, draw(found[name], found))] if found.get(name) else []


def _section(title: str, inner: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{inner}</section>"


def _note(name: str, numbers: str = "") -> str:
    return f'<p class="note">{escape(TEXTS["notes"][name] + numbers)}</p>'


def _rows(rows: Sequence[Sequence[str]]) -> str:
    """The first row is the head."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in rows[0])
    body = "".join(
        f"<tr><th>{escape(row[0])}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in row[1:])}</tr>"
        for row in rows[1:]
    )
    return f'<div class="wide"><table><tr>{top}</tr>{body}</table></div>'


def _accuracy(found: Found) -> str:
    """pass@k, pass^k and maj@k with their intervals; k is spread evenly."""
    columns = ks(found, "pass@")
    place = {k: float(i) for i, k in enumerate(columns)}
    drawn: list[Line] = []
    areas: list[Area] = []
    keys = []
    for index, (curve, meaning) in enumerate(TEXTS["curves"].items()):
        names = [f"{curve}{k}" for k in columns if f"{curve}{k}" in found]
        at = [place[k] for k in columns if f"{curve}{k}" in found]
        means = [found[name] for name in names]
        low, high = ([found["intervals"][name][side] for name in names] for side in (0, 1))
        if not names:
            continue
        areas.append(Area(at, low, high, f"area a{index}"))
        drawn.append(Line(at, means, f"c{index}", f"{curve}k"))
        tooltips = [f"{name} {number(found, name)}" for name in names]
        drawn += [Line([x], [y], f"c{index}", s) for x, y, s in zip(at, means, tooltips, strict=True)]
        keys.append(legend_entry(f"c{index}", f"{curve}k: {meaning}"))
    shown = Frame(0.0, max(1.0, float(len(columns) - 1)), 0.0, 1.0)
    below = {x: f"k={k}" for k, x in place.items()}
    figure = chart(drawn, shown, label="accuracy over k", width=920, height=300, areas=areas, below=below)
    return f'<p class="keys">{"".join(keys)}</p>{figure}{_note("accuracy")}{_rows(accuracy(found))}'


def _cot(cot: Mapping[str, Any], found: Found) -> str:
    lost = "; ".join(f"{n} {why.replace('_', ' ')}" for why, n in cot["lost"].items()) or "none"
    form = lambda name: f"{cot[name]:.3f}" if name in cot else "-"
    rows = [
        ["", "accuracy"],
        ["greedy", number(found, "greedy")],
        *([f"{name}", number(found, key)] for key, name in TEXTS["decoded"].items()),
        ["mean gap of right paths", form("gap_right")],
        ["mean gap of wrong paths", form("gap_wrong")],
        ["paths with a gap", f"{cot['located']} of {cot['paths']}"],
        ["paths without", lost],
        ["prompts without any gap, counted as wrong", str(cot["prompts_without"])],
    ]
    return _note("cot") + _rows(rows)


def _calibration(found: Found) -> str:
    if not found["calibration"]:
        return _note("unmeasured")
    figures = "".join(_diagram(name, bins) for name, bins in found["calibration"].items())
    return f'{_note("calibration")}<div class="small">{figures}</div>{_rows(calibration(found))}'


def _diagram(name: str, bins: Mapping[str, Any]) -> str:
    largest = max(bins["count"])
    bars = []
    for i, (count, sure, right) in enumerate(
        zip(bins["count"], bins["confidence"], bins["accuracy"], strict=True)
    ):
        if count:
            shade = 1 + min(3, int(4 * count / largest))
            tooltip = f"{count:.0f} answers, confidence {sure:.3f}, right {right:.3f}"
            bars.append(Area(bins["edges"][i : i + 2], [0, 0], [right, right], f"bar b{shade}", tooltip))
    diagonal = Line([0.0, 1.0], [0.0, 1.0], "base", "as right as sure")
    below = {x: f"{x:g}" for x in (0.0, 0.5, 1.0)}
    figure = chart(
        [diagonal], Frame(0, 1, 0, 1), label=f"reliability of {name}", width=300, height=220,
        areas=bars, below=below,
    )  # fmt: skip
    caption = escape(f"{name}: {TEXTS['confidence'][name]}")
    return f"<figure><figcaption>{caption}</figcaption>{figure}</figure>"


def _positions(places: Sequence[Mapping[str, Any]], found: Found) -> str:
    middle = [(p["first"] + p["last"]) / 2 for p in places]
    tooltips = [
        f"tokens {p['first']} to {p['last']}: {p['entropy']:.4f} nats over {p['tokens']}" for p in places
    ]
    values = [p["entropy"] for p in places]
    drawn = [Line(middle, values, "c0", "mean entropy")]
    drawn += [Line([x], [y], "c0", s) for x, y, s in zip(middle, values, tooltips, strict=True)]
    figure = chart(drawn, frame(drawn), label="entropy by position", width=920, height=240)
    summary = ", ".join(f"{name} {x:.4f}" for name, x in found["entropy"].items())
    return figure + _note("positions", f" {summary}.")


def _uncertain(uncertain: Mapping[str, Any], found: Found) -> str:
    rows = [["token", "count", "mean entropy, nats"]]
    rows += [[visible(t["text"]), str(t["count"]), f"{t['entropy']:.3f}"] for t in uncertain["tokens"]]
    return _note("uncertain", f" {uncertain['above']:.4f} nats.") + _rows(rows)


def visible(token: str) -> str:
    """A token with ␣ for a space, ⏎ a line break, ⇥ a tab and U+0000 for other invisible characters."""
    plain = token.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")
    return "".join(c if c.isprintable() else f"U+{ord(c):04X}" for c in plain)


def _response(response: Mapping[str, Any]) -> str:
    tokens = response["tokens"]
    verdict = "right" if response["right"] else "wrong"
    caption = (
        f"<b>{verdict}</b>, answer {escape(repr(response['answer']))}, reference "
        f"{escape(repr(response['reference']))}, {response['right_of_prompt']} samples of this prompt right"
        f'<p class="asked">{escape(response["prompt"])}</p>'
    )
    top = max([h for _, h in tokens if h is not None], default=0.0) or 1.0
    shaded = [
        ShadedToken(text, math.nan, "not drawn") if h is None else ShadedToken(text, h, f"H {h:.3f} nats")
        for text, h in tokens
    ]
    return shade_response(caption, shaded, len(tokens), top)


class ShadedToken(NamedTuple):
    """One token of a response; `entropy` (nats) is NaN if nobody drew it, `note` is its tooltip."""

    text: str
    entropy: float
    note: str


def shade_response(caption: str, tokens: Iterable[ShadedToken], length: int, top: float) -> str:
    """A response of `length` tokens as a <figure>, darker up to `top` nats; `caption` is HTML."""
    spans = "".join(_span(token, top) for token in islice(tokens, LONGEST))
    more = f" … {length - LONGEST} tokens more" if length > LONGEST else ""
    return f'<figure class="response"><figcaption>{caption}</figcaption><p>{spans}{more}</p></figure>'


def _span(token: ShadedToken, top: float) -> str:
    shade = f' style="--h:{max(token.entropy, 0.0) / top:.2f}"' if math.isfinite(token.entropy) else ""
    text = escape(token.text).replace("\n", "⏎\n")
    return f'<span{shade} title="{escape(token.note)}">{text}</span>'
