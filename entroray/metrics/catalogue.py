"""The catalogue of metrics, catalogue.tsv, as rows; the tables of README.md are made from it.

`python -m entroray.metrics.catalogue` writes these tables again.
"""

import csv
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import cache
from pathlib import Path

PAGE, FILE = Path(__file__).with_name("README.md"), Path(__file__).with_name("catalogue.tsv")
FAMILIES: dict[str, str] = json.loads(FILE.with_name("families.json").read_text(encoding="utf-8"))
"""Titles of the page; a run writes every family but the last to metrics.jsonl."""


@dataclass(frozen=True)
class Metric:
    """One row; `name` may hold `<1,2>` for one of these, and `<n>`, `<d>`, `<set>`, `<rule>`, ..."""

    name: str
    family: str
    definition: str
    unit: str
    over: str
    temperature: str
    estimator: str


@cache
def read_catalogue() -> tuple[Metric, ...]:
    """Every metric, in the order of the page."""
    with FILE.open(encoding="utf-8", newline="") as file:
        return tuple(Metric(**row) for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def family_metrics(*families: str) -> list[Metric]:
    """The metrics of `families`; KeyError for one that is not in `FAMILIES`."""
    titles = {name: FAMILIES[name] for name in families}
    return [m for m in read_catalogue() if m.family in titles]


def expand_names(metric: Metric, fills: Mapping[str, Sequence[str]]) -> list[str]:
    """Every name of a metric; `fills` gives what `<n>` and other words stand for."""
    parts = re.split("(<[^>]+>)", metric.name)
    given = [fills.get(p, p[1:-1].split(",")) if p.startswith("<") else [p] for p in parts]
    return ["".join(chosen) for chosen in itertools.product(*given)]


def render_page(page: str) -> str:
    """README.md with its tables made again; the prose above the first table stays as it is in `page`."""
    head = "| metric | definition | unit | over | temperature | estimator |\n|---|---|---|---|---|---|\n"
    text = page.partition("\n## ")[0]
    for title, rows in itertools.groupby(read_catalogue(), lambda m: FAMILIES[m.family]):
        lines = (f"| `{m.name}` | {' | '.join(astuple(m)[2:])} |\n" for m in rows)
        text += f"\n## {title}\n\n{head}{''.join(lines)}"
    return text


if __name__ == "__main__":
    PAGE.write_text(render_page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
