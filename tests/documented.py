"""Whether a metric that something measured is one of the catalogue's."""

import re
from collections.abc import Iterable

from entroray.metrics.catalogue import FAMILIES, Metric, family_metrics

FILLED = {
    **{"<n>": r"\d+", "<d>": r"[^:]+", "<set>": r"[^:]+"},
    **{"<rule>": r"\w+", "<part>": r".+", "<name>": r".+"},
}
"""What may stand in a name, as a regular expression."""
CHOSEN = family_metrics("prompts", "second", "early", "repetition", "replay")
"""What is measured of how prompts and groups are chosen."""
IN_A_RUN = family_metrics(*(FAMILIES.keys() - {"evaluation"}))
"""What may stand in metrics.jsonl."""


def matches(name: str, metrics: Iterable[Metric]) -> bool:
    """Whether `name` is one of `metrics`, what may stand in their names filled in."""
    return any(re.fullmatch(_spelt(m.name), name) for m in metrics)


def _spelt(name: str) -> str:
    parts = re.split("(<[^>]+>)", name)
    return "".join(_filled(p) if p.startswith("<") else re.escape(p) for p in parts)


def _filled(part: str) -> str:
    return FILLED.get(part) or f"({part[1:-1].replace(',', '|')})"
