"""Responses that the run ended early: abandoned as the slowest of their group, or stopped in a loop."""

from collections.abc import Sequence

from entroray.metrics.diversity import Loops
from entroray.roles import StepMetrics
from entroray.types import Group, Version


def abandoned_metrics(groups: Sequence[Group], judged: Sequence[Group], version: Version) -> dict[str, float]:
    """The effect of abandoning the slowest on lengths (tokens), over all groups judged.

    Abandoned responses have no final length. Each counts as long as the longest finished one of its group, so
    `early/length_drawn` is a lower bound, and the bias at least as large as `early/length_bias`.
    """
    kept = [[r.length for r in g.rollouts if not r.replayed] for g in judged]
    left = [
        [max(a.length, *lengths, 0) for a in g.abandoned] for g, lengths in zip(judged, kept, strict=True)
    ]
    finished, abandoned = [x for g in kept for x in g], [x for g in left for x in g]
    mean = sum(finished) / len(finished)
    drawn = sum(finished + abandoned) / len(finished + abandoned)
    return {
        "early/abandoned": len(abandoned) / len(finished + abandoned),
        "early/length_kept": mean,
        "early/length_drawn": drawn,
        "early/length_bias": mean / drawn - 1 if drawn else 0.0,
    }


def repetition_metrics(loops: Loops) -> StepMetrics:
    """A metric: the share of judged rollouts that end in a loop."""

    def measure(groups: Sequence[Group], judged: Sequence[Group], version: Version) -> dict[str, float]:
        drawn = [r for g in judged for r in g.rollouts if not r.replayed]
        return {"repetition/looped": sum(loops(r.token_ids) for r in drawn) / len(drawn)}

    return measure
