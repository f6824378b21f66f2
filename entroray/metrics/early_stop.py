"""How responses came to their end where the run chose one for them: given up, or stopped in a loop."""

from collections.abc import Sequence

from entroray.metrics.diversity import Loops
from entroray.roles import StepMetrics
from entroray.types import Group, Version


def abandoned_metrics(groups: Sequence[Group], judged: Sequence[Group], version: Version) -> dict[str, float]:
    """What taking the first to finish did to lengths, in tokens, over all groups judged.

    How long an abandoned response would have become is not known: it counts with the longest of its group
    that finished, which it had reached unless the engine had not begun it. So `early/length_drawn` is a
    lower bound of the mean over all that was drawn, and the bias is at least as large as it says.
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
    """The share of rollouts judged that end in a loop."""

    def tell(groups: Sequence[Group], judged: Sequence[Group], version: Version) -> dict[str, float]:
        drawn = [r for g in judged for r in g.rollouts if not r.replayed]
        return {"repetition/looped": sum(loops(r.token_ids) for r in drawn) / len(drawn)}

    return tell
