"""The equation, as one choice per slot; a slot is a module of small pure functions (README.md here)."""

from entroray.objective.activity import active_tokens, activity_inside, gradient_weight
from entroray.objective.masking import count_tokens
from entroray.objective.objective import Objective, build_objective, check_group_size
from entroray.objective.scoring import corrected, why_scored

__all__ = [
    "Objective",
    "active_tokens",
    "activity_inside",
    "build_objective",
    "check_group_size",
    "corrected",
    "count_tokens",
    "gradient_weight",
    "why_scored",
]
