"""Details of a step, every `observe.diagnosis.every` steps: the spread of entropy, what moves it, answers."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from entroray.metrics.calibration import calibration
from entroray.metrics.diversity import answers, distinct, pass_at
from entroray.metrics.step import QUANTILES, aligned, array, stored
from entroray.types import Group, Rollout, Tokens

Column = NDArray[np.float64]
COVARIANCE = {"p2": 0.02, "p50": 0.5, "p80": 0.8, "p98": 0.98, "p99_8": 0.998}
"""The slices of table 1 of arXiv 2505.22617, and the other end."""
CLIPPABLE = (1.0, 5.0)
"""Band of the covariance proxy that Clip-Cov draws from (arXiv 2505.22617)."""
DECILES = 10
COLUMNS = (
    *("entropy", "varentropy", "old_logprobs", "behavior_logprobs"),
    *("advantages", "scale", "correction"),
)


def step_details(groups: Sequence[Group], tokens: Tokens, judged: Sequence[Group] = ()) -> dict[str, float]:
    """The family `details` of the catalogue; a metric over nothing is left out.

    Metrics of answers and lengths are over all `judged` draws, if given: over undecided groups alone pass@k
    would be 1 and the policy look well calibrated. ValueError if `tokens` are not the rollouts of `groups`,
    in their order.
    """
    if not aligned(groups, tokens):
        return {}
    metrics = _answer_metrics(judged or [draw for g in groups for draw in g.draws])
    mask = array(tokens.mask)
    if not mask.any():
        return metrics
    column = columns(tokens, mask)
    decile = _decile(tokens, mask)
    return metrics | {
        **_spread(column, decile),
        **_covariance(column),
        **quadrants(column),
        **_importance(column),
        "advantages/zero": float((column["advantages"] == 0).mean()),
    }


def _answer_metrics(groups: Sequence[Group]) -> dict[str, float]:
    rollouts = [r for g in groups for r in g.rollouts]
    correct = np.array([v.correct for g in groups for v in g.verdicts], bool)
    sure = calibration(groups, np.array([_mean_logprob(r) for r in rollouts]))
    return distinct(groups) | answers(groups) | pass_at(groups) | sure | _lengths(rollouts, correct)


def columns(tokens: Tokens, mask: NDArray[np.bool_]) -> Mapping[str, Column]:
    """The masked-in tokens' columns as the token records store them."""
    return {name: stored(getattr(tokens, name))[mask] for name in COLUMNS}


def _decile(tokens: Tokens, mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Tenth of its own response that each token stands in, 0 to 9."""
    length = array(tokens.length)[array(tokens.row)]
    return (array(tokens.position) * DECILES // np.maximum(length, 1))[mask]


def _spread(column: Mapping[str, Column], decile: NDArray[np.int64]) -> dict[str, float]:
    """Quantiles and sides of varentropy, and entropy and varentropy by position."""
    v, a = column["varentropy"], column["advantages"]
    quantiles = np.quantile(v, list(QUANTILES.values()))
    metrics = {f"varentropy/{name}": float(q) for name, q in zip(QUANTILES, quantiles, strict=True)}
    for side, chosen in {"positive": a > 0, "negative": a < 0}.items():
        if chosen.any():
            metrics[f"varentropy/{side}"] = float(v[chosen].mean())
    count = np.bincount(decile, minlength=DECILES)
    for name in ("entropy", "varentropy"):
        total = np.bincount(decile, column[name], DECILES)
        metrics |= {f"{name}/tenth_{d + 1}": total[d] / count[d] for d in np.flatnonzero(count)}
    return {name: float(value) for name, value in metrics.items()}


def _covariance(column: Mapping[str, Column]) -> dict[str, float]:
    """(log p - mean)(A - mean) of each token: Clip-Cov's statistic, not the covariance within a state."""
    logp, a = column["old_logprobs"], column["advantages"]
    c = (logp - logp.mean()) * (a - a.mean())
    low, high = CLIPPABLE
    metrics = {"covariance/mean": c.mean(), "covariance/clippable": ((c > low) & (c < high)).mean()}
    quantiles = np.quantile(c, list(COVARIANCE.values()))
    metrics |= {f"covariance/{name}": q for name, q in zip(COVARIANCE, quantiles, strict=True)}
    return {name: float(value) for name, value in metrics.items()}


def quadrants(column: Mapping[str, Column]) -> dict[str, float]:
    """Shares of tokens with A != 0 by the signs of A and surprise - H; 1 and 4 lower H (arXiv 2602.09782).

    Most tokens of a confident policy hardly move it, so `lowering` weighs each token by its first-order
    effect on H, A scale correction (ln p + H); it is left out if no token has any.
    """
    a, odd = column["advantages"], column["old_logprobs"] + column["entropy"]
    moved = max(1, int((a != 0).sum()))
    chosen = [side & sure for side in (a > 0, a < 0) for sure in (odd >= 0, odd < 0)]
    metrics = {f"quadrants/e{n}": float(where.sum() / moved) for n, where in enumerate(chosen, start=1)}
    fall = a * column["scale"] * column["correction"] * odd
    if fall.any():
        metrics["quadrants/lowering"] = float(fall[fall > 0].sum() / np.abs(fall).sum())
    return metrics


def _importance(column: Mapping[str, Column]) -> dict[str, float]:
    """Ratio of learner to sampler before the objective's correction, and the share that it zeroes."""
    gap = column["old_logprobs"] - column["behavior_logprobs"]
    weight = np.exp(np.clip(gap, -20, 20))
    metrics = {
        "importance/mean": weight.mean(),
        "importance/max": weight.max(),
        "importance/p99": np.quantile(weight, 0.99),
        "importance/effective": weight.sum() ** 2 / (len(weight) * np.square(weight).sum()),
        "importance/zeroed": (column["correction"] == 0).mean(),
        "mismatch/p99": np.quantile(np.abs(gap), 0.99),
    }
    return {name: float(value) for name, value in metrics.items()}


def _lengths(rollouts: Sequence[Rollout], correct: NDArray) -> dict[str, float]:
    length = np.array([r.length for r in rollouts], np.float64)
    metrics = {"length/p95": float(np.quantile(length, 0.95))}
    for name, chosen in {"right": correct, "wrong": ~correct}.items():
        if chosen.any():
            metrics[f"length/{name}"] = float(length[chosen].mean())
    return metrics


def _mean_logprob(rollout: Rollout) -> float:
    """Mean ln p of the tokens drawn in the rollout, as drawn; NaN without any."""
    drawn = rollout.logprobs[rollout.observed < 0]
    return float(drawn.mean(dtype=np.float64)) if len(drawn) else math.nan
