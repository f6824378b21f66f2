"""What a policy does on held-out prompts: how often right, how sure, how much its answers differ."""

from collections.abc import Callable, Sequence

import torch

from entroray.entropy.diagnosis import diagnose
from entroray.entropy.domains import judged
from entroray.entropy.statistics import describe
from entroray.loop.batching import assemble, group_index, tokens_of
from entroray.loop.evaluate import answered, count_right, right_answers, scores
from entroray.loop.roles import Generator, Learner, Verifier
from entroray.types import Group, Prompt

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
"""Metrics of the catalogue (entroray/entropy/README.md) that a portrait has."""


async def portrait(
    at: Callable[[float], Generator],
    verifier: Verifier,
    learner: Learner,
    prompts: Sequence[Prompt],
    *,
    temperature: float,
    samples: int,
) -> dict[str, float]:
    """Greedy accuracy, pass@k and `DRAWN` over `samples` answers to each prompt; `at` samples at one heat.

    The draws are those of `heldout`, always the same, so that two policies differ in their weights alone.
    """
    greedy = await right_answers(at(0.0), verifier, prompts, samples=1, seed=0)
    groups = await answered(at(temperature), verifier, prompts, samples=samples, seed=0)
    found = {"greedy": sum(greedy) / len(greedy), **scores([count_right(g) for g in groups], samples)}
    return found | await _drawn([g for g in groups if _whole(g)], learner)


def _whole(group: Group) -> bool:
    """Whether every answer was sampled and judged."""
    pairs = zip(group.rollouts, group.verdicts, strict=True)
    return all(r.status.usable and v.status.usable and r.length for r, v in pairs)


async def _drawn(groups: Sequence[Group], learner: Learner) -> dict[str, float]:
    if not groups:
        return {}
    scored = await learner.score(assemble(groups), group_index(groups))
    level = [torch.zeros(len(g.rollouts)) for g in groups]  # nothing is trained: no advantage
    tokens = tokens_of(groups, level, scores=scored, step=max(g.version for g in groups))
    found = judged(groups) | describe(groups, tokens) | diagnose(groups, tokens)
    return {name: found[name] for name in DRAWN if name in found}
