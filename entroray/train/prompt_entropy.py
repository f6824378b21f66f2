"""Entropy of fixed prompts as the policy reads them: is it only the task's answers that grow certain?"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from entroray.roles import Learner
from entroray.types import Batch, Prompt

NUMBER = 16
"""Prompts of each side."""
OUTSIDE = Path(__file__).with_name("outside_prompts.txt").read_text().splitlines()
"""Of no task that is trained here, and the same in every run."""


@dataclass(frozen=True)
class PromptEntropy:
    """Rendered prompts, in domain and out of it, read at temperature 1."""

    inside: Sequence[tuple[int, ...]]
    outside: Sequence[tuple[int, ...]]

    async def read(self, learner: Learner) -> dict[str, float]:
        """Mean entropy (nats) over the tokens of either side but each prompt's first, under these weights."""
        rows = [*self.inside, *self.outside]
        scores = await learner.score(_batch(rows), np.arange(len(rows)))
        cut = sum(len(row) - 1 for row in self.inside)
        means = {"in": scores["entropy"][:cut], "out": scores["entropy"][cut:]}
        return {
            f"entropy/prompt_{side}": float(h.mean(dtype=np.float64)) for side, h in means.items() if len(h)
        }


def build_prompt_entropy(
    heldout: Sequence[Prompt], tokenize: Callable[[str], tuple[int, ...]]
) -> PromptEntropy:
    """The first held-out prompts of the task, and OUTSIDE in the same template."""
    return PromptEntropy([p.token_ids for p in heldout[:NUMBER]], [tokenize(text) for text in OUTSIDE])


def _batch(rows: Sequence[tuple[int, ...]]) -> Batch:
    """A prompt as a response to its own first token."""
    return Batch(
        prompt_ids=np.array([row[0] for row in rows], np.int32),
        prompt_lengths=np.ones(len(rows), np.int32),
        response_ids=np.fromiter(chain.from_iterable(row[1:] for row in rows), np.int32),
        response_lengths=np.array([len(row) - 1 for row in rows], np.int32),
        temperatures=np.ones(len(rows), np.float32),
    )
