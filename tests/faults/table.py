"""The rows kept, printed as the table of tests/faults/README.md: python -m tests.faults.table."""

import csv
import fcntl
import hashlib
import subprocess
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
FAULTS, KEPT, README = HERE / "faults.tsv", HERE / "results.tsv", HERE / "README.md"
COLUMNS = (
    *("fault", "test", "injected", "witness", "detected", "healed", "lost", "verdict", "seconds"),
    *("date", "commit"),
)
BEGIN, FINISH = "<!-- faults -->", "<!-- end of faults -->"
Row = dict[str, str]


def read(file: Path) -> list[Row]:
    """The rows of a table of ours; none if there is no file."""
    if not file.exists():
        return []
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))


def keep(row: Row) -> None:
    """Put a row in the place of the one before of the same test."""
    plain = {name: " ".join(row[name].split()) for name in COLUMNS}
    with FAULTS.open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two halves of a table may run at once
        kept = [each for each in read(KEPT) if each["test"] != row["test"]]
        rows = sorted([*kept, plain], key=lambda each: (each["fault"], each["test"]))
        lines = ["\t".join(COLUMNS), *("\t".join(each[name] for name in COLUMNS) for each in rows)]
        beside = KEPT.with_suffix(".part")
        beside.write_text("\n".join(lines) + "\n")
        beside.rename(KEPT)


def lines() -> list[str]:
    """The table in Markdown, a line for each row and for each fault that has none, and what is missing."""
    rows, faults = read(KEPT), read(FAULTS)
    head = [
        "| fault | injected | it fired | detected after | healed after | lost | run |",
        "|---|---|---|---|---|---|---|",
    ]
    body = [line for fault in faults for line in _lines_of(fault, rows)]
    missing = [fault["fault"] for fault in faults if not _rows_of(fault, rows)]
    failed = [row["fault"] for row in rows if row["verdict"] != "held"]
    rows_held = sum(row["verdict"] == "held" for row in rows)
    total = [
        f"{len(faults) - len(missing)} of {len(faults)} faults have a row; {rows_held} of {len(rows)} rows "
        f"held, in {sum(int(row['seconds']) for row in rows) / 60:.0f} minutes.",
        f"Missing: {', '.join(missing) or 'none'}. Failed: {', '.join(failed) or 'none'}.",
    ]
    left = [f"- {f['fault']}, {f['what']}: {f['left']}." for f in faults if f["left"]]
    return [*head, *body, "", *total, "", "Not covered on the CPU lane yet, or never:", "", *left]


def _rows_of(fault: Row, rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["fault"] == fault["fault"]]


def _lines_of(fault: Row, rows: Sequence[Row]) -> list[str]:
    found = [_line(row) for row in _rows_of(fault, rows)]
    return found or [f"| {fault['fault']} | {fault['what']} | MISSING | | | | |"]


def _line(row: Row) -> str:
    run = f"{row['date']}, {row['commit']}" + ("" if row["verdict"] == "held" else ", FAILED")
    cells = [row[name] for name in ("fault", "injected", "witness", "detected", "healed", "lost")]
    return "| " + " | ".join(cell.replace("|", "\\|") or "-" for cell in [*cells, run]) + " |"


def shown() -> str:
    """The README with the table of the rows that are kept."""
    before, _, rest = README.read_text().partition(BEGIN)
    _, _, after = rest.partition(FINISH)
    return "\n".join([before + BEGIN, "", *lines(), "", FINISH]) + after


def commit() -> str:
    """Of this checkout, marked where what is tested differs from it."""
    git = lambda *asked: subprocess.run(
        ["git", "-C", str(ROOT), *asked], capture_output=True, text=True, timeout=30, check=False
    ).stdout.strip()
    changed = git("status", "--porcelain", "--", "entroray", "conf", "tests/faults/*.py")
    return (git("rev-parse", "--short", "HEAD") or "no git") + ("-dirty" if changed else "")


def source() -> str:
    """Of all code that a row runs: rows of an interrupted table are gone on from while it is the same."""
    found = hashlib.sha256()
    for path in sorted([*ROOT.glob("entroray/**/*.py"), *HERE.glob("*.py")]):
        found.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return found.hexdigest()[:16]


if __name__ == "__main__":
    README.write_text(shown())
    print("\n".join(lines()))
