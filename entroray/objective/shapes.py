"""Tokens of the whole step -> new advantages, before the update."""

import torch
from jaxtyping import Float
from torch import Tensor

from entroray.objective.bind import NonNegative, Positive, declare
from entroray.types import Tokens


def by_sign(t: Tokens, *, positive: NonNegative = 0.1, negative: NonNegative = 1.0) -> Float[Tensor, " N"]:
    """Weigh reinforced and punished tokens apart (W-REINFORCE, arXiv 2506.01347; NSR at positive 0).

    `A (positive where A > 0, negative where A < 0)`
    The authors' code drops the other half of the batch in PSR and NSR; here it stays in the denominator.
    """
    return torch.where(t.advantages > 0, positive * t.advantages, negative * t.advantages)


@declare(needs=["whole_step"])
def whiten(t: Tokens, *, eps: Positive = 1e-8) -> Float[Tensor, " N"]:
    """Advantages of mean 0 and deviation 1 over the step's tokens (REINFORCE++, arXiv 2501.03262).

    `(A - mean(A)) / sqrt(var(A) + eps) over the step, Bessel`
    Does not keep the sign of A: that is its purpose where rewards have no baseline.
    """
    if not len(t.advantages):
        return t.advantages
    centred = t.advantages - t.advantages.mean()
    return centred / (centred.square().sum() / max(len(centred) - 1, 1) + eps).sqrt()
