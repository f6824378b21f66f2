"""The page of faults is what its rows print, and it hides none that has no row."""

import re
import time
from pathlib import Path

import pytest

from tests.faults import table
from tests.faults.record import Fault

NUMBERS = [row["fault"] for row in table.read(table.FAULTS)]


def row(**changes: str) -> dict[str, str]:
    told = dict.fromkeys(table.COLUMNS, "x") | {"fault": "F07", "seconds": "60", "verdict": "held"}
    return told | changes


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty file of rows."""
    monkeypatch.setattr(table, "KEPT", tmp_path / "results.tsv")
    return tmp_path / "results.tsv"


def test_the_page_is_what_the_kept_rows_print() -> None:
    assert table.README.read_text() == table.shown()


def test_every_fault_has_its_number_and_every_marker_names_one() -> None:
    assert [f"F{n:02}" for n in range(1, 49)] == NUMBERS
    sources = "".join(path.read_text() for path in table.HERE.glob("test_*.py"))
    named = set(re.findall(r'"(F\d\d)"', sources))
    assert named and named <= {*NUMBERS}
    gone = {
        row["test"]
        for row in table.read(table.KEPT)
        if f"def {row['test'].partition('[')[0]}(" not in sources
    }
    assert not gone, "take its row out of results.tsv"


def test_a_fault_without_a_row_is_printed_as_missing_and_one_that_failed_as_failed(kept: Path) -> None:
    table.keep(row(verdict="FAILED", date="2026-11-27", commit="abc"))
    lines = table.lines()
    assert "| F07 | x | x | x | x | x | 2026-11-27, abc, FAILED |" in lines
    assert sum("MISSING" in line for line in lines) == 47
    assert "1 of 48 faults have a row; 0 of 1 rows held, in 1 minutes." in lines
    assert any(line.startswith("Missing: F01, ") and line.endswith("Failed: F07.") for line in lines)


def test_a_row_takes_the_place_of_the_one_before_of_its_test(kept: Path) -> None:
    for told in (row(test="a", lost="old\ttext"), row(test="b"), row(test="a", lost="new\n text")):
        table.keep(told)
    assert [(r["test"], r["lost"]) for r in table.read(kept)] == [("a", "new text"), ("b", "x")]


def test_what_happened_is_not_told_before_the_fault_was_seen_to_fire() -> None:
    fault = Fault("F01", "SIGKILL", "test")
    with pytest.raises(AssertionError, match="F01: nothing has shown that the fault fired"):
        fault.saw("engine_lost")
    fault.fired("process 7 is gone")
    time.sleep(0.1)
    fault.saw("engine_lost")
    fault.goes_on("engine_joined", after=2.0)
    told = fault.row(held=True, commit="abc")
    assert (told["detected"], told["healed"]) == ("0.1 s: engine_lost", "2.0 s: engine_joined")
    assert (told["lost"], told["verdict"]) == ("nothing", "held")
