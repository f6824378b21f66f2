"""One self-contained page about a lab: its tables, and reward and entropy over the steps."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from entroray.observe import lab_cells
from entroray.observe.comparison import (
    LEGEND,
    PARTS,
    Row,
    Table,
    code_lines,
    grid,
    missing_lines,
    tables,
    tasks,
    variants,
)
from entroray.observe.css import COLOURS, render_html
from entroray.observe.journal import read_metrics, replace_text, series
from entroray.observe.lab_cells import WINDOW, Cell, moving_means
from entroray.observe.svg import Line, chart, frame, legend_entry, mean_line

CURVES = {
    "correct/mean": "correct, share of judged training answers right",
    "entropy/mean": "entropy, nats per trained response token",
}
Measured = tuple[Sequence[int], Sequence[float]]


def write_lab_page(lab: Path, cells: Sequence[Cell], baseline: str) -> Path:
    """Write `lab`/lab.html from the cells and their metrics.jsonl."""
    body = [
        f"<header><h1>{escape(lab.name)}</h1>",
        f"<p>Baseline: <code>{escape(baseline)}</code>. {LEGEND}</p></header>",
        *(_task(lab, task, of_task, baseline) for task, of_task in tasks(cells).items()),
        _missing([*missing_lines(cells), *code_lines(cells)]),
        _meanings(),
    ]
    replace_text(lab / "lab.html", render_html(lab.name, "entroray lab", "".join(body)))
    return lab / "lab.html"


def _task(lab: Path, task: str, cells: Sequence[Cell], baseline: str) -> str:
    of_task = tables(cells, baseline)
    charts = "".join(_charts(lab, cells, baseline, key) for key in CURVES)
    shown = "".join(map(_table, of_task))
    settings = escape(of_task[0].settings)
    return f"<section><h2>{escape(task)} <small>{settings}</small></h2>{shown}{charts}</section>"


def _table(table: Table) -> str:
    head, *rows = grid(table)
    means = "".join(f'<th title="{escape(c.meaning)}">{escape(c.title)}</th>' for c in table.columns)
    top = f"<tr><th>{head[0]}</th><th>{head[1]}</th>{means}</tr>"
    body = "".join(_line(row, texts) for row, texts in zip(table.rows, rows, strict=True))
    return f'<div class="wide"><h3>{escape(table.part)}</h3><table>{top}{body}</table></div>'


def _line(row: Row, texts: Sequence[str]) -> str:
    style = "" if row.cells else ' class="quiet"'  # before training there are no cells
    numbers = "".join(map(_number, texts[2:]))
    return f"<tr{style}><th>{escape(texts[0])}</th><td>{escape(texts[1])}</td>{numbers}</tr>"


def _number(text: str) -> str:
    """`0.75 [0.74 0.78] +` as a cell: the mean plain, its interval small, its sign in colour."""
    sign = text[-1] if text and text[-1] in "+-=?" and len(text) > 1 else ""
    value, _, rest = text.removesuffix(sign).strip().partition(" ")
    style = {"+": "above", "-": "below"}.get(sign, "tie")
    mark = f'<b class="{style}">{sign.replace("-", "−")}</b>'
    between = f"<small>{escape(rest)}</small>" if rest else ""
    return f"<td>{escape(value)} {between} {mark}</td>"


def _charts(lab: Path, cells: Sequence[Cell], baseline: str, key: str) -> str:
    """All means in one chart, then each variant's seeds beside the baseline's mean, on one scale."""
    measured = {name: _measured(lab, runs, key) for name, runs in variants(cells).items()}
    measured = {name: runs for name, runs in measured.items() if runs}
    means = {name: mean_line(runs) for name, runs in measured.items()}
    if not means:
        return f"<p>No step of {escape(key)} was measured yet.</p>"
    lines = [_smooth(means[name], style(i), name) for i, name in enumerate(means)]
    keys = "".join(legend_entry(style(i), name) for i, name in enumerate(means))
    title = f"{CURVES[key]}; mean over seeds and {WINDOW} steps"
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
    scale = frame([Line(*run, "") for runs in measured.values() for run in runs])
    drawn = chart(lines, scale, label=name, width=300, height=150)
    return f"<figure><figcaption>{escape(name)}</figcaption>{drawn}</figure>"


def _measured(lab: Path, cells: Sequence[Cell], key: str) -> list[Measured]:
    files = [lab_cells.cell_path(lab, cell) / "metrics.jsonl" for cell in cells if cell.status == "done"]
    return [found for file in files if (found := series(read_metrics(file), key))[0]]


def _smooth(curve: Measured, style: str, name: str) -> Line:
    """The mean of the last `WINDOW` steps at each step; a short curve stays as it is."""
    steps, values = curve
    window = WINDOW if len(values) > 2 * WINDOW else 1
    return Line(list(steps)[window - 1 :], moving_means(values, window), style, name)


def style(index: int) -> str:
    """CSS class of the index-th line: a colour, and a dash once the colours are used up."""
    return f"c{index % COLOURS} d{index // COLOURS % 3}"


def _missing(lines: Sequence[str]) -> str:
    if not lines:
        return ""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<section class="absent"><h2>Missing, failed, older or mixed</h2><ul>{items}</ul></section>'


def _meanings() -> str:
    """The meaning of every column."""
    meaning = lambda c: f"<dt>{escape(c.title)}</dt><dd>{escape(c.meaning)}</dd>"
    parts = [
        f"<h3>{escape(part)}</h3><dl>{''.join(map(meaning, columns))}</dl>" for part, columns in PARTS.items()
    ]
    return f"<section><h2>The columns</h2>{''.join(parts)}</section>"
