"""A run on the terminal or in a log file: a header, one line per step, a summary."""

import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import rich.console
import yaml
from rich import progress
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from entroray.observe.journal import first_and_last, series

REPEAT_HEADER = 20


class Column(NamedTuple):
    title: str
    unit: str
    key: str
    width: int
    form: str


COLUMNS = tuple(
    Column(**column)
    for column in yaml.safe_load(Path(__file__).with_name("console.yaml").read_text(encoding="utf-8"))
)


class Terminal(rich.console.Console):
    """A rich console; a reader that goes away (`| head`) silences it instead of ending the run."""

    def on_broken_pipe(self) -> None:
        """Called by rich instead of raising BrokenPipeError."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


def wide_terminal() -> Terminal:
    """A terminal for tables: 160 characters wide if the output is none."""
    terminal = Terminal(highlight=False)
    if not terminal.is_terminal:
        terminal.width = 160
    return terminal


def plain_table(rows: Sequence[Sequence[str]], title: str | None = None) -> Table:
    """`rows` without rules, the first one being their head; the first column is a name."""
    head, *body = rows
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for index, name in enumerate(head):
        table.add_column(name, justify="left" if index == 0 else "right", no_wrap=index > 0)
    for row in body:
        table.add_row(*row)
    return table


class Beside(progress.ProgressColumn):
    """Right of a bar: how far it is, the time so far and that left, and what is said or a function says."""

    def render(self, task: progress.Task) -> Text:
        said, left = task.fields["said"], task.time_remaining
        far = "" if task.total is None else f"{int(task.completed)}/{int(task.total)}"
        more = f"{timedelta(seconds=math.ceil(left))} left" if left else ""
        shown = far, str(timedelta(seconds=int(task.elapsed or 0))), more, said() if callable(said) else said
        return Text("  ".join(filter(None, shown)), no_wrap=True, overflow="ellipsis")


class Console:
    """A tracker that prints one aligned line per step under a panel; on a terminal there are bars below."""

    def __init__(self, *, file: TextIO | None = None):
        self.terminal = Terminal(file=file, highlight=False)
        self.printed, self.last, self.control = 0, "", ""
        self.training: Callable[..., None] = lambda **moved: None
        shown = self.terminal.is_interactive and self.terminal.file.isatty()  # FORCE_COLOR makes no terminal
        self.bars = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(24),
            Beside(),
            console=self.terminal,
            transient=True,
            disable=not shown,
            refresh_per_second=2,
            speed_estimate_period=math.inf,
        )

    @contextmanager
    def progress(
        self, what: str, total: float | None = None, done: int = 0, said: str | Callable[[], str] = ""
    ) -> Iterator[Callable[..., None]]:
        """A bar while `what` is under way, without a `total` one that only moves; rich's `update` of it."""
        if self.bars.disable:
            yield lambda **moved: None
            return
        task = self.bars.add_task(what, total=total, completed=done, said=said)
        self.bars.start()
        try:
            yield lambda **moved: self.bars.update(task, **moved) if task in self.bars.task_ids else None
        finally:
            self.bars.remove_task(task)
            if not self.bars.task_ids:
                self.bars.stop()

    def header(self, title: str, lines: Sequence[str]) -> None:
        """A panel of plain text, as wide as its longest line if the output is no terminal."""
        if not self.terminal.is_terminal:
            self.terminal.width = max(map(len, [title, *lines])) + 6
        self.terminal.print(
            Panel(Text("\n".join(lines)), title=Text(title), title_align="left", expand=False)
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line; the header is repeated every 20 lines."""
        if self.printed % REPEAT_HEADER == 0:
            for line in head():
                self._print(line, "bold")
        self.printed += 1
        self._print(row(step, metrics), "")
        moved = (name for name in metrics if name.startswith("control/"))
        self.control = ", ".join(f"{name.removeprefix('control/')} {metrics[name]:g}" for name in moved)
        self.training(completed=step, said=self._said())

    def hear(self, kind: str, fields: Mapping[str, Any]) -> None:
        """The last event is beside the bar of the run."""
        if kind not in ("start", "control"):
            self.last = f"last event: {kind}" + (f" at step {fields['step']}" if "step" in fields else "")
            self.training(said=self._said())

    def _said(self) -> str:
        return ", ".join(filter(None, (self.control, self.last)))

    def say(self, line: str) -> None:
        """One line between the steps."""
        self._print(line, "italic")

    def close(self) -> None:
        """Nothing to close."""

    def _print(self, line: str, style: str) -> None:
        self.terminal.print(Text(line, style), soft_wrap=True)


def head() -> tuple[str, str]:
    """The two header lines: names, units."""
    names = "".join(c.title.rjust(c.width) for c in COLUMNS)
    units = "".join(c.unit.rjust(c.width) for c in COLUMNS)
    return f"{'step':>5}{names}", f"{'':>5}{units}"


def row(step: int, metrics: Mapping[str, float | None]) -> str:
    """One step under `head`, with a dash for a metric that was not measured."""
    return f"{step:>5}" + "".join(_cell(metrics.get(c.key), c).rjust(c.width) for c in COLUMNS)


def summary(metrics: Sequence[Mapping[str, Any]]) -> str:
    """Reward and entropy over the steps of metrics.jsonl as plain text without colours, at most 24 lines."""
    curves = {title: series(metrics, key) for title, key in _SUMMARY.items()}
    measured = {title: curve for title, curve in curves.items() if curve[0]}
    if not measured:
        return "no step was measured"
    return "\n".join([_plot(measured), *(_change(*named) for named in measured.items())])


_SUMMARY = {"correct (share of answers)": "correct/mean", "entropy (nats per token)": "entropy/mean"}


def _cell(value: float | None, column: Column) -> str:
    return "-" if value is None or not math.isfinite(value) else format(value, column.form)


def _plot(curves: Mapping[str, tuple[list[int], list[float]]]) -> str:
    """The curves side by side, at most 100 characters wide and 15 lines tall."""
    import plotext  # a third of a second, once, at the end of a run

    figure = plotext.figure
    figure.clear()
    plotext.terminal.limit(False, False)
    figure.plot_size(min(100, max(60, shutil.get_terminal_size((100, 24)).columns)), 15)
    figure.subplots(1, len(curves))
    for column, (title, (steps, values)) in enumerate(curves.items(), start=1):
        panel = figure.subplot(1, column) if len(curves) > 1 else figure
        panel.draw(panel.signal(steps, values, marker="braille").lines())
        panel.title(title)
        panel.ruler(1, 0).lim(min(0.0, *values), max(0.0, *values) or 1.0)
        panel.ruler(0, 0).ticks(sorted({steps[0] + round((steps[-1] - steps[0]) * i / 4) for i in range(5)}))
    return figure.build().string(colorless=True).rstrip("\n")


def _change(title: str, curve: tuple[list[int], list[float]]) -> str:
    first, last = first_and_last(curve[1])
    change, n = last - first, min(5, len(curve[1]))
    share = f" ({abs(change / first):.1%})" if first else ""
    verb = "rose by" if change > 0 else "fell by" if change < 0 else "changed by"
    return f"{title}: {first:.4f} first {n} steps, {last:.4f} last {n}: {verb} {abs(change):.4f}{share}"
