"""The metrics of a step by part of a mixture: `reward/mean:countdown` beside `reward/mean`."""

from collections.abc import Sequence

import torch

from entroray.entropy.statistics import describe
from entroray.types import Group, Tokens

TRAINED = ("entropy/mean", "entropy/p80", "varentropy/mean", "length/mean", "length/truncated")
"""Those of `describe` that are given by domain, over the trained groups."""


def judged(groups: Sequence[Group]) -> dict[str, float]:
    """Of every group judged: a filter that keeps the undecided ones must not show as a plateau."""
    right = [g.right for g in groups]
    return {
        "reward/mean": sum(right) / len(right),
        "groups/all_right": sum(r == 1 for r in right) / len(right),
        "groups/all_wrong": sum(r == 0 for r in right) / len(right),
    }


def by_domain(trained: Sequence[Group], tokens: Tokens, groups: Sequence[Group]) -> dict[str, float]:
    """`judged` of all `groups`, and TRAINED of those whose `tokens` these are, for each domain there is."""
    metrics: dict[str, float] = {}
    for name in sorted({g.prompt.domain for g in groups} - {""}):
        own = [g for g in groups if g.prompt.domain == name]
        found = judged(own) | {"groups/share": len(own) / len(groups)} | _trained(name, trained, tokens)
        metrics |= {f"{metric}:{name}": value for metric, value in found.items()}
    return metrics


def _trained(name: str, groups: Sequence[Group], tokens: Tokens) -> dict[str, float]:
    own = [g.prompt.domain == name for g in groups]
    rows = torch.tensor(own)[tokens.group].nonzero().squeeze(-1)
    found = describe([g for g, mine in zip(groups, own, strict=True) if mine], tokens.take(rows))
    return {metric: found[metric] for metric in TRAINED if metric in found}
