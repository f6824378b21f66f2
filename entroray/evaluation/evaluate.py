"""Held-out evaluation: greedy, n samples a prompt at a temperature, and what they say of the policy."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from entroray.data.mixture import positions_by_domain
from entroray.errors import ConfigError
from entroray.evaluation import summary
from entroray.evaluation.cot_decoding import Decoding, Words, decode_paths
from entroray.metrics.pass_at_k import count_right, pass_at_k, powers_of_two
from entroray.roles import Generator, Verifier
from entroray.seeds import seeds
from entroray.types import Group, Prompt

At = Callable[[float], Generator]
"""The engines at one temperature."""


@dataclass(frozen=True)
class EvaluationPlan:
    """What is drawn for each prompt beside one greedy answer."""

    temperature: float
    samples: int
    ks: tuple[int, ...]
    """Of pass@k, pass^k and maj@k, the first 1 and the last `samples`."""


def plan_evaluation(temperature: float, samples: int, more: Sequence[int] = ()) -> EvaluationPlan:
    """k = 1, 2, 4, ..., `samples`, and `more` besides; at temperature 0 the greedy answer is the one sample.

    ConfigError for a k above the samples there are.
    """
    drawn = samples if temperature > 0 else 1
    if not all(1 <= k <= drawn for k in more):
        heat = "" if temperature > 0 else " and sampler.temperature above 0, where one answer is all there is"
        raise ConfigError(
            f"evaluate.k={list(more)} needs k between 1 and {drawn}, the answers drawn for each "
            f"prompt: raise evaluate.samples to {max(more)}{heat}"
        )
    return EvaluationPlan(temperature, drawn, tuple(sorted({*powers_of_two(drawn), *more, drawn})))


async def count_right_answers(
    generator: Generator, verifier: Verifier, prompts: Sequence[Prompt], *, samples: int, seed: int
) -> list[int]:
    """How many of `samples` answers are right, for each prompt; failures count as wrong answers."""
    return list(
        map(count_right, await sample_answers(generator, verifier, prompts, samples=samples, seed=seed))
    )


async def sample_answers(
    generator: Generator, verifier: Verifier, prompts: Sequence[Prompt], *, samples: int, seed: int
) -> list[Group]:
    """`samples` judged answers to each prompt, failures among them."""

    async def one(index: int, prompt: Prompt) -> Group:
        rollouts = await generator.sample(prompt, seeds(seed, index, 0, samples))
        return Group(prompt, tuple(rollouts), tuple(await verifier.judge(prompt, rollouts)))

    return list(await asyncio.gather(*(one(i, p) for i, p in enumerate(prompts))))


def pass_at_ks(counts: Sequence[int], samples: int) -> dict[str, float]:
    """pass@1, 2, 4, ... up to `samples`, averaged over prompts."""
    return {
        f"pass@{k}": sum(pass_at_k(samples, c, k) for c in counts) / len(counts)
        for k in powers_of_two(samples)
    }


async def heldout_accuracy(
    at: At, verifier: Verifier, prompts: Sequence[Prompt], *, temperature: float, samples: int
) -> dict[str, float]:
    """Share of `prompts` right when greedy, and pass@1, 2, 4, ... at `temperature`; `at` samples at one.

    The seeds are always the same, so that two models, or two steps of one run, are compared on one draw.
    """
    greedy = await count_right_answers(at(0.0), verifier, prompts, samples=1, seed=0)
    sampled = await count_right_answers(at(temperature), verifier, prompts, samples=samples, seed=0)
    return _scored(greedy, sampled, samples) | accuracy_by_domain(prompts, greedy, sampled, samples)


def accuracy_by_domain(
    prompts: Sequence[Prompt], greedy: Sequence[int], sampled: Sequence[int], samples: int
) -> dict[str, float]:
    """The scores of `heldout` for each part of a mixture, as `greedy:countdown`."""
    found: dict[str, float] = {}
    for name, places in positions_by_domain(prompts).items():
        own = _scored([greedy[i] for i in places], [sampled[i] for i in places], samples)
        found |= {f"{score}:{name}": value for score, value in own.items()}
    return found


def _scored(greedy: Sequence[int], sampled: Sequence[int], samples: int) -> dict[str, float]:
    return {"greedy": sum(greedy) / len(greedy), **pass_at_ks(sampled, samples)}


async def evaluate_policy(
    at: At,
    verifier: Verifier,
    prompts: Sequence[Prompt],
    drawn: EvaluationPlan,
    words: Words,
    decoding: Decoding | None = None,
) -> dict[str, Any]:
    """Everything `entroray eval` finds, as JSON holds it; the draws are those of `heldout`.

    Entropies are there where `at(drawn.temperature)` notes them (`Rollout.shaped`). With `decoding`, `at(0)`
    must report as many likeliest tokens as there are paths, and at least two.
    """
    greedy = await sample_answers(at(0.0), verifier, prompts, samples=1, seed=0)
    sampled = greedy
    if drawn.temperature > 0:
        heated = at(drawn.temperature)
        sampled = await sample_answers(heated, verifier, prompts, samples=drawn.samples, seed=0)
    paths = await decode_paths(greedy, decoding, verifier, words.text) if decoding else []
    found = summary.summarise(greedy, sampled, paths, drawn.ks, words)
    parts = positions_by_domain(prompts).items()
    mean = lambda places: {n: _mean(c, places) for n, c in found["each"].items() if n != "id"}
    return found | ({"domains": {name: mean(places) for name, places in parts}} if parts else {})


def _mean(column: Sequence[float], places: Sequence[int]) -> float:
    return sum(column[i] for i in places) / len(places)
