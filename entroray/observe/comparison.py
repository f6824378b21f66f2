"""Tables of a lab: a mean and an interval over seeds, and whether it differs from the baseline's."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml

from entroray.metrics.confidence_interval import bootstrap_interval
from entroray.observe.lab_cells import Cell, shared_overrides, variant_name

MINIMUM_SEEDS = 3
"""Seeds from which a difference is claimed."""
BEFORE = "before training"
OLDER = "measured with older settings, to be run again"
"""Reason of a done cell that is to be run again and has not begun."""


class Column(NamedTuple):
    """A measured quantity as tables show it."""

    key: str
    title: str
    form: str
    meaning: str


TEXTS = yaml.safe_load(Path(__file__).with_name("comparison.yaml").read_text(encoding="utf-8"))
PARTS = {part: tuple(Column(**column) for column in columns) for part, columns in TEXTS["parts"].items()}
LEGEND: str = TEXTS["legend"]


@dataclass(frozen=True)
class Entry:
    """One quantity of one variant."""

    values: tuple[float, ...]
    sign: str
    """+ | - | = | ?, empty for the baseline itself."""

    def text(self, form: str, done: int) -> str:
        """`mean [low high] n=... sign` or a dash; no interval below 3 seeds, no n if all `done` have it."""
        if not self.values:
            return "-"
        parts = [format(float(np.mean(self.values)), form)]
        if len(self.values) >= MINIMUM_SEEDS:
            low, high = bootstrap_interval(self.values)
            parts.append(f"[{low:{form}} {high:{form}}]")
        if done and len(self.values) != done:
            parts.append(f"n={len(self.values)}")
        return " ".join([*parts, self.sign]).strip()


@dataclass(frozen=True)
class Row:
    """One variant on one task."""

    name: str
    done: int
    cells: int
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class Table:
    """Every variant of one task by the columns of one of `PARTS`."""

    task: str
    settings: str
    """Overrides that all of its cells share."""
    part: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]

    @property
    def title(self) -> str:
        return f"{self.task}: {self.part}{f' ({self.settings})' if self.settings else ''}"


def compare_means(values: tuple[float, ...], baseline: tuple[float, ...]) -> str:
    """+ above the baseline's interval, - below, = overlapping (a tie), ? too few seeds."""
    if min(len(values), len(baseline)) < MINIMUM_SEEDS:
        return "?"
    (low, high), (floor, ceiling) = bootstrap_interval(values), bootstrap_interval(baseline)
    return "+" if low > ceiling else "-" if high < floor else "="


def tasks(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """Cells by task, in their order."""
    found: dict[str, list[Cell]] = {}
    for cell in cells:
        found.setdefault(cell.task, []).append(cell)
    return found


def variants(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """Cells of one task by variant, in their order."""
    found: dict[str, list[Cell]] = {}
    for cell in cells:
        found.setdefault(variant_name(cell, cells), []).append(cell)
    return found


def tables(cells: Sequence[Cell], baseline: str) -> list[Table]:
    """A table for each of `PARTS` of every task; `baseline` names a variant."""
    return [
        _table(part, of_task, tuple(_with_largest_k(c, of_task) for c in columns), baseline)
        for of_task in tasks(cells).values()
        for part, columns in PARTS.items()
    ]


def _table(part: str, cells: Sequence[Cell], columns: tuple[Column, ...], baseline: str) -> Table:
    named = variants(cells)
    reference = {c.key: _values(named.get(baseline, []), c.key) for c in columns}
    rows = [_row(name, runs, columns, reference, name == baseline) for name, runs in named.items()]
    return Table(
        cells[0].task, ", ".join(shared_overrides(cells)), part, columns, (*_before(named, columns), *rows)
    )


def _before(named: Mapping[str, Sequence[Cell]], columns: Sequence[Column]) -> list[Row]:
    """A row for the first weights, or one for each set of variants with the same numbers.

    Their numbers differ if a sweep changes the model, the prompts or the temperature.
    """
    found: dict[tuple[str, ...], tuple[tuple[Entry, ...], list[str]]] = {}
    for name, cells in named.items():
        entries = tuple(_before_training(cells, c.key) for c in columns)
        if any(e.values for e in entries):
            shown = tuple(e.text(c.form, 0) for e, c in zip(entries, columns, strict=True))
            found.setdefault(shown, (entries, []))[1].append(name)
    which = lambda names: f": {', '.join(names)}" if len(found) > 1 else ""
    return [Row(BEFORE + which(names), 0, 0, entries) for entries, names in found.values()]


def _row(
    name: str,
    cells: Sequence[Cell],
    columns: Sequence[Column],
    reference: Mapping[str, tuple[float, ...]],
    is_baseline: bool,
) -> Row:
    found = {c.key: _values(cells, c.key) for c in columns}
    signs = {key: "" if is_baseline else compare_means(v, reference[key]) for key, v in found.items()}
    entries = tuple(Entry(found[c.key], signs[c.key]) for c in columns)
    return Row(name, sum(c.status == "done" for c in cells), len(cells), entries)


def _values(cells: Sequence[Cell], key: str) -> tuple[float, ...]:
    return tuple(c.measured[key] for c in cells if c.status == "done" and key in c.measured)


def _before_training(cells: Sequence[Cell], key: str) -> Entry:
    """The first weights of a variant: one model, so one value for all seeds."""
    known = _values(cells, key.replace("after/", "before/")) if key.startswith("after/") else ()
    return Entry(known[:1], "")


def _with_largest_k(column: Column, cells: Sequence[Cell]) -> Column:
    """The column pass@k with the largest k that was measured."""
    if not column.key.endswith("@k"):
        return column
    ks = {
        int(name.rpartition("@")[2]) for c in cells for name in c.measured if name.startswith("after/pass@")
    }
    k = max(ks, default=1)
    return column._replace(key=f"after/pass@{k}", title=f"pass@{k}")


def name_run(cell: Cell, of_task: Mapping[str, Sequence[Cell]]) -> str:
    """Task, variant and seed of a cell; `of_task` are the cells by task."""
    return f"{cell.task}, {variant_name(cell, of_task[cell.task])}, seed {cell.seed}"


def missing_lines(cells: Sequence[Cell]) -> list[str]:
    """A line for each cell that is missing, failed, or measured with older settings."""
    name = lambda c: name_run(c, tasks(cells))
    lines = [f"missing: {name(c)}" for c in cells if c.status == "missing"]
    lines += [f"failed: {name(c)}: {c.reason}" for c in cells if c.status == "failed"]
    return lines + [f"{c.reason}: {name(c)}" for c in cells if c.status == "done" and c.reason]


def code_lines(cells: Sequence[Cell]) -> list[str]:
    """A line if the done cells ran more than one version of the code."""
    found = Counter(c.code for c in cells if c.status == "done")
    counts = ", ".join(f"{count} of {name}" for name, count in found.most_common())
    return [f"more than one version of the code: {counts} (done cells)"] if len(found) > 1 else []


def grid(table: Table) -> list[list[str]]:
    """The table as text, its head first."""
    head = ["", "seeds", *(c.title for c in table.columns)]
    return [head, *([row.name, _seeds(row), *_texts(row, table.columns)] for row in table.rows)]


def _seeds(row: Row) -> str:
    return "" if not row.cells else str(row.done) if row.done == row.cells else f"{row.done} of {row.cells}"


def _texts(row: Row, columns: Sequence[Column]) -> list[str]:
    return [entry.text(c.form, row.done) for entry, c in zip(row.entries, columns, strict=True)]


def markdown(cells: Sequence[Cell], baseline: str) -> str:
    """The whole comparison as Markdown."""
    parts = [f"Baseline: `{baseline}`. {LEGEND}"]
    for table in tables(cells, baseline):
        head, *rows = grid(table)
        lines = [head, ["---"] * len(head), *rows]
        parts.append(f"### {table.title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))
    if lacking := [*missing_lines(cells), *code_lines(cells)]:
        parts.append("\n".join(f"- {line}" for line in lacking))
    parts += [
        f"{part.capitalize()}: " + "; ".join(f"{c.title}, {c.meaning}" for c in PARTS[part]) + "."
        for part in PARTS
    ]
    return "\n\n".join(parts) + "\n"
