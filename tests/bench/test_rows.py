"""The rows of tests/bench/README.md: launch/test.sh bench ROW. A row below `wanted` is printed as a miss."""

import pytest

from tests.bench import side_by_side, table


@pytest.mark.bench
@pytest.mark.timeout(480)
@pytest.mark.parametrize("row", side_by_side.ROWS)
def test_row(row: str, capfd: pytest.CaptureFixture[str]) -> None:
    found = side_by_side.measure(row)
    side_by_side.keep(found)
    table.README.write_text(table.shown())
    with capfd.disabled():
        print("\n" + "\n".join(table.lines([found])))
