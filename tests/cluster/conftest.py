"""What the tests of real clusters share."""

from pathlib import Path

import pytest

from entroray.policy.tiny_model import build_tiny_model

TINY = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 128,
    "max_position_embeddings": 512,
}


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random two-layer model."""
    folder = tmp_path_factory.mktemp("cluster-model")
    build_tiny_model(folder, TINY, seed=3)
    return folder
