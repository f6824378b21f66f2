"""One metric: what is said of it, and which names are its own."""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

TOKENS, ROLLOUTS, GROUPS = "tokens", "rollouts", "groups"
SAMPLING, ANY = "sampling", "-"
STANDS = {"<n>": r"\d+", "<d>": r"[^:]+", "<rule>": r"\w+", "<name>": r".+"}
"""What may stand in a name: a number, a part of a mixture, a rule of the objective, a controller."""


class Metric(NamedTuple):
    """One row: in a name `<n>` stands for a number, `<1,2>` for one of these, and STANDS for the rest."""

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


def matches(name: str, metrics: Iterable[Metric]) -> bool:
    """Whether `name` is one of `metrics`, what may stand in their names filled in."""
    return any(re.fullmatch(_spelt(m.name), name) for m in metrics)


def names(metric: Metric, fills: Mapping[str, Sequence[str]]) -> list[str]:
    """Every name of a metric where `fills` says what there is of each of STANDS; none of nothing."""
    given = [fills.get(p, _listed(p)) if p.startswith("<") else [p] for p in _parts(metric.name)]
    return ["".join(chosen) for chosen in itertools.product(*given)]


def _spelt(name: str) -> str:
    stand = lambda p: STANDS.get(p) or f"({'|'.join(_listed(p))})"
    return "".join(stand(p) if p.startswith("<") else re.escape(p) for p in _parts(name))


def _parts(name: str) -> list[str]:
    """What stands as it is, and in turn what something stands for."""
    return re.split("(<[^>]+>)", name)


def _listed(part: str) -> list[str]:
    return part[1:-1].split(",")
