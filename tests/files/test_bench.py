"""The page of the benchmarks is what its measurements print."""

from pathlib import Path

import pytest

from tests.bench import table
from tests.bench.side_by_side import ROWS

SCRIPTS = [
    path
    for path in sorted(Path(table.__file__).parent.glob("*.py"))
    if path.name not in ("models.py", "reward.py", "side_by_side.py", "test_rows.py")
]
"""Without what those are made of."""
SIDE = {"tokens_per_second": [100.0, 110.0, 120.0], "steps": [4, 4, 4], "memory_mb": 1234}
FOUND = {
    "row": "fixed_64",
    "load": ROWS["fixed_64"].load(),
    "against": "TRL 1.16.0",
    "wanted": 1.0,
    "aim": 1.3,
    "ratios": [0.9, 0.7, 0.8],
    "minutes": 4.0,
    "date": "2026-11-27",
    "commit": "abcdefg",
    "machine": "2 cores",
    "ours": SIDE | {"phases": {"seconds/update": 1.25, "seconds/sample": 2.5}, "settings": ["a=1"]},
    "other": SIDE | {"phases": {"seconds/step": 3.0}, "settings": {"b": 2}},
}


def test_the_page_is_what_is_kept_prints():
    assert table.README.read_text() == table.shown()


def test_a_miss_is_printed_as_one_with_the_phases_that_explain_it():
    printed = "\n".join(table.lines([FOUND]))
    assert (
        "| 110 (100 to 120) | 110 (100 to 120) | 0.80 (0.70 to 0.90) MISS | 1 (1.3) | 1,234, 1,234 |"
        in printed
    )
    spent = "TRL 1.16.0: step 3.000; ours: sample 2.500, update 1.250."
    assert f"`fixed_64` misses 1 with 0.80. Seconds a step: {spent}" in printed
    met = FOUND | {"ratios": [1.0, 1.2, 0.9]}
    assert "MISS" not in "\n".join(table.lines([met])) and "misses" not in "\n".join(table.lines([met]))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_the_page_names_every_script_that_is_run_by_hand(script):
    assert script.stem in table.README.read_text()
