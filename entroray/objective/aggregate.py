"""Tokens -> the weight of each in the numerator. Rows come whole, so a row's own length is known anywhere."""

import torch
from jaxtyping import Float
from torch import Tensor

from entroray.binding import declare
from entroray.ops import segment_sum
from entroray.types import Tokens


def token(t: Tokens) -> Float[Tensor, " N"]:
    """Every token counts the same (DAPO, arXiv 2503.14476; Dr. GRPO with the denominator `constant`).

    `1 per token`
    """
    return torch.ones_like(t.logprobs)


@declare(per_rollout=True)
def rollout_mean(t: Tokens) -> Float[Tensor, " N"]:
    """Every rollout counts the same, however long (GRPO, arXiv 2402.03300); observations are no part of it.

    `1 / (response tokens of the rollout)`
    A branch is as long as its parent's tokens and its own: it counts by the part that it drew itself.
    """
    length = segment_sum(torch.ones_like(t.logprobs), t.row, len(t.length))
    total = length if t.drawn_before is None else length + t.drawn_before
    return 1 / total[t.row]
