"""Counts of one optimizer update, all ranks together -> what the loss's numerator is divided by."""

from entroray.binding import Count, declare
from entroray.types import Counts


def all_response_tokens(counts: Counts) -> float:
    """Dropping tokens by `scales` leaves the step size of the others alone (DAPO, arXiv 2503.14476).

    `response tokens of the update`
    """
    return float(counts.tokens)


@declare(counts_kept=True)
def kept_tokens(counts: Counts) -> float:
    """Dropping tokens by `scales` enlarges the others' step (80/20, arXiv 2506.01939).

    `response tokens of the update whose scale is not 0`
    """
    return float(counts.kept_tokens)


def rollouts(counts: Counts) -> float:
    """A mean over rollouts (GRPO, arXiv 2402.03300).

    `rollouts of the update`
    """
    return float(counts.rollouts)


def prompts(counts: Counts) -> float:
    """A mean over prompts.

    `prompts of the update`
    """
    return float(counts.prompts)


def constant(counts: Counts, *, length: Count) -> float:
    """A fixed length, so that long answers are not diluted (Dr. GRPO, arXiv 2503.20783: 3000 tokens).

    `length tokens × rollouts of the update`
    verl defaults to the batch's padded width, which varies; here it must be stated.
    """
    return float(length * counts.rollouts)
