"""What engines say that they serve: a version, and which attempt of the run made its weights.

A run whose learner was lost makes a version 7 once more: stamps of two attempts are never the same, and an
engine takes nothing from an attempt before the one it serves, such as of a rank beyond a network's cut.
"""

from entroray.errors import SyncError
from entroray.types import Version

STRIDE = 10**9
"""More than a run has versions."""


def stamp_version(attempt: int, version: Version) -> int:
    """As vLLM's label of the weights has it: attempt 0 has the version itself."""
    return attempt * STRIDE + version


def version_of(stamp: int | str) -> Version:
    """The version in a stamp, whatever attempt made it."""
    return int(stamp) % STRIDE


def check_attempt(served: int | str, offered: int) -> None:
    """SyncError where `offered` weights are of an attempt that those `served` have ended."""
    if offered // STRIDE < int(served) // STRIDE:
        raise SyncError(
            f"weights of version {version_of(offered)} come from attempt {offered // STRIDE} of the run, "
            f"which attempt {int(served) // STRIDE} has ended: they are not loaded"
        )
