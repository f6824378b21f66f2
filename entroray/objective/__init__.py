"""The equation, as one choice per slot; a slot is a module of small pure functions (README.md here)."""

from entroray.objective.activity import active_tokens, activity_inside, gradient_weight
from entroray.objective.masking import count_tokens
from entroray.objective.objective import Objective, build_objective, check_group_size

__all__ = [
    "Objective",
    "active_tokens",
    "activity_inside",
    "build_objective",
    "check_group_size",
    "count_tokens",
    "gradient_weight",
]
