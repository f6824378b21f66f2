"""The typed ways a run can end badly; each carries the exit code of the contract (DESIGN 7)."""

import difflib
from collections.abc import Iterable


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


class SyncError(InfrastructureError):
    """Generators and learner do not hold the same weights."""


class DataError(EntrorayError):
    """Data or verifier failures above their limit."""

    exit_code = 5


class NumericsError(EntrorayError):
    """A loss, gradient or statistic is not finite."""

    exit_code = 6


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
    return f"{guess}choose from {', '.join(options) or 'nothing'}"


def first_line(error: Exception) -> str:
    """What an error says, or its kind, in one line."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
