"""One local Ray for the whole folder, and one tiny model."""

import asyncio
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from entroray.config import ModelSize
from entroray.policy.tiny_model import build_tiny_model
from entroray.types import Batch

TINY = ModelSize(layers=2, width=64, heads=2, kv_heads=1, mlp=128, context=512)


def pytest_collection_modifyitems(items: list[Any]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.ray)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A randomly initialised two-layer model with a tied head, as the embedded one has."""
    folder = tmp_path_factory.mktemp("model")
    build_tiny_model(folder, TINY, seed=3)
    return str(folder)


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    from entroray.workers import cluster

    cluster.start(None, cpu_only=True)
    yield
    cluster.stop()


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(coroutine)


def random_batch(rows: int, seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, 24, (2, rows)).astype(np.int32)
    ids = lambda n: rng.integers(0, 250, n).astype(np.int32)
    ones = np.ones(rows, dtype=np.float32)
    return Batch(ids(lengths[0].sum()), lengths[0], ids(lengths[1].sum()), lengths[1], ones)
