"""Metrics of branches: how much they inherit, where they fork, whether answers change."""

from collections.abc import Sequence

import numpy as np

from entroray.types import REASONS, Group, MaskReason


def branch_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """`branches/*` over all rollouts, masked tokens included; empty if none branched and no token was forced.

    `branches/entropy` (nats) is the sampler's at the fork, at the policy's temperature.
    """
    rollouts = [r for g in groups for r in g.rollouts]
    why = np.concatenate([np.empty(0, np.int8), *(r.observed for r in rollouts)])
    share = lambda mask: float((why == REASONS.index(mask)).mean())
    metrics = {"branches/forced": share(MaskReason.FORCED)} if REASONS.index(MaskReason.FORCED) in why else {}
    grown = [r for r in rollouts if r.parent is not None]
    if not grown:
        return metrics
    metrics |= {
        "branches/share": len(grown) / len(rollouts),
        "branches/inherited": share(MaskReason.PREFIX),
        "branches/position": sum(r.inherited for r in grown) / len(grown),
    }
    entropy = [r.notes.entropy[r.inherited] for r in grown if r.notes is not None]
    if len(known := np.array(entropy)[np.isfinite(entropy)]):
        metrics["branches/entropy"] = float(known.mean(dtype=np.float64))
    return metrics | _answers(groups)


def _answers(groups: Sequence[Group]) -> dict[str, float]:
    given = {"roots": [_given(g, False) for g in groups], "branches": [_given(g, True) for g in groups]}
    metrics = {}
    for kind, each in given.items():
        if some := [len(answers) for answers in each if answers]:
            metrics[f"answers/distinct_{kind}"] = sum(some) / len(some)
    changed = [x for g in groups for x in _changed(g)]
    return metrics | ({"branches/changed": sum(changed) / len(changed)} if changed else {})


def _given(group: Group, grown: bool) -> set[str]:
    pairs = zip(group.rollouts, group.verdicts, strict=True)
    return {v.answer for r, v in pairs if (r.parent is not None) is grown and v.answer is not None}


def _changed(group: Group) -> list[bool]:
    """For each branch: whether its answer differs from its parent's, if both have one."""
    given = [v.answer for v in group.verdicts]
    pairs = [
        (own, given[r.parent]) for r, own in zip(group.rollouts, given, strict=True) if r.parent is not None
    ]
    return [own != parents for own, parents in pairs if own is not None and parents is not None]
