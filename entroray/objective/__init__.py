"""The equation, as one choice per slot; a slot is a module of small pure functions (README.md here)."""

from entroray.objective.bind import bind
from entroray.objective.equation import Objective, build, check_group_size
from entroray.objective.touch import pull, silent, touched, touched_inside
from entroray.objective.view import count

__all__ = [
    "Objective",
    "bind",
    "build",
    "check_group_size",
    "count",
    "pull",
    "silent",
    "touched",
    "touched_inside",
]
