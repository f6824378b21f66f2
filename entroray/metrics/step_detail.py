"""What lies behind the means of a step: where entropy sits, what moves it, how answers spread.

Everything is over response tokens whose mask is set, each once, at the sampling temperature, before the
update, in float64 after rounding to float32, unless the catalogue says otherwise.
"""

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


def step_details(groups: Sequence[Group], tokens: Tokens, judged: Sequence[Group] = ()) -> dict[str, float]:
    """The metrics of the catalogue that `describe` does not give; one over nothing is left out.

    What is of answers and lengths is of all `judged` draws where they are given: a filter that keeps the
    undecided ones would make pass@k 1 and a policy look well calibrated. ValueError where `tokens` are not
    the rollouts of `groups`, in their order.
    """
    if not aligned(groups, tokens):
        return {}
    metrics = _of_answers(judged or [draw for g in groups for draw in g.draws])
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


def _of_answers(groups: Sequence[Group]) -> dict[str, float]:
    rollouts = [r for g in groups for r in g.rollouts]
    correct = np.array([v.correct for g in groups for v in g.verdicts], bool)
    sure = calibration(groups, np.array([_mean_logprob(r) for r in rollouts]))
    return distinct(groups) | answers(groups) | pass_at(groups) | sure | _lengths(rollouts, correct)


def columns(tokens: Tokens, mask: NDArray[np.bool_]) -> Mapping[str, Column]:
    """The masked-in tokens' columns as the token records store them."""
    names = (
        "entropy",
        "varentropy",
        "old_logprobs",
        "behavior_logprobs",
        "advantages",
        "scale",
        "correction",
    )
    return {name: stored(getattr(tokens, name))[mask] for name in names}


def _decile(tokens: Tokens, mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Tenth of its own response that each token stands in, 0 to 9."""
    length = array(tokens.length)[array(tokens.row)]
    return (array(tokens.position) * DECILES // np.maximum(length, 1))[mask]


def _spread(column: Mapping[str, Column], decile: NDArray[np.int64]) -> dict[str, float]:
    """Varentropy's quantiles and sides, and both by position: `describe` has the rest of entropy's."""
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
    c = _centred(column["old_logprobs"]) * _centred(column["advantages"])
    low, high = CLIPPABLE
    metrics = {"covariance/mean": c.mean(), "covariance/clippable": ((c > low) & (c < high)).mean()}
    quantiles = np.quantile(c, list(COVARIANCE.values()))
    metrics |= {f"covariance/{name}": q for name, q in zip(COVARIANCE, quantiles, strict=True)}
    return {name: float(value) for name, value in metrics.items()}


def quadrants(column: Mapping[str, Column]) -> dict[str, float]:
    """Shares of tokens with A != 0 by the signs of A and surprise - H; 1, 4 lower H (arXiv 2602.09782).

    Most tokens of a confident policy are sure and hardly move it, so `lowering` weighs each by its effect on
    H to first order, A scale correction (ln p + H); left out where there is none.
    """
    a, odd = column["advantages"], column["old_logprobs"] + column["entropy"]
    moved = max(1, int((a != 0).sum()))
    chosen = {
        1: (a > 0) & (odd >= 0),
        2: (a > 0) & (odd < 0),
        3: (a < 0) & (odd >= 0),
        4: (a < 0) & (odd < 0),
    }
    metrics = {f"quadrants/e{n}": float(where.sum() / moved) for n, where in chosen.items()}
    fall = a * column["scale"] * column["correction"] * odd
    if fall.any():
        metrics["quadrants/lowering"] = float(fall[fall > 0].sum() / np.abs(fall).sum())
    return metrics


def _importance(column: Mapping[str, Column]) -> dict[str, float]:
    """Learner over sampler, before any correction of the objective; and what that correction does."""
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
    """Of the tokens drawn in it, as they were drawn; NaN where there are none."""
    drawn = rollout.logprobs[rollout.observed < 0]
    return float(drawn.mean(dtype=np.float64)) if len(drawn) else math.nan


def _centred(x: Column) -> Column:
    return x - x.mean()
