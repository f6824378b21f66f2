"""How long to wait at most, from lengths and from rates below which nothing that works is."""

from typing import NamedTuple

RATE = 10.0
"""Tokens a second of one sequence, at least."""
ENGINE = 100 * RATE
"""Tokens a second of an engine, at least: a hundred sequences at once."""
RANK = 1000.0
"""Tokens a second that a rank scores or trains, at least."""
MOVED = 1e8
"""Bytes of weights a second that are read, sent or written, at least."""
STORED = 7
"""A checkpoint is less than so many times as large as its weights in bf16."""
CHECKPOINT = 12
"""Bytes of a checkpoint for each parameter that is trained: its weight and two moments in float32."""
BROADCAST = 60.0
"""Seconds for NCCL to send weights besides what their size takes, at least."""
RESPONSE, CALL, STEP = 300.0, 1800.0, 1800.0
"""Seconds at least: for a response, for a call or a start, and for a step besides its work."""


class Deadlines(NamedTuple):
    """Seconds."""

    response: float
    """From the first token of a response, or of a turn, to its last."""
    start: float
    """For an actor to start, and for weights to be read, sent or written."""
    call: float
    """For a call that scores, trains or judges."""
    step: float
    """Without a finished step."""
    checkpoint: float
    """For a checkpoint to be written or read."""


def floor_deadlines(
    longest: int, prompt: int, responses: int, evaluated: int, *, engines: int, ranks: int, weights: float
) -> Deadlines:
    """For responses of at most `longest` tokens to prompts of `prompt`, so many a step and an evaluation.

    `weights` are in bytes. A learner's longest call scores and trains a whole step. A step draws twice the
    responses it keeps, every one as long as it may be, is trained, evaluated, saved, and waits for one more.
    """
    one, start, saved = max(RESPONSE, longest / RATE), CALL + weights / MOVED, STORED * weights / MOVED
    trained = 2 * responses * (prompt + longest) / (ranks * RANK)
    drawn = (2 * responses + evaluated) * longest / (engines * ENGINE)
    return Deadlines(one, start, start + trained, STEP + drawn + trained + saved + one, CALL + saved)


def transfer_deadline(size: float) -> float:
    """Seconds in which NCCL has sent `size` bytes to all engines, gathered from all ranks on the way."""
    return BROADCAST + size / MOVED
