"""The cells of a lab on disk: the settings and results of each, and all of them as one CSV."""

import csv
import hashlib
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from entroray.observe.journal import first_and_last, replace_text, series

TASK = ("experiment", "data", "data.task")
"""Overrides that choose the task."""
OWN = (*TASK, "objective", "seed")
WINDOW = 5
"""Steps that first, final and best are means over."""


@dataclass(frozen=True)
class Cell:
    """One run of a lab: its settings, its seed and its results."""

    overrides: tuple[str, ...]
    seed: int
    settings: str
    """Hash of the whole configuration."""
    status: str = "missing"
    """missing | done | failed"""
    reason: str = ""
    """Why the cell failed, or is to be run again."""
    exit_code: int = 0
    finished: str = ""
    """UTC."""
    code: str = ""
    """Commit that the cell ran, or the package's version without one."""
    measured: Mapping[str, float] = field(default_factory=dict)

    @property
    def task(self) -> str:
        """The task as the command line names it."""
        return " ".join(v for name in TASK if (v := self.override(name))) or "train"

    @property
    def objective(self) -> str:
        """The objective; `default` if the command leaves it to the task."""
        return self.override("objective") or "default"

    @property
    def name(self) -> str:
        """The name of its folder, readable and unique."""
        digest = hashlib.blake2b("\n".join(sorted(self.overrides)).encode(), digest_size=3).hexdigest()
        return re.sub(r"[^\w.-]+", "_", f"{self.task}-{self.objective}-seed{self.seed}-{digest}")

    def override(self, name: str) -> str:
        """The value of an override; empty if it is not given."""
        return next((o.partition("=")[2] for o in self.overrides if o.partition("=")[0] == name), "")

    @property
    def extras(self) -> frozenset[str]:
        """Overrides other than task, objective and seed."""
        return frozenset(o for o in self.overrides if o.partition("=")[0] not in OWN)


def shared_overrides(cells: Sequence[Cell]) -> list[str]:
    """The overrides that all of `cells` share, besides task, objective and seed."""
    return sorted(frozenset.intersection(*(c.extras for c in cells))) if cells else []


def variant_name(cell: Cell, cells: Sequence[Cell]) -> str:
    """The objective, and the overrides of `cell` that not all of `cells` share."""
    return " ".join([cell.objective, *sorted(cell.extras - set(shared_overrides(cells)))])


def summarise_run(metrics: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """metrics.jsonl in numbers; first, final and best are means of 5 steps, or of all if there are fewer."""
    found = {"steps": float(len(metrics))}
    for key in ("correct/mean", "entropy/mean", "varentropy/mean"):
        _, values = series(metrics, key)
        if values:
            noun = key.partition("/")[0]
            found[f"{noun}/first"], found[f"{noun}/final"] = first_and_last(values, WINDOW)
    _, reward = series(metrics, "correct/mean")
    if reward:
        found["correct/best"] = max(moving_means(reward, WINDOW))
    for key in ("tokens/per_second", "seconds/step"):
        _, values = series(metrics, key)
        if values:
            found[key] = sorted(values)[len(values) // 2]
    _, drawn = series(metrics, "tokens/drawn")
    return found | ({"tokens/drawn": drawn[-1]} if drawn else {})


def moving_means(values: Sequence[float], window: int) -> list[float]:
    """Means of every `window` neighbours; one mean of all if there are fewer."""
    window = min(window, len(values))
    return [sum(values[i : i + window]) / window for i in range(len(values) - window + 1)]


def cell_path(lab: Path, cell: Cell) -> Path:
    """The run directory of a cell."""
    return lab / "cells" / cell.name


def save_cell(lab: Path, cell: Cell) -> None:
    """Write cell.json, whole or not at all."""
    replace_text(cell_path(lab, cell) / "cell.json", json.dumps(asdict(cell), indent=1))


def load_cells(lab: Path) -> list[Cell]:
    """Every cell of this lab, by name; one whose file is damaged is left out, as if it had never run."""
    return [cell for file in cell_files(lab) if (cell := load_cell(file))]


def cell_files(lab: Path) -> list[Path]:
    """The cell.json of every cell, by name."""
    return sorted(lab.glob("cells/*/cell.json"))


def load_cell(file: Path) -> Cell | None:
    """The cell of a cell.json; None if it is empty, cut short or something else."""
    try:
        stored = json.loads(file.read_bytes())
        return Cell(**stored | {"overrides": tuple(stored["overrides"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def write_cells_csv(lab: Path, cells: Iterable[Cell]) -> Path:
    """Write cells.csv, a line for each cell; a metric that it lacks is empty."""
    rows = [_row(cell) for cell in cells]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    table = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    replace_text(lab / "cells.csv", text.getvalue())
    return lab / "cells.csv"


def _row(cell: Cell) -> dict[str, Any]:
    row = {"task": cell.task, "objective": cell.objective, "with": " ".join(sorted(cell.extras))}
    names = ("seed", "status", "reason", "finished", "code")
    return row | {name: getattr(cell, name) for name in names} | dict(cell.measured)
