"""What keeps two processes of unit tests quick: a thread each, and no walks over what is there for good."""

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; two wait for each other
gc.disable()

from hypothesis import settings  # noqa: E402

settings.register_profile("any machine", deadline=None)  # a first example may import for seconds
settings.load_profile("any machine")


def pytest_collection_finish() -> None:
    """All that is imported stays, so the collector need not look at it again."""
    gc.freeze()
    gc.enable()
