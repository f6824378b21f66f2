"""Two families as unlike as there are; `launch/test.sh families` runs all of them."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.families import models, table
from tests.families.trial import Trial


@pytest.fixture(scope="module")
def trial(local_ray: None) -> Iterator[Trial]:
    shared = Trial()
    yield shared
    shared.end()


@pytest.mark.parametrize("name", models.FEW)
def test_a_family_is_sampled_trained_and_exported_exactly(trial: Trial, name: str, tmp_path: Path) -> None:
    """Softcap and window; dropout and another body."""
    assert not table.complaints(trial.run(name, models.write(name, tmp_path / name)))
