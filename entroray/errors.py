"""The typed ways a run can end badly; each carries the exit code of the contract (DESIGN 7)."""

import difflib
import errno
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


class EntrorayError(Exception):
    """Base of every error a user is meant to read: says what is wrong, where, and what to do instead."""

    exit_code = 1


class ConfigError(EntrorayError):
    """A setting is unknown, of the wrong type, or contradicts another."""

    exit_code = 2


class PreflightError(EntrorayError):
    """Refused before any actor started: the machine, the model or the data cannot do what was asked."""

    exit_code = 3


class InfrastructureError(EntrorayError):
    """A process, a node or a deadline was lost and could not be healed."""

    exit_code = 4


class LearnerLostError(InfrastructureError):
    """A rank of the learner died or fell silent: the run can go on from its last checkpoint."""


class SyncError(InfrastructureError):
    """Generators and learner do not hold the same weights."""


class DataError(EntrorayError):
    """Data or verifier failures above their limit."""

    exit_code = 5


class NumericsError(EntrorayError):
    """A loss, gradient or statistic is not finite."""

    exit_code = 6


class LedgerError(EntrorayError):
    """Prompts, samples or tokens are unaccounted for: a fault of the program, whose numbers would lie."""


class Stopped(EntrorayError):
    """Ended by a signal: 130 for Ctrl-C, 143 for SIGTERM."""

    def __init__(self, signal: int, message: str):
        super().__init__(message)
        self.exit_code = 128 + signal


def nearest(wrong: object, right: Iterable[str]) -> str:
    """The end of an error message: the likely meaning, then everything there is."""
    options = sorted(right)
    close = difflib.get_close_matches(str(wrong), options, n=1)
    guess = f"did you mean `{close[0]}`? " if close else ""
    return f"{guess}choose from {', '.join(options)}" if options else "it takes none"


def first_line(error: BaseException) -> str:
    """What an error says, in a line; its type if it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


MORE_ROOM = "free some space there, or put run.dir on a larger disk"


@contextmanager
def writing(place: Path, remedy: str = MORE_ROOM, needed: int = 0) -> Iterator[None]:
    """Raise InfrastructureError with the reason, the free space and `remedy` if `place` cannot be written.

    It is raised at once where less than the `needed` bytes are free. Whatever a library raises inside counts:
    torch, safetensors and Ray each hide a full disk in another type.
    """
    try:
        if needed > free_bytes(place):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        yield
    except EntrorayError:
        raise
    except Exception as error:  # boundary: what is done inside is writing, and each library has its own error
        cause = getattr(error, "cause", None) or error  # Ray's wrapping holds a traceback
        why = f"{type(cause).__name__}: {first_line(cause)}"
        asked = f", {_mib(needed)} needed" if needed else ""
        raise InfrastructureError(
            f"{place} cannot be written ({why}){asked}, {_mib(free_bytes(place))} free on its disk: {remedy}"
        ) from error


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def free_bytes(place: Path) -> int:
    """Bytes free on the disk that `place` lies on, or would; no end of them where a mount tells nothing."""
    usage = shutil.disk_usage(next(p for p in (place, *place.parents) if p.exists()))
    return usage.free if usage.free or usage.total else sys.maxsize
