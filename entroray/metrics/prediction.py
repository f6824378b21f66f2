"""The change of entropy by a step, predicted to first order and realised.

README.md of this folder derives the forms. Every form takes `weight` [N], the factor of grad log p of each
token in the update (`objective.activity.gradient_weight`).
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from entroray.metrics.calibration import mean_ranks
from entroray.metrics.step import array
from entroray.types import Tokens

FORMS = ("exact", "natural", "proxy")
MINIMUM_STEPS = 4
"""Steps that a slope or a rank correlation needs."""
COLLISION = "mean_discriminator"
"""Key of `Tokens.extra`: E_p S of each token."""


def exact(t: Tokens, weight: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """-weight (S_a - E_p S) of each token, nats per unit step; needs `COLLISION` in `extra`."""
    logp, entropy = t.old_logprobs.double(), t.entropy.double()
    return -weight.double() * (logp.exp() * (logp + entropy) - t.extra[COLLISION].double())


def natural(t: Tokens, weight: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """-weight (ln p_a + H) of each token, nats per unit step of the natural gradient."""
    return -weight.double() * (t.old_logprobs.double() + t.entropy.double())


def proxy(t: Tokens, weight: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """-(ln p - mean)(weight - mean) of each token, means over the masked-in tokens."""
    logp, a = t.old_logprobs.double(), weight.double()
    return -(logp - logp[t.mask].mean()) * (a - a[t.mask].mean())


def compare_forms(t: Tokens, weight: Float[Tensor, " N"], entropy: Float[Tensor, " N"]) -> dict[str, float]:
    """Predicted change of the mean entropy by every form, and the change to `entropy` [N] after the update.

    `prediction_tokens_<form>` is the rank correlation of the two over this step's tokens. Empty if no
    token counts or the change is not finite.
    """
    if not bool(t.mask.any()):
        return {}
    change = (entropy.double() - t.entropy.double())[t.mask]
    if not bool(change.isfinite().all()):
        return {}
    forms = {"exact": exact, "natural": natural, "proxy": proxy}
    if COLLISION not in t.extra:
        del forms["exact"]
    predicted = {name: form(t, weight)[t.mask] for name, form in forms.items()}
    metrics = {"entropy/realised_change": float(change.mean())}
    for name, value in predicted.items():
        metrics[f"entropy/predicted_change_{name}"] = float(value.mean())
        metrics[f"entropy/prediction_tokens_{name}"] = rank_correlation(array(value), array(change))
    return metrics


def prediction_record(window: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Slope (through the origin) and rank correlation of realised on predicted change over steps.

    `window` holds metrics of `compare_forms`, oldest first; empty for fewer than 4 steps.
    """
    metrics = {}
    for form in FORMS:
        known = [m for m in window if f"entropy/predicted_change_{form}" in m]
        if len(known) < MINIMUM_STEPS:
            continue
        x = [m[f"entropy/predicted_change_{form}"] for m in known]
        y = [m["entropy/realised_change"] for m in known]
        metrics[f"entropy/prediction_slope_{form}"] = slope(x, y)
        metrics[f"entropy/prediction_rank_{form}"] = rank_correlation(x, y)
    return metrics


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Least-squares slope k of y = k x; 0 if every x is 0."""
    square = sum(a * a for a in x)
    return sum(a * b for a, b in zip(x, y, strict=True)) / square if square else 0.0


def rank_correlation(x: Sequence[float] | NDArray, y: Sequence[float] | NDArray) -> float:
    """Spearman's, ties sharing their mean rank, in [-1, 1]; 0 if either does not vary."""
    a, b = (torch.from_numpy(mean_ranks(np.asarray(v, np.float64))) for v in (x, y))
    a, b = a - a.mean(), b - b.mean()
    size = a.norm() * b.norm()
    return float((a @ b) / size) if size > 0 else 0.0
