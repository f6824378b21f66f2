"""Held-out evaluation: greedy, n samples a prompt at a temperature, and what they say of the policy."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from entroray.entropy.accuracy import pass_at_k, powers
from entroray.errors import ConfigError
from entroray.loop import findings
from entroray.loop.decoding import Decoding, Words, fork
from entroray.loop.mixture import domains
from entroray.loop.roles import Generator, Verifier
from entroray.loop.seeds import seeds
from entroray.types import Group, Prompt

At = Callable[[float], Generator]
"""The engines at one temperature."""


@dataclass(frozen=True)
class Plan:
    """What is drawn for each prompt beside one greedy answer."""

    temperature: float
    samples: int
    ks: tuple[int, ...]
    """Of pass@k, pass^k and maj@k, the first 1 and the last `samples`."""


def plan(temperature: float, samples: int, more: Sequence[int] = ()) -> Plan:
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
    return Plan(temperature, drawn, tuple(sorted({*powers(drawn), *more, drawn})))


async def right_answers(
    generator: Generator, verifier: Verifier, prompts: Sequence[Prompt], *, samples: int, seed: int
) -> list[int]:
    """How many of `samples` answers are right, for each prompt; failures count as wrong answers."""
    return list(map(count_right, await answered(generator, verifier, prompts, samples=samples, seed=seed)))


async def answered(
    generator: Generator, verifier: Verifier, prompts: Sequence[Prompt], *, samples: int, seed: int
) -> list[Group]:
    """`samples` judged answers to each prompt, failures among them."""

    async def one(index: int, prompt: Prompt) -> Group:
        rollouts = await generator.sample(prompt, seeds(seed, index, 0, samples))
        return Group(prompt, tuple(rollouts), tuple(await verifier.judge(prompt, rollouts)))

    return list(await asyncio.gather(*(one(i, p) for i, p in enumerate(prompts))))


def count_right(group: Group) -> int:
    """How many of its answers are right."""
    return sum(map(findings.is_right, group.verdicts))


def scores(counts: Sequence[int], samples: int) -> dict[str, float]:
    """pass@1, 2, 4, ... up to `samples`, averaged over prompts."""
    return {f"pass@{k}": sum(pass_at_k(samples, c, k) for c in counts) / len(counts) for k in powers(samples)}


async def heldout(
    at: At, verifier: Verifier, prompts: Sequence[Prompt], *, temperature: float, samples: int
) -> dict[str, float]:
    """Share of `prompts` right when greedy, and pass@1, 2, 4, ... at `temperature`; `at` samples at one.

    The seeds are always the same, so that two models, or two steps of one run, are compared on one draw.
    """
    greedy = await right_answers(at(0.0), verifier, prompts, samples=1, seed=0)
    sampled = await right_answers(at(temperature), verifier, prompts, samples=samples, seed=0)
    return _scored(greedy, sampled, samples) | by_domain(prompts, greedy, sampled, samples)


def by_domain(
    prompts: Sequence[Prompt], greedy: Sequence[int], sampled: Sequence[int], samples: int
) -> dict[str, float]:
    """The scores of `heldout` for each part of a mixture, as `greedy:countdown`."""
    found: dict[str, float] = {}
    for name, places in domains(prompts).items():
        own = _scored([greedy[i] for i in places], [sampled[i] for i in places], samples)
        found |= {f"{score}:{name}": value for score, value in own.items()}
    return found


def _scored(greedy: Sequence[int], sampled: Sequence[int], samples: int) -> dict[str, float]:
    return {"greedy": sum(greedy) / len(greedy), **scores(sampled, samples)}


async def examine(
    at: At,
    verifier: Verifier,
    prompts: Sequence[Prompt],
    drawn: Plan,
    words: Words,
    decoding: Decoding | None = None,
) -> dict[str, Any]:
    """Everything `entroray eval` finds, as JSON holds it; the draws are those of `heldout`.

    Entropies are there where `at(drawn.temperature)` notes them (`Rollout.shaped`). With `decoding`, `at(0)`
    must report as many likeliest tokens as there are paths, and at least two.
    """
    greedy = await answered(at(0.0), verifier, prompts, samples=1, seed=0)
    sampled = greedy
    if drawn.temperature > 0:
        heated = at(drawn.temperature)
        sampled = await answered(heated, verifier, prompts, samples=drawn.samples, seed=0)
    paths = await fork(greedy, decoding, verifier, words.text) if decoding else []
    found = findings.of(greedy, sampled, paths, drawn.ks, words)
    parts = domains(prompts).items()
    mean = lambda places: {n: _mean(c, places) for n, c in found["each"].items() if n != "id"}
    return found | ({"domains": {name: mean(places) for name, places in parts}} if parts else {})


def _mean(column: Sequence[float], places: Sequence[int]) -> float:
    return sum(column[i] for i in places) / len(places)
