"""The metrics of a step by part of a mixture: `correct/mean:countdown` beside `correct/mean`."""

import math
from collections.abc import Sequence

import numpy as np
import torch

from entroray.metrics.step import lengths, step_metrics
from entroray.types import Group, Tokens, Verdict

TRAINED = ("entropy/mean", "entropy/p80", "varentropy/mean")
"""Metrics of `step_metrics` that are given by domain, over the trained groups."""
JUDGED = ("correct/mean", "groups/all_right", "groups/all_wrong", "length/mean", "length/truncated")
"""Metrics of `judged_metrics` that are given by domain."""


def judged_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Metrics over every group judged, so that a filter of undecided groups does not show as a plateau."""
    right = [g.share_right for g in groups]
    fresh = [(r, v) for g in groups for r, v in zip(g.rollouts, g.verdicts, strict=True) if not r.replayed]
    reward = np.array([v.reward for _, v in fresh], np.float64)
    return lengths([r for r, _ in fresh]) | {
        "correct/mean": sum(right) / len(right),
        "reward/mean": float(reward.mean()),
        "reward/std": float(reward.std()),
        "groups/all_right": sum(r == 1 for r in right) / len(right),
        "groups/all_wrong": sum(r == 0 for r in right) / len(right),
        **_parts([v for _, v in fresh]),
    }


def _parts(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Mean of each part of the verdicts, over its finite values."""
    found: dict[str, list[float]] = {}
    for name, value in (part for v in verdicts for part in v.parts.items()):
        if math.isfinite(value):
            found.setdefault(name, []).append(value)
    return {f"reward/part_{name}": sum(values) / len(values) for name, values in sorted(found.items())}


def domain_metrics(trained: Sequence[Group], tokens: Tokens, groups: Sequence[Group]) -> dict[str, float]:
    """For each domain: `JUDGED` over all `groups`, `TRAINED` over the `trained` ones, with their `tokens`."""
    metrics: dict[str, float] = {}
    for name in sorted({g.prompt.domain for g in groups} - {""}):
        own = [g for g in groups if g.prompt.domain == name]
        judged = judged_metrics(own)
        found = (
            {n: judged[n] for n in JUDGED}
            | {"groups/share": len(own) / len(groups)}
            | _trained(name, trained, tokens)
        )
        metrics |= {f"{metric}:{name}": value for metric, value in found.items()}
    return metrics


def _trained(name: str, groups: Sequence[Group], tokens: Tokens) -> dict[str, float]:
    own = [g.prompt.domain == name for g in groups]
    rows = torch.tensor(own)[tokens.group].nonzero().squeeze(-1)
    found = step_metrics([g for g, mine in zip(groups, own, strict=True) if mine], tokens.take(rows))
    return {metric: found[metric] for metric in TRAINED if metric in found}
