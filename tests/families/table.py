"""The rows kept, printed as the table of entroray/policy/README.md: python -m tests.families.table."""

import json
from pathlib import Path
from typing import Any

from entroray.rows import conf_folder
from tests.families.models import FAMILIES

KEPT = Path(__file__).with_name("rows.json")
README = conf_folder().parent / "entroray" / "policy" / "README.md"
BEGIN, FINISH = "<!-- families -->", "<!-- end of families -->"
LIMIT = 1e-4
"""Nats that engine and learner may be apart."""


def kept() -> dict[str, dict[str, Any]]:
    """Every row that was made, by family."""
    return json.loads(KEPT.read_text()) if KEPT.exists() else {}


def keep(name: str, row: dict[str, Any]) -> None:
    """Put a row in the place of the one before."""
    rows = kept() | {name: row}
    ordered = {n: rows[n] for n in (*FAMILIES, *sorted(rows.keys() - FAMILIES.keys())) if n in rows}
    KEPT.write_text(json.dumps(ordered, indent=1) + "\n")


def complaints(row: dict[str, Any]) -> list[str]:
    """What keeps a row from training as it should."""
    wrong = [f"{key} {row[key]:.1e} nats" for key in ("sync", "mismatch") if not row[key] <= LIMIT]
    if row["ratio_max"] != 1.0:
        wrong.append(f"first ratio {row['ratio_max']}")
    if not row["moved"] > 1e-3:
        wrong.append("the update changed nothing")
    return wrong + [f"other {key} after export" for key in ("greedy", "names") if not row[key]]


def lines() -> list[str]:
    """The table in Markdown; families without a row are named below it."""
    rows = kept()
    head = [
        "| family | special | sync, nats | mismatch, nats | first ratio | export |",
        "|---|---|---|---|---|---|",
    ]
    body = [_line(name, row) for name, row in rows.items()]
    missing = [name for name in FAMILIES if name not in rows]
    said = [f"- {name}: {row['refused']}" for name, row in rows.items() if "refused" in row]
    return [
        *head,
        *body,
        "",
        f"Not run: {', '.join(missing) or 'none'}.",
        "",
        "Refused, in these words:",
        "",
        *said,
    ]


def _line(name: str, row: dict[str, Any]) -> str:
    special = FAMILIES[name].special if name in FAMILIES else row.get("special", "")
    if "refused" in row:
        why = "unproved: learner and names tested, no engine here" if row.get("unproved") else "refused"
        return f"| {name} | {special} | {why} | | | |"
    export = "same greedy tokens in both" if row["greedy"] else "other tokens"
    nats = f"{row['sync']:.1e} | {row['mismatch']:.1e}"
    return f"| {name} | {special} | {nats} | {row['ratio_max']:g} | {export} |"


def shown() -> str:
    """The README with the table of the rows that are kept."""
    before, _, rest = README.read_text().partition(BEGIN)
    _, _, after = rest.partition(FINISH)
    return "\n".join([before + BEGIN, "", *lines(), "", FINISH]) + after


if __name__ == "__main__":
    README.write_text(shown())
    print("\n".join(lines()))
