"""Whether a step is scored before its update: only if something reads what scoring gives (`Traits.reads`)."""

from dataclasses import replace
from functools import partial

import torch

from entroray.binding import COLUMNS, function_name, traits
from entroray.objective.masking import masked_in, scatter_masked
from entroray.objective.objective import PROMISES, Objective, before, function_needs, live_shapes
from entroray.types import Tokens

OWN_OLD = frozenset({"old_logprobs"})
"""What a correction may read and still be made inside the update, whose first forward pass gives it."""


def why_scored(objective: Objective, updates: int = 1, extra: tuple[str, ...] = ()) -> str:
    """What needs the scores of a step before its update; empty if nothing does.

    `extra` are statistics asked for beside the objective's. A second update needs those that the first began
    with. Counts come from masks and scales: what sets them is named if it reads a score.
    """
    readers = [f"`{name}` ({', '.join(sorted(read))})" for name, read in scores_read(objective).items()]
    if updates > 1:
        readers.append(f"learner.updates_per_rollout={updates}")
    if extra:
        readers.append("the prediction of this step (observe.prediction)")
    return ", ".join(readers)


def scores_read(objective: Objective) -> dict[str, frozenset[str]]:
    """Function -> the columns of scores that it reads before the update, for those that read any."""
    o = objective
    inside = (o.ratio, o.surrogate, *o.penalties)
    statistics = [partial(fn) for choice in inside for fn in before(choice).values()]
    correction = [] if corrects_inside(o.correction) else [o.correction]
    shown = [c for c in (o.select, *o.scales, *correction, *statistics) if traits(c).neutral is not True]
    live = live_shapes(o.shapes) if shown else []  # applied before the update only for these to see
    choices = [*(s for s in o.shapes if not traits(s).live), *live, *shown]
    return {function_name(choice): read for choice in choices if (read := _reads(choice))}


def _reads(choice: partial) -> frozenset[str]:
    """Columns of scores, and statistics of the vocabulary; all columns where nothing is declared."""
    declared = traits(choice).reads
    return (COLUMNS if declared is None else declared) | (function_needs(choice) - PROMISES)


def corrects_inside(correction: partial) -> bool:
    """Whether a correction is made inside the update: it reads old log-probs alone, row by row."""
    return _reads(correction) == OWN_OLD and "whole_step" not in traits(correction).needs


@torch.no_grad()
def corrected(objective: Objective, t: Tokens) -> Tokens:
    """`t` with the correction that its old log-probs give; unchanged if that is made before the update."""
    if not corrects_inside(objective.correction):
        return t
    return replace(t, correction=scatter_masked(objective.correction(masked_in(t)), t.mask))
