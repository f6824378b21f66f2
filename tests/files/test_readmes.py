"""What the folders' README.md say of files."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
READMES = [*ROOT.glob("entroray/*/README.md"), ROOT / "tests/README.md"]
TABLED = {"rollout", "observe", "tests"}
"""Folders whose README.md has a file table; elsewhere one is welcome, and then it is complete."""
LISTED = re.compile(r"^(?:\| )?`?\w+\.py\b.*$", re.MULTILINE)
"""A line of a file table: of Markdown, or of a block set off as code."""


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.parent.name)
def test_a_file_table_names_every_module_of_its_folder(readme):
    there = {path.name for path in readme.parent.glob("*.py")} - {"__init__.py"}
    listed = {name for line in LISTED.findall(readme.read_text()) for name in re.findall(r"\w+\.py\b", line)}
    assert listed or readme.parent.name not in TABLED, "its file table is gone"
    assert not listed or there <= listed, f"not in its file table: {sorted(there - listed)}"
