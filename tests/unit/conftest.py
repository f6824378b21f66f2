"""What keeps two processes of unit tests quick: a thread each, and no walks over what is there for good."""

import gc
import os
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; two wait for each other
gc.disable()

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

from entroray.reward.programs import Programs  # noqa: E402

settings.register_profile("any machine", deadline=None)  # a first example may import for seconds
settings.load_profile("any machine")


def pytest_collection_finish() -> None:
    """All that is imported stays, so the collector need not look at it again."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def programs() -> Iterator[Programs]:
    """Runs judged programs, with all the layers that the machine has."""
    started = Programs()
    yield started
    started.close()
