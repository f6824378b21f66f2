"""Held-out accuracy: greedy, and pass@k without bias."""

import asyncio
import math
from collections.abc import Callable, Sequence

from entroray.loop.driver import seeds
from entroray.loop.mixture import domains
from entroray.loop.roles import Generator, Verifier
from entroray.types import Group, Prompt


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Probability that one of k draws without return is right: 1 - C(n-c, k) / C(n, k) (arXiv 2107.03374)."""
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} needs between 1 and {samples} samples")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


async def right_answers(
    generator: Generator, verifier: Verifier, prompts: Sequence[Prompt], *, samples: int, seed: int
) -> list[int]:
    """How many of `samples` answers are right, for each prompt; failures count as wrong answers."""
    return list(map(right, await answered(generator, verifier, prompts, samples=samples, seed=seed)))


async def answered(
    generator: Generator, verifier: Verifier, prompts: Sequence[Prompt], *, samples: int, seed: int
) -> list[Group]:
    """`samples` judged answers to each prompt, failures among them."""

    async def one(index: int, prompt: Prompt) -> Group:
        rollouts = await generator.sample(prompt, seeds(seed, index, 0, samples))
        return Group(prompt, tuple(rollouts), tuple(await verifier.judge(prompt, rollouts)))

    return list(await asyncio.gather(*(one(i, p) for i, p in enumerate(prompts))))


def right(group: Group) -> int:
    """How many of its answers are right."""
    return sum(v.correct >= 1 and v.status.usable for v in group.verdicts)


def scores(counts: Sequence[int], samples: int) -> dict[str, float]:
    """pass@1, 2, 4, ... up to `samples`, averaged over prompts."""
    ks = [k for k in (2**i for i in range(samples.bit_length())) if k <= samples]
    return {f"pass@{k}": sum(pass_at_k(samples, c, k) for c in counts) / len(counts) for k in ks}


async def heldout(
    at: Callable[[float], Generator],
    verifier: Verifier,
    prompts: Sequence[Prompt],
    *,
    temperature: float,
    samples: int,
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
