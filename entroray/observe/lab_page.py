"""One self-contained page about a lab: its tables, and reward and entropy over the steps."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from entroray.observe import cells as stored
from entroray.observe.cells import WINDOW, Cell, moving
from entroray.observe.comparison import (
    BEFORE,
    LEGEND,
    PARTS,
    Column,
    Row,
    Table,
    absent,
    grid,
    tables,
    tasks,
    variants,
)
from entroray.observe.curves import Frame, Line, chart, frame, mean
from entroray.observe.journal import read, replace_text, series

COLOURS = 8
"""Told apart by colour; a ninth line is dashed, and so on."""


class Curve(NamedTuple):
    key: str
    title: str


CURVES = (
    Curve("reward/mean", "reward, share of judged training answers right"),
    Curve("entropy/mean", "entropy, nats per trained response token"),
)
Measured = tuple[Sequence[int], Sequence[float]]


def write(lab: Path, cells: Sequence[Cell], baseline: str) -> Path:
    """Makes `lab`/lab.html from the cells and their metrics.jsonl."""
    body = [
        f"<header><h1>{escape(lab.name)}</h1>",
        f"<p>Baseline: <code>{escape(baseline)}</code>. {LEGEND}</p></header>",
        *(_task(lab, task, of_task, baseline) for task, of_task in tasks(cells).items()),
        _absent(absent(cells)),
        _meanings(),
    ]
    replace_text(lab / "lab.html", PAGE.format(name=escape(lab.name), style=STYLE, body="".join(body)))
    return lab / "lab.html"


def _task(lab: Path, task: str, cells: Sequence[Cell], baseline: str) -> str:
    of_task = tables(cells, baseline)
    charts = "".join(_charts(lab, cells, baseline, curve) for curve in CURVES)
    shown = "".join(map(_table, of_task))
    told = escape(of_task[0].told)
    return f"<section><h2>{escape(task)} <small>{told}</small></h2>{shown}{charts}</section>"


def _table(table: Table) -> str:
    head, *rows = grid(table)
    means = "".join(f'<th title="{escape(c.meaning)}">{escape(c.title)}</th>' for c in table.columns)
    top = f"<tr><th>{head[0]}</th><th>{head[1]}</th>{means}</tr>"
    body = "".join(_line(row, texts) for row, texts in zip(table.rows, rows, strict=True))
    return f'<div class="wide"><h3>{escape(table.part)}</h3><table>{top}{body}</table></div>'


def _line(row: Row, texts: Sequence[str]) -> str:
    style = ' class="quiet"' if row.name == BEFORE else ""
    numbers = "".join(map(_number, texts[2:]))
    return f"<tr{style}><th>{escape(texts[0])}</th><td>{escape(texts[1])}</td>{numbers}</tr>"


def _number(text: str) -> str:
    """`0.75 [0.74 0.78] +`: the mean plain, its interval small, its sign in a colour that has a meaning."""
    sign = text[-1] if text and text[-1] in "+-=?" and len(text) > 1 else ""
    value, _, rest = text.removesuffix(sign).strip().partition(" ")
    style = {"+": "above", "-": "below"}.get(sign, "tie")
    mark = f'<b class="{style}">{sign.replace("-", "−")}</b>'
    between = f"<small>{escape(rest)}</small>" if rest else ""
    return f"<td>{escape(value)} {between} {mark}</td>"


def _charts(lab: Path, cells: Sequence[Cell], baseline: str, curve: Curve) -> str:
    """All means in one chart, then each variant's seeds beside the baseline's mean, on one scale."""
    measured = {name: _measured(lab, runs, curve.key) for name, runs in variants(cells).items()}
    measured = {name: runs for name, runs in measured.items() if runs}
    means = {name: mean(runs) for name, runs in measured.items()}
    if not means:
        return f"<p>No step of {escape(curve.key)} was measured yet.</p>"
    lines = [_smooth(means[name], style(i), name) for i, name in enumerate(means)]
    keys = "".join(_key(style(i), name) for i, name in enumerate(means))
    title = f"{curve.title}; mean over seeds and {WINDOW} steps"
    all_ = chart(lines, frame(lines), label=title, width=920, height=300)
    small = "".join(_small(measured, means, name, baseline, style(i)) for i, name in enumerate(means))
    return f'<h3>{escape(title)}</h3><p class="keys">{keys}</p>{all_}<div class="small">{small}</div>'


def _small(
    measured: Mapping[str, Sequence[Measured]],
    means: Mapping[str, Measured],
    name: str,
    baseline: str,
    colour: str,
) -> str:
    seeds = [Line(*run, f"{colour} thin") for run in measured[name]]
    beside = [Line(*means[baseline], "base", baseline)] if baseline in means and name != baseline else []
    lines = [*beside, *seeds, Line(*means[name], colour, name)]
    drawn = chart(lines, _scale(measured), label=name, width=300, height=150)
    return f"<figure><figcaption>{escape(name)}</figcaption>{drawn}</figure>"


def _scale(measured: Mapping[str, Sequence[Measured]]) -> Frame:
    return frame([Line(*run, "") for runs in measured.values() for run in runs])


def _measured(lab: Path, cells: Sequence[Cell], key: str) -> list[Measured]:
    files = [stored.path(lab, cell) / "metrics.jsonl" for cell in cells if cell.status == "done"]
    return [found for file in files if (found := series(read(file), key))[0]]


def _smooth(curve: Measured, style: str, name: str) -> Line:
    """The mean of the last `WINDOW` steps at each; a short curve as it is."""
    steps, values = curve
    window = WINDOW if len(values) > 2 * WINDOW else 1
    return Line(list(steps)[window - 1 :], moving(values, window), style, name)


def style(index: int) -> str:
    """Class of the index-th line: its colour, and a dash after the colours are used up."""
    return f"c{index % COLOURS} d{index // COLOURS % 3}"


def _key(colour: str, name: str) -> str:
    sample = f'<svg viewBox="0 0 24 8"><line class="{colour}" x1="0" x2="24" y1="4" y2="4"/></svg>'
    return f"<span>{sample}{escape(name)}</span>"


def _absent(lines: Sequence[str]) -> str:
    if not lines:
        return ""
    said = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<section class="absent"><h2>Missing and failed</h2><ul>{said}</ul></section>'


def _meanings() -> str:
    """What each column is, in the words of the tables' own declaration."""
    parts = [
        f"<h3>{escape(part)}</h3><dl>{''.join(_meaning(c) for c in columns)}</dl>"
        for part, columns in PARTS.items()
    ]
    return f"<section><h2>The columns</h2>{''.join(parts)}</section>"


def _meaning(column: Column) -> str:
    return f"<dt>{escape(column.title)}</dt><dd>{escape(column.meaning)}</dd>"


STYLE = """
:root{color-scheme:light dark;--page:#f7f8fa;--card:#fff;--ink:#1f2937;--soft:#64748b;--rule:#e5e9f0;
--above:#1d4ed8;--below:#b45309;--c0:#2563eb;--c1:#d97706;--c2:#059669;--c3:#dc2626;--c4:#7c3aed;--c5:#0891b2;
--c6:#db2777;--c7:#65a30d}
@media (prefers-color-scheme:dark){:root{--page:#0f141b;--card:#171e27;--ink:#e5e9f0;--soft:#94a3b8;
--rule:#2a3441;--above:#93c5fd;--below:#fbbf24;--c0:#60a5fa;--c1:#fbbf24;--c2:#34d399;--c3:#f87171;--c4:#a78bfa;
--c5:#22d3ee;--c6:#f472b6;--c7:#a3e635}}
*{box-sizing:border-box} body{margin:0 auto;padding:28px 24px 60px;max-width:1240px;background:var(--page);
color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
h1{font-size:26px;margin:0} h2{font-size:20px;margin:0 0 8px} h2 small{font-weight:400;font-size:14px} h3{
font-size:14px;font-weight:600;margin:22px 0 6px}
header p,.keys,figcaption,small{color:var(--soft)} header p{max-width:80ch}
section{background:var(--card);border:1px solid var(--rule);border-radius:12px;
padding:20px 24px;margin-top:18px}
.wide{overflow-x:auto} table{border-collapse:collapse;font-size:13.5px;width:100%}
th,td{text-align:left;padding:5px 6px;border-bottom:1px solid var(--rule);white-space:nowrap;
font-variant-numeric:tabular-nums} th:first-child{padding-left:0} th{font-weight:500}
tr:first-child th{color:var(--soft)} .quiet{color:var(--soft)} 
td small{font-size:12px;display:inline-block;min-width:13ch}
td b{display:inline-block;width:1em;text-align:center} .above{color:var(--above)} .below{color:var(--below)}
.tie{color:var(--soft);font-weight:400} svg{display:block;width:100%;height:auto}
svg text{font-size:11px;fill:var(--soft)} .grid{stroke:var(--rule)}
polyline,.keys line{fill:none;stroke-width:2;stroke-linejoin:round} .thin{stroke-width:1;opacity:.4}
.base{stroke:var(--soft);stroke-width:1.5;stroke-dasharray:3 3} 
.d1{stroke-dasharray:7 3} .d2{stroke-dasharray:2 3}
dl{display:grid;grid-template-columns:max-content 1fr;gap:2px 18px;margin:0;font-size:13.5px} dd{margin:0;
color:var(--soft)}
.small{display:grid;grid-template-columns:repeat(auto-fill,minmax(250px,1fr));gap:10px 18px;margin-top:14px}
figure{margin:0} figcaption{font-size:13px}
.keys{display:flex;flex-wrap:wrap;gap:4px 18px;margin:0 0 6px;font-size:13px}
.keys svg{display:inline-block;width:24px;height:8px;margin-right:6px;vertical-align:middle}
""" + "".join(f".c{i}{{stroke:var(--c{i})}} circle.c{i}{{fill:var(--c{i})}}\n" for i in range(COLOURS))

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<title>{name} · entroray lab</title><style>{style}</style></head><body>{body}</body></html>
"""
