"""Every family on the real stack, a row each: `launch/test.sh families` makes the table anew."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from entroray.errors import PreflightError
from entroray.policy import families, proof
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


@pytest.mark.parametrize("name", models.COMPOSITE)
def test_a_checkpoint_of_text_and_images_is_refused(name: str) -> None:
    with pytest.raises(PreflightError) as refused:
        proof.check_architecture(name, models.composite(name))
    row = {"special": "text and images", "refused": str(refused.value)}
    table.keep(f"{name} (composite)", row | {"unproved": name in models.UNPROVED})


def test_a_window_that_engines_read_otherwise_is_refused() -> None:
    with pytest.raises(PreflightError) as refused:
        families.check_window(models.configuration("cohere2"), 513)
    table.keep("cohere2 (texts longer than its window)", {"special": "window", "refused": str(refused.value)})
