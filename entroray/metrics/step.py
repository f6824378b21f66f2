"""The metrics of one step: pure functions of its groups and tokens."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from entroray.metrics.branching import branch_metrics
from entroray.types import REASONS, Group, MaskReason, Rollout, Status, Tokens

QUANTILES = {"p20": 0.20, "p50": 0.50, "p80": 0.80, "p95": 0.95}


def step_metrics(groups: Sequence[Group], tokens: Tokens) -> dict[str, float]:
    """Metrics of the tokens trained on in one step; a metric over nothing is left out.

    `lag` is per token, in committed steps. `judged_metrics` has those of verdicts. ValueError if `tokens` are
    not the rollouts of `groups`, in their order.
    """
    rollouts = aligned(groups, tokens)
    if not rollouts:
        return {}
    mask = array(tokens.mask)
    metrics = _tool_metrics(rollouts) | branch_metrics(groups)
    if not mask.any():
        return metrics
    metrics |= (
        _entropy_metrics(tokens, mask) | _mismatch_metrics(tokens, mask) | _sampler_metrics(rollouts, tokens)
    )
    metrics |= _kept_metrics(rollouts, tokens, mask)
    return metrics | {
        "logprobs/mean": float(stored(tokens.old_logprobs)[mask].mean()),
        "advantages/mean_abs": float(np.abs(stored(tokens.advantages)[mask]).mean()),
        **_lag_metrics(rollouts, tokens.step, mask),
    }


def _lag_metrics(rollouts: Sequence[Rollout], step: int, mask: NDArray[np.bool_]) -> dict[str, float]:
    """Lag without replayed rollouts, whose age is `replay/age`."""
    fresh = np.repeat([not r.replayed for r in rollouts], [r.length for r in rollouts])
    lag = step - np.concatenate([r.versions for r in rollouts])[mask & fresh]
    return {"lag/mean": float(lag.mean()), "lag/max": float(lag.max())} if len(lag) else {}


def aligned(groups: Sequence[Group], tokens: Tokens) -> list[Rollout]:
    """The rollouts of `groups` in order, one for each row of `tokens`; ValueError if they differ."""
    rollouts = [r for group in groups for r in group.rollouts]
    given = [r.length for r in rollouts]
    if given != tokens.length.tolist() or sum(given) != len(tokens.row):
        raise ValueError(
            f"step {tokens.step}: tokens have {len(tokens.length)} rows of {len(tokens.row)} tokens in all, "
            f"the groups {len(given)} rollouts of {sum(given)}: pass the groups they were made from"
        )
    return rollouts


def stored(x: Float[Tensor, " N"]) -> NDArray[np.float64]:
    """`x` as the token records have it: rounded to float32, then widened."""
    return array(x.to(torch.float32)).astype(np.float64)


def array(x: Tensor) -> NDArray:
    """`x` for NumPy: detached, on the CPU."""
    return x.detach().cpu().numpy()


def lengths(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Mean and longest, tokens; share cut off by the limit or in a loop."""
    tokens = [r.length for r in rollouts]
    return {
        "length/mean": sum(tokens) / len(tokens),
        "length/max": float(max(tokens)),
        "length/truncated": sum(r.status is Status.TRUNCATED for r in rollouts) / len(rollouts),
    }


def _tool_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Calls of the tool and its answers; empty if no rollout called."""
    spans = [s for r in rollouts for s in r.spans if s.why in (MaskReason.TOOL, MaskReason.TOOL_ERROR)]
    if not spans:
        return {}
    return {
        "tool/calls": len(spans) / len(rollouts),
        "tool/share": sum(s.stop - s.start for s in spans) / sum(r.length for r in rollouts),
        "tool/failed": sum(s.why is MaskReason.TOOL_ERROR for s in spans) / len(spans),
    }


def _entropy_metrics(tokens: Tokens, mask: NDArray[np.bool_]) -> dict[str, float]:
    entropy, advantages = stored(tokens.entropy)[mask], stored(tokens.advantages)[mask]
    quantiles = np.quantile(entropy, list(QUANTILES.values()))
    metrics = {"entropy/mean": float(entropy.mean())}
    metrics |= {f"entropy/{name}": float(q) for name, q in zip(QUANTILES, quantiles, strict=True)}
    for name, chosen in {"positive": advantages > 0, "negative": advantages < 0}.items():
        if chosen.any():
            metrics[f"entropy/{name}"] = float(entropy[chosen].mean())
    return metrics | {"varentropy/mean": float(stored(tokens.varentropy)[mask].mean())}


def _kept_metrics(rollouts: Sequence[Rollout], tokens: Tokens, mask: NDArray[np.bool_]) -> dict[str, float]:
    """The sets that tokens were drawn from, and the entropy without them; empty where nothing was cut."""
    if all(r.kept is None for r in rollouts):
        return {}
    size = kept_sizes(rollouts)[mask]
    metrics = {"kept/size": float(size.mean()), "kept/alone": float((size == 1).mean())}
    for name, column in {"kept/mass": "kept_mass", "entropy/vocabulary": "vocabulary_entropy"}.items():
        if column in tokens.extra:
            metrics[name] = float(stored(tokens.extra[column])[mask].mean())
    return metrics


def kept_sizes(rollouts: Sequence[Rollout]) -> NDArray[np.int32]:
    """[N] tokens in the set that each was drawn from; 0 where it was drawn from no set."""
    sizes = (r.kept.sizes if r.kept else np.zeros(r.length, np.int32) for r in rollouts)
    return np.concatenate([np.empty(0, np.int32), *sizes])


def _sampler_metrics(rollouts: Sequence[Rollout], tokens: Tokens) -> dict[str, float]:
    """Tokens of rollouts with a sampler's notes, drawn or inserted; empty without them."""
    edges = np.cumsum([0, *(r.length for r in rollouts)])
    learner = array(tokens.extra.get("vocabulary_entropy", tokens.entropy))  # as the sampler's own
    rows = zip(rollouts, pairwise(edges), strict=True)
    noted = [(r.notes, _by_sampler(r), learner[a:b]) for r, (a, b) in rows if r.notes]
    if not sum(here.sum() for _, here, _ in noted):
        return {}
    temperature = np.concatenate([s.temperature[here] for s, here, _ in noted])
    gaps = np.concatenate([np.abs(s.entropy - h)[here] for s, here, h in noted])
    drawn = temperature[~np.isnan(temperature)]
    metrics = {"sampler/inserted": float(np.isnan(temperature).mean())}
    if len(known := gaps[~np.isnan(gaps)]):  # a piece without notes has none
        metrics["sampler/gap"] = float(known.max())
    if not len(drawn):
        return metrics
    top_tokens = float((drawn == 0).mean())
    return metrics | {"sampler/temperature": float(drawn.mean()), "sampler/likeliest": top_tokens}


def _by_sampler(rollout: Rollout) -> NDArray[np.bool_]:
    """[L] True if the sampler drew or inserted the token: not a prefix, forced or a tool's."""
    return (rollout.observed < 0) | (rollout.observed == REASONS.index(MaskReason.INSERTED))


def _mismatch_metrics(tokens: Tokens, mask: NDArray[np.bool_]) -> dict[str, float]:
    """`kl` is the mean of r - 1 - ln r with r = learner / sampler (k3): it estimates KL(sampler, learner)."""
    gap = (stored(tokens.old_logprobs) - stored(tokens.behavior_logprobs))[mask]
    return {
        "mismatch/mean_abs": float(np.abs(gap).mean()),
        "mismatch/max": float(np.abs(gap).max()),
        "mismatch/kl": float((np.expm1(gap) - gap).mean()),
    }
