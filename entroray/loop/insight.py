"""What the driver works out about its own steps, and remembers over a window of them."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from entroray.entropy import law
from entroray.entropy.diagnosis import diagnose
from entroray.entropy.prediction import COLLISION, compare, record
from entroray.loop.probe import PromptProbe
from entroray.loop.roles import Learner, Scores
from entroray.types import Group, Tokens, Version


@dataclass(frozen=True, kw_only=True)
class Looks:
    """How often to look, in steps from the first on; 0 is never."""

    diagnosis: int = 0
    prediction: int = 0
    window: int = 20
    """Predictions that slope and rank are taken over."""
    law: int = 0
    """Steps the reward-entropy law is fitted over."""
    probe: PromptProbe | None = None
    """Prompts to read when a diagnosis is due."""


NEVER = Looks()


class Insight:
    """Diagnosis, prediction and law of the steps of one run."""

    def __init__(self, looks: Looks):
        self.looks = looks
        self.predictions: deque[dict[str, float]] = deque(maxlen=looks.window)
        self.points: deque[tuple[float, float]] = deque(maxlen=max(looks.law, 1))

    def wants(self, step: Version) -> tuple[str, ...]:
        """Further statistics the scores of `step` should bring; none unless its change is predicted."""
        return (COLLISION,) if _due(step, self.looks.prediction) else ()

    def changed(self, tokens: Tokens, pull: Tensor, after: Scores) -> dict[str, float]:
        """Predicted and realised change of entropy, `after` the same tokens' scores under the new weights.

        `pull` [N] is what the objective does to each token's log-prob (`objective.pull`).
        """
        found = compare(tokens, pull, torch.from_numpy(after["entropy"]))
        if found:
            self.predictions.append(found)
        return found | record(self.predictions)

    async def read(self, step: Version, learner: Learner) -> dict[str, float]:
        """Entropy of the probe's prompts under the weights of `step`, when a diagnosis is due."""
        probe = self.looks.probe
        return await probe.read(learner) if probe and _due(step, self.looks.diagnosis) else {}

    def diagnosed(
        self, step: Version, groups: Sequence[Group], tokens: Tokens, judged: Sequence[Group]
    ) -> dict[str, float]:
        """The metrics of `diagnose`, when they are due."""
        return diagnose(groups, tokens, judged) if _due(step, self.looks.diagnosis) else {}

    def fitted(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """The law over the last steps, this one included."""
        if not self.looks.law or "entropy/mean" not in metrics:
            return {}
        self.points.append((metrics["entropy/mean"], metrics["reward/mean"]))
        found = law.fit(*zip(*self.points, strict=True))
        return found.metrics() if found else {}

    def state(self) -> dict[str, Any]:
        """Plain JSON."""
        return {"predictions": list(self.predictions), "points": list(map(list, self.points))}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        self.predictions.extend(state["predictions"])
        self.points.extend((h, r) for h, r in state["points"])


def _due(step: Version, every: int) -> bool:
    return every > 0 and (step - 1) % every == 0
