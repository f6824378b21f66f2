"""Pages of runs drawn over each other: a lab's, and that of `entroray report RUN RUN ...`."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from html import escape
from math import isfinite
from pathlib import Path
from typing import Any

from entroray.errors import DataError
from entroray.observe import lab_cells, run_data
from entroray.observe.comparison import (
    LEGEND,
    PARTS,
    TEXTS,
    Row,
    Table,
    code_lines,
    grid,
    missing_lines,
    tables,
    tasks,
    variants,
)
from entroray.observe.css import STYLE
from entroray.observe.journal import replace_text
from entroray.observe.lab_cells import WINDOW, Cell
from entroray.observe.report import PAGE, POLICY, _hash, _inert
from entroray.observe.run_files import EVENTS, METRICS, read_metrics

SCRIPTS = ("parts.js", "charts.js", "bands.js", "compare.js")
NUMBERS = 400_000
"""Most values of metrics on a page: longer runs are drawn in means of several steps."""
BAR = '<div id="bar" class="bar"></div>'
Steps = Sequence[dict[str, Any]]


def write_lab_page(lab: Path, cells: Sequence[Cell], baseline: str) -> Path:
    """Write `lab`/lab.html from the cells and their metrics.jsonl."""
    read = {c.name: _steps(lab_cells.cell_path(lab, c)) for c in cells if c.status == "done"}
    drawn = [name for name, (steps, _) in read.items() if steps]
    places = lambda runs: [drawn.index(c.name) for c in runs if c.name in drawn]
    bands_of = lambda named: [{"name": name, "runs": places(runs)} for name, runs in named.items()]
    unread = [f"not drawn: {name}: {why}" for name, (_, why) in read.items() if why]
    by_task = tasks(cells)
    body = [
        f"<header><h1>{escape(lab.name)}</h1>",
        f"<p>Baseline: <code>{escape(baseline)}</code>. {LEGEND}</p></header>{BAR}",
        *(_task(i, task, tables(by_task[task], baseline)) for i, task in enumerate(by_task)),
        _missing([*missing_lines(cells), *code_lines(cells), *unread]),
        _meanings(),
    ]
    data = {"bands": [bands_of(variants(of_task)) for of_task in by_task.values()], "smooth": WINDOW}
    _write_page(lab / "lab.html", lab.name, "".join(body), data, {name: read[name][0] for name in drawn})
    return lab / "lab.html"


def write_comparison(folders: Sequence[Path], out: Path) -> list[str]:
    """Write a page of the runs in `folders` to `out`; a line for each that is left out.

    Runs that differ only in their seed are one band. DataError if no run has a step.
    """
    named = dict(zip(_names(folders), folders, strict=True))
    read = {name: _steps(folder) for name, folder in named.items()}
    left_out = [f"left out: {name}: {why}" for name, (_, why) in read.items() if why]
    steps = {name: steps for name, (steps, _) in read.items() if steps}
    if not steps:
        raise DataError("no run can be drawn: " + "; ".join(left_out))
    about = [_about(name, named[name]) for name in steps]
    curves = '<section><h2>Curves</h2><div class="drawn" data-place="0"></div></section>'
    body = f'<header id="top"></header>{BAR}{curves}<div id="words"></div>'
    _write_page(out, "Comparison", body, {"about": about, "left_out": left_out, "smooth": 1}, steps)
    return left_out


def _write_page(out: Path, title: str, body: str, data: Mapping[str, Any], runs: Mapping[str, Steps]) -> None:
    """A page of `body`, HTML, where the script draws what each step of `runs` measured."""
    sizes = [len(steps) * len({name for m in steps for name in m}) for steps in runs.values()] or [1]
    every = max(-(-sum(sizes) // NUMBERS), -(-max(sizes) // run_data.NUMBERS))
    metrics = [run_data.columns(steps, every) for steps in runs.values()]
    read = lambda name: (PAGE / name).read_text(encoding="utf-8")
    style, scripts = STYLE + read("page.css") + read("compare.css"), "\n".join(map(read, SCRIPTS))
    page = read("compare.html")
    for name, text in {
        "title": escape(title),
        "policy": f"{POLICY}; style-src {_hash(style)}; script-src {_hash(scripts)}",
        "style": style,
        "body": body,
        "data": _inert({**data, "metrics": metrics, "charts": TEXTS["charts"]}),
        "scripts": scripts,
    }.items():
        page = page.replace(f"<!--{name}-->", text, 1)
    replace_text(out, page)


def _about(name: str, folder: Path) -> dict[str, Any]:
    found = run_data.run_data(folder)
    kept = {key: found[key] for key in ("objective", "settings", "running", "manifest", "notes")}
    kinds = [event["kind"] for event in found["events"]]
    return kept | {"name": name, "health": found["health"]["kind"], "kinds": kinds}


def _steps(folder: Path) -> tuple[Steps, str]:
    """What each step of a run measured, its evaluation before the first included; or why nothing is known."""
    events: Steps = []
    with suppress(DataError):  # the page of the run itself tells of it
        events = read_metrics(folder / EVENTS)
    try:
        metrics = read_metrics(folder / METRICS)
    except DataError as error:
        return [], str(error)
    if not metrics:
        return [], "it has no step yet" if (folder / METRICS).exists() else f"it holds no {METRICS}"
    known = [*run_data.evaluated_before(events), *metrics]
    return [{k: v for k, v in m.items() if isinstance(v, int | float) and isfinite(v)} for m in known], ""


def _names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of their paths that tell all of them apart."""
    ends = lambda n: ["/".join(folder.parts[-n:]) for folder in folders]
    return next(ends(n) for n in range(1, 1000) if len({*ends(n)}) == len(folders))


def _task(place: int, task: str, of_task: Sequence[Table]) -> str:
    shown, settings = "".join(map(_table, of_task)), escape(of_task[0].settings)
    drawn = f'<div class="drawn" data-place="{place}"></div>'
    return f"<section><h2>{escape(task)} <small>{settings}</small></h2>{shown}{drawn}</section>"


def _table(table: Table) -> str:
    head, *rows = grid(table)
    means = "".join(f'<th title="{escape(c.meaning)}">{escape(c.title)}</th>' for c in table.columns)
    top = f"<tr><th>{head[0]}</th><th>{head[1]}</th>{means}</tr>"
    body = "".join(_line(row, texts) for row, texts in zip(table.rows, rows, strict=True))
    wide = f'class="wide" tabindex="0" role="region" aria-label="{escape(table.title)}"'
    return f"<h3>{escape(table.part)}</h3><div {wide}><table>{top}{body}</table></div>"


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
