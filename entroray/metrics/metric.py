"""One metric: what is said of it, and which names are its own."""

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

TOKENS, ROLLOUTS, GROUPS = "tokens", "rollouts", "groups"
SAMPLING, ANY = "sampling", "-"


class Metric(NamedTuple):
    """One row of the page.

    In a name `<1,2>` stands for one of these, `<n>` for a number, `<d>` for a part of a mixture, `<rule>`
    for a rule of the objective, `<part>` for a part of a verdict and `<name>` for a controller.
    """

    name: str
    definition: str
    unit: str
    over: str
    temperature: str
    estimator: str


def rows(over: str, temperature: str, *lines: str) -> list[Metric]:
    """Rows `name | definition | unit | estimator` that share what they are over and their temperature."""
    cut = [[part.strip() for part in line.split("|")] for line in lines]
    return [Metric(name, said, unit, over, temperature, how) for name, said, unit, how in cut]


def expand_names(metric: Metric, fills: Mapping[str, Sequence[str]]) -> list[str]:
    """Every name of a metric where `fills` says what `<n>` and its like may be; none of nothing."""
    given = [fills.get(p, _listed(p)) if p.startswith("<") else [p] for p in _parts(metric.name)]
    return ["".join(chosen) for chosen in itertools.product(*given)]


def _parts(name: str) -> list[str]:
    """What stands as it is, and in turn what something stands for."""
    return re.split("(<[^>]+>)", name)


def _listed(part: str) -> list[str]:
    return part[1:-1].split(",")
