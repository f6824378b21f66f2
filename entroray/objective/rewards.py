"""Group -> reward added to the verdicts' own; never touches `correct`, which keep rules read."""

from jaxtyping import Float
from torch import Tensor

from entroray.binding import Fraction, NonNegative
from entroray.types import Group


def soft_overlong(group: Group, *, buffer: Fraction = 0.2, factor: NonNegative = 0.5) -> Float[Tensor, " G"]:
    """Punish the last stretch before the length limit, linearly (DAPO, arXiv 2503.14476).

    `factor clip((limit - buffer limit - length) / (buffer limit), -1, 0)`
    Tokens; `buffer` is a fraction of `Rollout.limit` (paper: 4096 of 20480). The authors' code does not
    stop at -factor; the paper does, and so does this. Their factor is 1 for rewards of -1 and 1; judges here
    give 0 and 1, for which 0.5 is the same proportion.
    """
    limit = group.rewards.new_tensor([r.limit for r in group.rollouts])
    return factor * (((1 - buffer) * limit - group.lengths) / (buffer * limit)).clamp(-1, 0)
