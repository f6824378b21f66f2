"""How long to wait at most, from lengths and from rates below which nothing that works is."""

from dataclasses import dataclass

RATE = 10.0
"""Tokens a second of one sequence, at least."""
SEQUENCES = 100
"""That an engine draws at once at that rate, at least."""
RANK = 1000.0
"""Tokens a second that a rank scores or trains, at least."""
MOVED = 1e8
"""Bytes of weights a second that are read, sent or written, at least."""
RESPONSE, CALL, STEP = 300.0, 1800.0, 1800.0
"""Seconds at least: for a response, for a call or a start, and for a step besides its work."""


@dataclass(frozen=True)
class Work:
    """What decides how long a run's waits may be; its sizes are upper bounds."""

    longest: int
    """Tokens of a response."""
    responses: int
    """Of a step."""
    evaluated: int
    """Responses of an evaluation."""
    read: int
    """Tokens of a prompt and its response."""
    engines: int
    ranks: int
    weights: float
    """Bytes; 0 where the model is not here yet."""


@dataclass(frozen=True)
class Deadlines:
    """Seconds."""

    response: float
    """From the first token of a response, or of a turn, to its last."""
    start: float
    """For an actor to start, and for weights to be read, sent or written."""
    call: float
    """For a call that scores, trains or judges."""
    step: float
    """Without a finished step."""


def deadlines(
    work: Work, response: float | None = None, call: float | None = None, step: float | None = None
) -> Deadlines:
    """Those that are given, and the others at the floor rates.

    A learner's longest call scores and trains a whole step. A step draws twice the responses it keeps, every
    one as long as it may be, is trained and evaluated, and waits for one response more.
    """
    one = response or max(RESPONSE, work.longest / RATE)
    trained = 2 * work.responses * work.read / (work.ranks * RANK)
    start = CALL + work.weights / MOVED
    drawn = (2 * work.responses + work.evaluated) * work.longest / (work.engines * SEQUENCES * RATE)
    return Deadlines(one, call or start, call or start + trained, step or STEP + drawn + trained + one)
