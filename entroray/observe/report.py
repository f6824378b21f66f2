"""One self-contained page about a run: report.html, readable without a network."""

import itertools
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import yaml
from plotly.offline import get_plotlyjs

from entroray.observe import token_records, token_view
from entroray.observe.css import render_html
from entroray.observe.journal import first_and_last, read_metrics, replace_text, series

Metrics = Sequence[Mapping[str, Any]]
PAGE = yaml.safe_load(Path(__file__).with_name("plots.yaml").read_text(encoding="utf-8"))
COLOUR: Mapping[str, str] = PAGE["colours"]


@dataclass(frozen=True)
class Curve:
    """A metric as a curve, `times` another one; `fill` shades the space down to the curve before it."""

    key: str
    name: str
    colour: str
    dash: str = "solid"
    width: float = 2.0
    fill: bool = False
    times: str = ""

    def drawn(self, metrics: Metrics) -> tuple[list[int], list[float]]:
        """Steps and values of the steps that measured both metrics."""
        if not self.times:
            return series(metrics, self.key)
        at, factors = series(metrics, self.times)
        by_step = dict(zip(at, factors, strict=True))
        steps, values = series(metrics, self.key)
        known = [(n, v * by_step[n]) for n, v in zip(steps, values, strict=True) if n in by_step]
        return [n for n, _ in known], [v for _, v in known]


@dataclass(frozen=True)
class Plot:
    """One section of the page: its curves, their meaning and their unit."""

    title: str
    meaning: str
    unit: str
    curves: tuple[Curve, ...]
    log: bool = False
    stacked: bool = False


PLOTS = tuple(
    Plot(**{**plot, "curves": tuple(Curve(**{**c, "colour": COLOUR[c["colour"]]}) for c in plot["curves"])})
    for plot in PAGE["plots"]
)
"""The sections of the page, in order."""


def write_report(run_dir: Path) -> Path:
    """Write `run_dir`/report.html from the files of the run; a missing file is a sentence on the page."""
    path = run_dir / "metrics.jsonl"
    metrics = read_metrics(path) if path.exists() else []
    plots = (*PLOTS, *_parts(metrics), *_moved(metrics))
    body = [
        _head(run_dir, metrics),
        f'<main class="cards">{"".join(_card(p, metrics) for p in plots)}</main>'
        if metrics
        else _missing("metrics.jsonl", "there are no curves"),
        _sets(_with_first(metrics, run_dir / "events.jsonl")),
        _tokens(run_dir),
        _events(run_dir / "events.jsonl"),
        _text(run_dir / "config.yaml", "Configuration"),
        _text(run_dir / "manifest.json", "Manifest"),
    ]
    script = f"<script>{get_plotlyjs()}</script>"
    page = render_html(run_dir.resolve().name, "entroray", "".join([script, *body]))
    replace_text(run_dir / "report.html", page)
    return run_dir / "report.html"


def _head(run_dir: Path, metrics: Metrics) -> str:
    tiles = "".join(
        f'<div class="tile"><b>{value}</b><span>{name}</span></div>' for name, value in _tiles(metrics)
    )
    return f'<header><h1>{escape(run_dir.resolve().name)}</h1><div class="tiles">{tiles}</div></header>'


def _tiles(metrics: Metrics) -> list[tuple[str, str]]:
    """The run in a handful of numbers; first and last are means over 5 steps."""
    tiles = [("steps", str(len(metrics)))]
    for key, name in {"correct/mean": "share right", "entropy/mean": "entropy, nats per token"}.items():
        _, values = series(metrics, key)
        if values:
            first, last = first_and_last(values)
            tiles.append((f"{name}, first 5 → last 5 steps", f"{first:.3f} → {last:.3f}"))
    _, entropy = series(metrics, "entropy/mean")
    if entropy and first_and_last(entropy)[0]:
        first, last = first_and_last(entropy)
        tiles.append(("change of entropy", f"{(last - first) / first:+.0%}"))
    for key, name, form in (
        ("tokens/per_second", "tokens per second, median", ",.0f"),
        ("seconds/step", "seconds per step, median", ".2f"),
    ):
        _, values = series(metrics, key)
        if values:
            tiles.append((name, format(sorted(values)[len(values) // 2], form)))
    return tiles


def _parts(metrics: Metrics) -> list[Plot]:
    """A plot of what the reward is made of, where verdicts have parts."""
    names = dict.fromkeys(key for m in metrics for key in m if key.startswith("reward/part_"))
    colours = itertools.cycle(COLOUR.values())
    curves = tuple(Curve(name, escape(name.removeprefix("reward/part_")), next(colours)) for name in names)
    meaning = "Mean of each part of the verdicts before its weight, over a step's judged rollouts."
    return [Plot("Parts of the reward", meaning, "each its own", curves)] if curves else []


def _moved(metrics: Metrics) -> list[Plot]:
    """A plot for each setting that a schedule or a controller moved."""
    names = dict.fromkeys(key for m in metrics for key in m if key.startswith("control/"))
    meaning = "The value in effect in each step; what it moves is in the event <code>control</code>."
    return [
        Plot(
            f"Setting moved by {escape(key.removeprefix('control/'))}",
            meaning,
            "its own unit",
            (Curve(key, "value", COLOUR["orange"]),),
        )
        for key in names
    ]


_SET = re.compile(r"eval/avg@(\d+):(.+)")
_SET_MEANING = (
    "Share of right answers with its 95 % interval over prompts, and the share of prompts that one of the "
    "samples, or their majority, gets right; step 0 is before training."
)


def _with_first(metrics: Metrics, events: Path) -> Metrics:
    """The steps, before them the evaluation that preceded the first, which is an event."""
    entries = read_metrics(events) if events.exists() else []
    return [*[entry["fields"] for entry in entries if entry["kind"] == "evaluation"][-1:], *metrics]


def _sets(metrics: Metrics) -> str:
    """A curve for each evaluation set, and its first and last numbers with their intervals."""
    found = dict.fromkeys(m.groups() for entry in metrics for key in entry if (m := _SET.fullmatch(key)))
    if not found:
        return ""
    cards = "".join(_card(_set_plot(name, n), metrics) for n, name in found)
    head = ["set", "step", "right", "one of n", "majority", "tokens", "truncated", "entropy, nats", "failed"]
    rows = [row for n, name in found for row in _set_rows(name, n, metrics)]
    table = [f"<tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr>"]
    table += [f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows]
    title = "Evaluation sets, first and last <small>95 % bootstrap intervals over prompts</small>"
    return f'<main class="cards">{cards}</main>' + _section(title, f"<table>{''.join(table)}</table>")


def _set_plot(name: str, n: str) -> Plot:
    key = lambda metric: f"eval/{metric}:{name}"
    curves = (
        Curve(key(f"avg@{n}_low"), "low", COLOUR["indigo"], width=0.0),
        Curve(key(f"avg@{n}_high"), "95 % interval", COLOUR["indigo"], width=0.0, fill=True),
        Curve(key(f"avg@{n}"), f"avg@{n}", COLOUR["indigo"]),
        Curve(key(f"pass@{n}"), f"pass@{n}", COLOUR["teal"], dash="dot", width=1.5),
        Curve(key(f"maj@{n}"), f"maj@{n}", COLOUR["orange"], dash="dot", width=1.5),
    )
    return Plot(f"Evaluated: {escape(name)}", _SET_MEANING, "share", curves)


def _set_rows(name: str, n: str, metrics: Metrics) -> list[list[str]]:
    of = [entry for entry in metrics if entry.get(f"eval/avg@{n}:{name}") is not None]
    return [_set_row(name, n, entry) for entry in (of if len(of) < 2 else (of[0], of[-1]))]


def _set_row(name: str, n: str, entry: Mapping[str, Any]) -> list[str]:
    said = lambda metric, form: "-" if (x := entry.get(f"eval/{metric}:{name}")) is None else format(x, form)
    low, high = said(f"avg@{n}_low", ".3f"), said(f"avg@{n}_high", ".3f")
    scores = [f"avg@{n} {said(f'avg@{n}', '.3f')} [{low} {high}]"]
    scores += [f"{curve}@{n} {said(f'{curve}@{n}', '.3f')}" for curve in ("pass", "maj")]
    rest = [("length/mean", ".0f"), ("length/truncated", ".1%"), ("entropy/mean", ".4f"), ("failed", ".0f")]
    return [name, str(entry["step"]), *scores, *(said(*each) for each in rest)]


def _card(plot: Plot, metrics: Metrics) -> str:
    drawn = [curve for curve in plot.curves if curve.drawn(metrics)[0]]
    keys = ", ".join(f"<code>{key}</code>" for c in plot.curves for key in (c.key, c.times) if key)
    inner = _figure(plot, drawn, metrics) if drawn else _missing("metrics.jsonl", f"it holds none of {keys}")
    title = f"<h2>{plot.title} <small>{plot.unit}</small></h2>"
    return f'<section>{title}<p class="note">{plot.meaning}</p>{inner}</section>'


def _figure(plot: Plot, curves: Sequence[Curve], metrics: Metrics) -> str:
    figure = go.Figure([_trace(plot, curve, metrics) for curve in curves])
    values = [value for curve in curves for value in curve.drawn(metrics)[1]]
    log = plot.log and 0 < 10 * min(values) < max(values)
    figure.update_layout(PAGE["layout"])
    if log:
        figure.update_yaxes(type="log", dtick=1)
    options = {"displayModeBar": False, "responsive": True}
    return figure.to_html(full_html=False, include_plotlyjs=False, config=options)


def _trace(plot: Plot, curve: Curve, metrics: Metrics) -> go.Bar | go.Scatter:
    steps, values = curve.drawn(metrics)
    if plot.stacked:
        return go.Bar(
            x=steps, y=values, name=curve.name, marker={"color": curve.colour, "line": {"width": 0}}
        )
    return go.Scatter(
        x=steps,
        y=values,
        name=curve.name,
        mode="lines" if len(steps) > 1 else "markers",
        line={"color": curve.colour, "width": curve.width, "dash": curve.dash},
        fill="tonexty" if curve.fill else None,
        fillcolor="rgba(79,70,229,0.15)",
        showlegend=curve.width > 0 or curve.fill,
    )


def _tokens(run_dir: Path) -> str:
    files = token_records.files(run_dir)
    if not files:
        why = "no token was recorded (see the setting observe.tokens.every)"
        return _section("Tokens", _missing("tokens/", why))
    try:
        view = token_view.load_token_view(files[-1])
    except (OSError, ValueError) as error:  # Arrow's errors are both
        why = f"it is damaged ({escape(str(error))})"
        return _section("Tokens", _missing(f"tokens/{files[-1].name}", why))
    step = token_records.step_of(files[-1])
    return _section(
        f"Most uncertain tokens of step {step} <small>entropy in nats, varentropy in nats²</small>",
        token_view.uncertain_table(view),
    ) + _section(
        f"Responses of step {step} <small>darker is more uncertain; point at a token for its numbers</small>",
        token_view.uncertain_responses(view),
    )


def _events(path: Path) -> str:
    if not path.exists():
        return _section("Events", _missing("events.jsonl", "nothing is known of faults and restarts"))
    entries = read_metrics(path)
    newest = {entry["kind"]: entry for entry in entries}
    rows = "".join(
        f"<tr><td>{escape(kind)}</td><td>{count}</td><td>{newest[kind]['time']}</td>"
        f"<td><code>{escape(json.dumps(newest[kind]['fields'])[:300])}</code></td></tr>"
        for kind, count in Counter(entry["kind"] for entry in entries).most_common()
    )
    head = "<tr><th>kind</th><th>count</th><th>newest (UTC)</th><th>its fields</th></tr>"
    return _section("Events", f"<table>{head}{rows}</table>" if rows else "<p>None.</p>")


def _text(path: Path, title: str) -> str:
    if not path.exists():
        return _section(title, _missing(path.name, "it is not shown"))
    text = escape(path.read_text(encoding="utf-8"))
    return _section(title, f"<details><summary>{path.name}</summary><pre>{text}</pre></details>")


def _section(title: str, inner: str) -> str:
    return f'<section class="wide"><h2>{title}</h2>{inner}</section>'


def _missing(name: str, consequence: str) -> str:
    return f'<p class="missing">Nothing from {name}: {consequence}.</p>'
