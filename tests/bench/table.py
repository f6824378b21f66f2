"""The measurements kept, printed as tests/bench/README.md: python -m tests.bench.table."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.bench.side_by_side import RESULTS, ROWS

README = Path(__file__).with_name("README.md")
BEGIN, FINISH = "<!-- rows -->", "<!-- end of rows -->"


def newest() -> list[dict[str, Any]]:
    """The last measurement of every row that has one."""
    files = {name: RESULTS / f"{name}.json" for name in ROWS}
    return [json.loads(path.read_text())[-1] for path in files.values() if path.exists()]


def lines(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """The table in Markdown, what explains each miss, and where it was measured."""
    head = [
        "| row | load | beside | tokens/s there | ours | ratio (range) | wanted (aim) | MB there, ours |",
        "|---|---|---|---|---|---|---|---|",
    ]
    missing = [name for name in ROWS if name not in {row["row"] for row in found}]
    left = ["", f"Not measured: {', '.join(missing)}."] if missing and len(found) != 1 else []
    misses = [line for row in found if ratio(row) < row["wanted"] for line in ("", _explained(row))]
    places = [_place(row) for row in found]
    return [*head, *map(_line, found), *left, *misses, "", *places]


def ratio(row: Mapping[str, Any]) -> float:
    """The median over pairs."""
    return statistics.median(row["ratios"])


def _line(row: Mapping[str, Any]) -> str:
    low, high = min(row["ratios"]), max(row["ratios"])
    aim = f" ({row['aim']:g})" if row["aim"] else ""
    said = "" if ratio(row) >= row["wanted"] else " MISS"
    return (
        f"| {row['row']} | {row['load']} | {row['against']} | {_rates(row['other'])} "
        f"| {_rates(row['ours'])} | "
        f"{ratio(row):.2f} ({low:.2f} to {high:.2f}){said} | {row['wanted']:g}{aim} | "
        f"{row['other']['memory_mb']:,}, {row['ours']['memory_mb']:,} |"
    )


def _rates(side: Mapping[str, Any]) -> str:
    rates = side["tokens_per_second"]
    return f"{statistics.median(rates):,.0f} ({min(rates):,.0f} to {max(rates):,.0f})"


def _explained(row: Mapping[str, Any]) -> str:
    """A miss, with seconds by phase of an average step of both sides."""
    sides = ((row["against"], row["other"]), ("ours", row["ours"]))
    spent = [f"{name}: {_phases(side['phases'])}" for name, side in sides]
    return (
        f"`{row['row']}` misses {row['wanted']:g} with {ratio(row):.2f}. Seconds a step: {'; '.join(spent)}."
    )


def _phases(phases: Mapping[str, float]) -> str:
    whole = {name.partition("/")[2]: value for name, value in phases.items() if name.startswith("seconds/")}
    ordered = sorted(whole.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {value:.3f}" for name, value in ordered if value >= 0.0005)


def _place(row: Mapping[str, Any]) -> str:
    ours, other = row["ours"], row["other"]
    pairs = f"{len(row['ratios'])} pairs of {ours['steps'][0]} and {other['steps'][0]} steps"
    settings = " ".join(f"'{s}'" if " " in s else s for s in ours["settings"])
    given = other["settings"]
    theirs = " ".join(given) if isinstance(given, list) else ", ".join(f"{k}={v}" for k, v in given.items())
    return (
        f"- `{row['row']}`: {row['date']}, commit {row['commit']}, {row['machine']}, {pairs}, "
        f"{row['minutes']:g} minutes. Ours: `{settings}`. Beside: `{theirs}`."
    )


def shown() -> str:
    """The README with the table of what is kept."""
    before, _, rest = README.read_text().partition(BEGIN)
    _, _, after = rest.partition(FINISH)
    return "\n".join([before + BEGIN, "", *lines(newest()), "", FINISH]) + after


if __name__ == "__main__":
    README.write_text(shown())
    print("\n".join(lines(newest())))
