"""How many tokens each rule of a row touched in a step: one that touches none might as well be absent."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from entroray.objective import select
from entroray.objective.equation import Objective
from entroray.objective.view import visible
from entroray.types import Tokens


@torch.no_grad()
def touched(objective: Objective, t: Tokens) -> dict[str, int]:
    """Tokens that each shape, the selection, each scale and the correction change; `t` as before `credit`."""
    seen, counts = visible(t), dict[str, int]()
    for shape in objective.shapes:
        shaped = shape(seen)
        counts[shape.func.__name__] = int((shaped != seen.advantages).sum())
        seen = replace(seen, advantages=shaped)
    seen = replace(seen, selected=objective.select(seen))
    if objective.select.func is not select.everything:
        counts[objective.select.func.__name__] = int(seen.selected.sum())
    for rule in (*objective.scales, objective.correction):
        if rule.func.__name__ != "none":
            counts[rule.func.__name__] = int((rule(seen) != 1).sum())
    return counts


@dataclass
class Untouched:
    """Steps in a row in which a rule touched no token."""

    patience: int
    steps: dict[str, int] = field(default_factory=dict)

    def note(self, counts: Mapping[str, int]) -> list[str]:
        """Rules that have now touched none for `patience` steps; each is named once per spell."""
        self.steps = {name: 0 if count else self.steps.get(name, 0) + 1 for name, count in counts.items()}
        return [name for name, steps in self.steps.items() if steps == self.patience]
