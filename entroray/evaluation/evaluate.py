"""Held-out evaluation: greedy, n samples a prompt at a temperature, and what they say of the policy."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from entroray.data.mixture import positions_by_domain
from entroray.errors import ConfigError, PreflightError
from entroray.evaluation import summary
from entroray.evaluation.cot_decoding import TWO, Decoding, Words, decode_paths
from entroray.metrics.pass_at_k import pass_at_k, powers_of_two
from entroray.roles import Generator, Verifier
from entroray.seeds import seeds
from entroray.types import Draw, Group, Prompt, Rollout, Verdict


@dataclass(frozen=True)
class EvaluationPlan:
    """What is drawn for each prompt beside one greedy answer."""

    draw: Draw
    samples: int
    ks: tuple[int, ...]
    """Of pass@k, pass^k and maj@k, the first 1 and the last `samples`."""


def plan_evaluation(
    draw: Draw, samples: int, more: Sequence[int] = (), place: str = "evaluate"
) -> EvaluationPlan:
    """k = 1, 2, 4, ..., `samples`, and `more` besides; at temperature 0 the greedy answer is the one sample.

    ConfigError for a k above the samples there are; `place` is the setting that holds both.
    """
    drawn = samples if draw.temperature > 0 else 1
    if any(k < 1 for k in more):
        raise ConfigError(f"{place}.k={list(more)}: each k is at least 1")
    if any(k > drawn for k in more):
        heated = "sampler.temperature" if place == "evaluate" else f"{place}.temperature"
        greedy = f" and {heated} above 0: a greedy answer is the same each time"
        raise ConfigError(
            f"{place}.k={list(more)} needs k between 1 and {drawn}, the answers drawn for each "
            f"prompt: raise {place}.samples to {max(more)}{'' if draw.temperature > 0 else greedy}"
        )
    return EvaluationPlan(draw, drawn, tuple(sorted({*powers_of_two(drawn), *more, drawn})))


@dataclass(frozen=True)
class CountingVerifier:
    """`verifier`, which calls `count` when a prompt's rollouts are judged."""

    verifier: Verifier
    count: Callable[[], None]

    async def judge(self, prompt: Prompt, rollouts: Sequence[Rollout]) -> list[Verdict]:
        """As the verifier itself."""
        verdicts = await self.verifier.judge(prompt, rollouts)
        self.count()
        return verdicts


async def sample_answers(
    generator: Generator, verifier: Verifier, prompts: Sequence[Prompt], draw: Draw, samples: int
) -> list[Group]:
    """`samples` judged answers to each prompt, failures among them.

    The seeds are always the same: two policies, or two steps of one run, differ in their weights alone.
    """

    async def one(index: int, prompt: Prompt) -> Group:
        rollouts = await generator.sample(prompt, seeds(0, index, 0, samples), draw)
        return Group(prompt, tuple(rollouts), tuple(await verifier.judge(prompt, rollouts)))

    return list(await asyncio.gather(*(one(i, p) for i, p in enumerate(prompts))))


def score_counts(greedy: Sequence[int], sampled: Sequence[int], samples: int) -> dict[str, float]:
    """Share of prompts right when greedy, and pass@1, 2, 4, ... up to `samples`, averaged over prompts."""
    ks = powers_of_two(samples)
    passed = {f"pass@{k}": sum(pass_at_k(samples, c, k) for c in sampled) / len(sampled) for k in ks}
    return {"greedy": sum(greedy) / len(greedy)} | passed


def heldout_prompts(heldout: Sequence[Prompt], most: int, asked_by: str) -> Sequence[Prompt]:
    """The first `most` held-out prompts, for the setting `asked_by`; PreflightError if there is none."""
    if not heldout:
        raise PreflightError(
            f"{asked_by} asks for held-out prompts and none is: raise data.heldout (a share of the rows), or "
            "give data.task more rows"
        )
    return heldout[:most]


async def heldout_accuracy(
    generator: Generator, verifier: Verifier, prompts: Sequence[Prompt], draw: Draw, samples: int
) -> dict[str, float]:
    """Share of `prompts` right when greedy, and pass@1, 2, 4, ... of what is drawn."""
    one = await sample_answers(generator, verifier, prompts, draw.greedy(), 1)
    many = await sample_answers(generator, verifier, prompts, draw, samples)
    greedy, sampled = (list(map(summary.count_right, groups)) for groups in (one, many))
    return score_counts(greedy, sampled, samples) | accuracy_by_domain(prompts, greedy, sampled, samples)


def accuracy_by_domain(
    prompts: Sequence[Prompt], greedy: Sequence[int], sampled: Sequence[int], samples: int
) -> dict[str, float]:
    """The scores of `heldout_accuracy` for each part of a mixture, as `greedy:countdown`."""
    found: dict[str, float] = {}
    for name, places in positions_by_domain(prompts).items():
        own = score_counts([greedy[i] for i in places], [sampled[i] for i in places], samples)
        found |= {f"{score}:{name}": value for score, value in own.items()}
    return found


async def evaluate_policy(
    generator: Generator,
    verifier: Verifier,
    prompts: Sequence[Prompt],
    plan: EvaluationPlan,
    words: Words,
    decoding: Decoding | None = None,
) -> dict[str, Any]:
    """Everything `entroray eval` finds, as JSON holds it; entropies are there if `plan.draw` notes them."""
    depth = max(decoding.paths, TWO) if decoding else 0
    greedy = await sample_answers(generator, verifier, prompts, plan.draw.greedy(depth), 1)
    sampled, paths = greedy, list[Group]()
    if plan.draw.temperature > 0:
        sampled = await sample_answers(generator, verifier, prompts, plan.draw, plan.samples)
    if decoding:
        paths = await decode_paths(greedy, decoding, generator, verifier, words.text)
    found = summary.summarise(greedy, sampled, paths, plan.ks, words)
    parts = positions_by_domain(prompts).items()
    mean = lambda places: {n: _mean(c, places) for n, c in found["each"].items() if n != "id"}
    return found | ({"domains": {name: mean(places) for name, places in parts}} if parts else {})


def _mean(column: Sequence[float], places: Sequence[int]) -> float:
    return sum(column[i] for i in places) / len(places)
