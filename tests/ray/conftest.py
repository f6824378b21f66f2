"""One cache of warm-started models for the whole folder, and a model whose distributions differ."""

from pathlib import Path
from typing import Any

import pytest

from entroray.policy.tiny_model import build_tiny_model
from tests.conftest import TINY


def pytest_collection_modifyitems(items: list[Any]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.ray)


@pytest.fixture(scope="session", autouse=True)
def one_cache(cache: Path) -> None:
    """`cache`, for every test here."""


@pytest.fixture(scope="session")
def peaked(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A fixed random model whose distributions differ in entropy: its last norm is turned up."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("peaked")
    build_tiny_model(folder, TINY, seed=3)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] *= 8
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)
