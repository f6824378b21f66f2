"""Every test here reads a clock: launch/test.sh runs this folder in one process, beside nothing else."""

from pathlib import Path
from typing import Any

import pytest


def pytest_collection_modifyitems(items: list[Any]) -> None:
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.ray)


@pytest.fixture(scope="session", autouse=True)
def one_cache(cache: Path) -> None:
    """`cache`, for every test here."""
