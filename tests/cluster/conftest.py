"""What the tests of real clusters share."""

from pathlib import Path

import pytest

from entroray.policy.tiny_model import build_tiny_model
from tests.conftest import TINY


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random two-layer model."""
    folder = tmp_path_factory.mktemp("cluster-model")
    build_tiny_model(folder, TINY, seed=3)
    return folder
