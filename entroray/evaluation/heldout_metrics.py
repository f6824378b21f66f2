"""What a policy does on held-out prompts: how often right, how sure, how much its answers differ."""

from collections.abc import Sequence

import torch

from entroray.evaluation.evaluate import sample_answers, score_counts
from entroray.metrics.by_domain import judged_metrics
from entroray.metrics.pass_at_k import count_right
from entroray.metrics.step import step_metrics
from entroray.metrics.step_detail import step_details
from entroray.roles import Generator, Learner, Verifier
from entroray.train.batching import assemble, group_index, tokens_of
from entroray.types import Draw, Group, Prompt

DRAWN = (
    "entropy/mean",
    "entropy/p80",
    "varentropy/mean",
    "distinct/2",
    "answers/distinct",
    "answers/entropy",
    "repetition/share",
    "calibration/ece_consistency",
    "calibration/ece_logprob",
    "length/mean",
    "length/truncated",
)
"""Metrics of the catalogue (entroray/metrics/README.md) that are measured here."""


async def heldout_metrics(
    generator: Generator,
    verifier: Verifier,
    learner: Learner,
    prompts: Sequence[Prompt],
    draw: Draw,
    samples: int,
) -> dict[str, float]:
    """Greedy accuracy, pass@k and `DRAWN` over `samples` answers to each prompt."""
    greedy = await sample_answers(generator, verifier, prompts, draw.greedy(), 1)
    groups = await sample_answers(generator, verifier, prompts, draw, samples)
    found = score_counts(list(map(count_right, greedy)), list(map(count_right, groups)), samples)
    return found | await _drawn([g for g in groups if _is_complete(g)], learner)


def _is_complete(group: Group) -> bool:
    """Whether every answer was sampled and judged."""
    pairs = zip(group.rollouts, group.verdicts, strict=True)
    return all(r.status.usable and v.status.usable and r.length for r, v in pairs)


async def _drawn(groups: Sequence[Group], learner: Learner) -> dict[str, float]:
    if not groups:
        return {}
    scored = await learner.score(assemble(groups), group_index(groups))
    level = [torch.zeros(len(g.rollouts)) for g in groups]  # nothing is trained: no advantage
    tokens = tokens_of(groups, level, scores=scored, step=max(g.version for g in groups))
    found = judged_metrics(groups) | step_metrics(groups, tokens) | step_details(groups, tokens)
    return {name: found[name] for name in DRAWN if name in found}
