"""Every family on the real stack, a row each: `launch/test.sh families` makes the table anew."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from entroray.workers import cluster
from tests.families import models, table
from tests.families.trial import Trial

pytestmark = [pytest.mark.families, pytest.mark.ray]


@pytest.fixture(scope="module")
def trial() -> Iterator[Trial]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_WAIT_POLICY", "PASSIVE")
        cluster.start(None, cpu_only=True)
        shared = Trial()
        yield shared
        shared.end()
        cluster.stop()


@pytest.mark.parametrize("name", models.FAMILIES)
def test_a_family_is_sampled_trained_and_exported_exactly(trial: Trial, name: str, tmp_path: Path) -> None:
    row = trial.run(name, models.write(name, tmp_path / name))
    table.keep(name, row)
    assert not table.complaints(row)
