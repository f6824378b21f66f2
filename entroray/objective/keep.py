"""Group -> whether it is worth training on."""

from entroray.binding import declare
from entroray.types import Group


@declare(neutral=True)
def always(group: Group) -> bool:
    """Train on every group.

    `every group`
    """
    return True


@declare(min_group=2, drops_uniform_groups=True)
def informative(group: Group) -> bool:
    """Some rollouts right, some wrong: dynamic sampling (DAPO, arXiv 2503.14476).

    `0 < #correct < G`
    Reads `correct`, never the reward: shaping would keep all-wrong groups (verl-recipe PR 125).
    """
    return 0 < int(sum(v.correct for v in group.verdicts)) < len(group.rollouts)
