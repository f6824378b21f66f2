"""`tests/public_cases.tsv`: bugs that users of such systems met, and the test that keeps each one mended."""

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "tests" / "public_cases.tsv"
COLUMNS = ("case", "met by", "what must be true", "test")


@cache
def functions(file: str) -> set[str]:
    tree = ast.parse((ROOT / file).read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def test_every_case_names_a_test_that_there_is():
    header, *rows = [tuple(line.split("\t")) for line in TABLE.read_text().splitlines()]
    assert header == COLUMNS and all(len(row) == len(COLUMNS) and all(row) for row in rows)
    missing = []
    for case, _, _, test in rows:
        file, _, name = test.partition("::")
        if not (ROOT / file).is_file() or name.partition("[")[0] not in functions(file):
            missing.append(f"{case}: {test}")
    assert not missing
