"""What the driver works out about its own steps, and remembers over a window of them."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from entroray.metrics import reward_entropy_law
from entroray.metrics.prediction import COLLISION, compare_forms, prediction_record
from entroray.metrics.step_detail import step_details
from entroray.roles import Learner, Scores
from entroray.train.prompt_entropy import PromptEntropy
from entroray.types import Group, Tokens, Version


@dataclass(frozen=True, kw_only=True)
class DiagnosticsSchedule:
    """How often to look, in steps from the first on; 0 is never."""

    diagnosis: int = 0
    prediction: int = 0
    window: int = 20
    """Predictions that slope and rank are taken over."""
    law: int = 0
    """Steps the reward-entropy law is fitted over."""
    probe: PromptEntropy | None = None
    """Prompts to read when a diagnosis is due."""


NO_DIAGNOSTICS = DiagnosticsSchedule()


class Diagnostics:
    """Diagnosis, prediction and law of the steps of one run."""

    def __init__(self, looks: DiagnosticsSchedule):
        self.looks = looks
        self.predictions: deque[dict[str, float]] = deque(maxlen=looks.window)
        self.points: deque[tuple[float, float]] = deque(maxlen=max(looks.law, 1))

    def wants(self, step: Version) -> tuple[str, ...]:
        """Further statistics the scores of `step` should bring; none unless its change is predicted."""
        return (COLLISION,) if _due(step, self.looks.prediction) else ()

    def changed(self, tokens: Tokens, weight: Tensor, after: Scores) -> dict[str, float]:
        """Predicted and realised change of entropy, `after` the same tokens' scores under the new weights.

        `weight` [N] is the factor of each token's grad log p (`objective.activity.gradient_weight`).
        """
        found = compare_forms(tokens, weight, torch.from_numpy(after["entropy"]))
        if found:
            self.predictions.append(found)
        return found | prediction_record(self.predictions)

    async def read(self, step: Version, learner: Learner) -> dict[str, float]:
        """Entropy of the probe's prompts under the weights of `step`, when a diagnosis is due."""
        probe = self.looks.probe
        return await probe.read(learner) if probe and _due(step, self.looks.diagnosis) else {}

    def diagnosed(
        self, step: Version, groups: Sequence[Group], tokens: Tokens, judged: Sequence[Group]
    ) -> dict[str, float]:
        """The metrics of `diagnose`, when they are due."""
        return step_details(groups, tokens, judged) if _due(step, self.looks.diagnosis) else {}

    def fitted(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """The law over the last steps, this one included."""
        if not self.looks.law or "entropy/mean" not in metrics:
            return {}
        self.points.append((metrics["entropy/mean"], metrics["correct/mean"]))
        found = reward_entropy_law.fit_law(*zip(*self.points, strict=True))
        return found.metrics() if found else {}

    def state(self) -> dict[str, Any]:
        return {"predictions": list(self.predictions), "points": list(map(list, self.points))}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.predictions.extend(state["predictions"])
        self.points.extend((h, r) for h, r in state["points"])


def _due(step: Version, every: int) -> bool:
    return every > 0 and (step - 1) % every == 0
