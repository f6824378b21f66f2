"""Tokens -> how far the policy has moved from the one the step was scored under."""

from jaxtyping import Float
from torch import Tensor

from entroray.objective.view import log_ratio
from entroray.types import Tokens


def token(t: Tokens) -> Float[Tensor, " N"]:
    """Each token's own ratio (PPO, arXiv 1707.06347); log-ratio held within 20 nats as in verl.

    `π / π_old per token`
    """
    return log_ratio(t.logprobs, t.old_logprobs).exp()
