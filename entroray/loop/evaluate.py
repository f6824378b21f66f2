"""Held-out accuracy: greedy, and pass@k without bias."""

import asyncio
import math
from collections.abc import Sequence

from entroray.loop.driver import seeds
from entroray.loop.roles import Generator, Verifier
from entroray.types import Prompt


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Probability that one of k draws without return is right: 1 - C(n-c, k) / C(n, k) (arXiv 2107.03374)."""
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} needs between 1 and {samples} samples")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


async def right_answers(
    generator: Generator, verifier: Verifier, prompts: Sequence[Prompt], *, samples: int, seed: int
) -> list[int]:
    """How many of `samples` answers are right, for each prompt; failures count as wrong answers."""

    async def one(index: int, prompt: Prompt) -> int:
        rollouts = await generator.sample(prompt, seeds(seed, index, 0, samples))
        verdicts = await verifier.judge(prompt, rollouts)
        return sum(v.correct >= 1 and v.status.usable for v in verdicts)

    return list(await asyncio.gather(*(one(i, p) for i, p in enumerate(prompts))))


def scores(right: Sequence[int], samples: int) -> dict[str, float]:
    """pass@1, 2, 4, ... up to `samples`, averaged over prompts."""
    ks = [k for k in (2**i for i in range(samples.bit_length())) if k <= samples]
    return {f"pass@{k}": sum(pass_at_k(samples, c, k) for c in right) / len(right) for k in ks}
