"""Judged answers -> what an evaluation found: plain values, ready for JSON."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from entroray.evaluation.cot_decoding import Words, path_gaps
from entroray.metrics.answer_confidence import NoGap, most_confident, most_supported
from entroray.metrics.calibration import (
    auroc,
    brier,
    consistency,
    expected_error,
    keep_pairs,
    known,
    reliability,
)
from entroray.metrics.confidence_interval import bootstrap_intervals
from entroray.metrics.diversity import answers, distinct
from entroray.metrics.pass_at_k import count_right, is_right, majority_at_k, pass_all_k, pass_at_k
from entroray.metrics.positions import entropy_by_position, uncertain_tokens
from entroray.metrics.step import QUANTILES
from entroray.types import Group, Rollout, Status, Verdict

Column = NDArray[np.float64]
SHOWN = 2
"""Responses of each kind, right and wrong, that are kept whole."""


def summarise(
    greedy: Sequence[Group], sampled: Sequence[Group], paths: Sequence[Group], ks: Sequence[int], words: Words
) -> dict[str, Any]:
    """Accuracies with their 95 % intervals over prompts, and what stands behind them.

    `sampled` are n answers to each prompt, `greedy` one, or none; `paths` those of CoT-decoding, or none.
    A failed answer is wrong in every accuracy, is counted in `failed`, and has no say in anything else.
    """
    known = _usable(sampled)
    confident = _confidences(known)
    first = lambda g: float(is_right(g.verdicts[0]))
    each = ({"greedy": _column(greedy, first)} if greedy else {}) | accuracies(sampled, ks)
    decoded: dict[str, Any] = {}
    if paths:
        found = [path_gaps(group, words.text) for group in paths]
        each |= _decoded(paths, found)
        located = _located(paths, found)
        decoded = {"cot": _paths(found, *located)}
        confident |= {"gap": located} if len(located[0]) else {}
    table = np.stack(list(each.values()), axis=1)
    bounds = zip(each, bootstrap_intervals(table).tolist(), strict=True)
    return {
        **{name: float(column.mean()) for name, column in each.items()},
        "intervals": dict(bounds),
        "failed": _failed(sampled if sampled is greedy else [*greedy, *sampled]),
        "metrics": _metrics(known, confident),
        "calibration": {name: _diagram(*pair) for name, pair in confident.items()},
        **_entropies(known, words),
        **decoded,
        "responses": _shown(known, words),
        "each": {"id": [g.prompt.id for g in sampled], **{name: c.tolist() for name, c in each.items()}},
    }


def followed(groups: Sequence[Group], ks: Sequence[int]) -> dict[str, float]:
    """What is followed of a set over a run: avg@n with its 95 % interval over prompts, pass@k and maj@k.

    Beside them length, truncation and entropy of the answers that were judged, `failed` being the others.
    Entropy is of the policy's whole distribution at the temperature of the draw, whatever its top-p: nats a
    token. It is left out where the engine did not note it.
    """
    each, mean = accuracies(groups, ks), f"avg@{len(groups[0].verdicts)}"
    low, high = bootstrap_intervals(each[mean][:, None])[0].tolist()
    found = {name: float(column.mean()) for name, column in each.items() if not name.startswith("pass^")}
    found |= {f"{mean}_low": low, f"{mean}_high": high, "failed": float(sum(_failed(groups).values()))}
    rollouts = [r for group in _usable(groups) for r in group.rollouts]
    if not rollouts:
        return found
    entropy = np.concatenate([np.empty(0), *(_entropy(r) for r in rollouts if r.notes is not None)])
    drawn = entropy[~np.isnan(entropy)]
    return found | _lengths(rollouts) | ({"entropy/mean": float(drawn.mean())} if len(drawn) else {})


def _usable(groups: Sequence[Group]) -> list[Group]:
    """The answers that were sampled and judged, of the prompts that have any."""
    kept = [keep_pairs(g, lambda r, v: r.status.usable and v.status.usable) for g in groups]
    return [group for group in kept if group.rollouts]


def _lengths(rollouts: Sequence[Rollout]) -> dict[str, float]:
    cut = sum(r.status is Status.TRUNCATED for r in rollouts)
    mean = sum(r.length for r in rollouts) / len(rollouts)
    return {"length/mean": mean, "length/truncated": cut / len(rollouts)}


def accuracies(groups: Sequence[Group], ks: Sequence[int]) -> dict[str, Column]:
    """pass@k, pass^k, maj@k and avg@n of each prompt [P]; maj@k only where any answer was read at all."""
    n = len(groups[0].verdicts)
    each: dict[str, Column] = {}
    for k in ks:
        each[f"pass@{k}"] = _column(groups, lambda g, k=k: pass_at_k(n, count_right(g), k))
    for k in ks:
        each[f"pass^{k}"] = _column(groups, lambda g, k=k: pass_all_k(n, count_right(g), k))
    if any(v.answer is not None for g in groups for v in g.verdicts):
        for k in ks:
            each[f"maj@{k}"] = _column(groups, lambda g, k=k: _majority(g, k))
    return each | {f"avg@{n}": _column(groups, lambda g: count_right(g) / n)}


def _column(groups: Sequence[Group], score: Any) -> Column:
    return np.array([score(group) for group in groups], np.float64)


def _majority(group: Group, k: int) -> float:
    return majority_at_k([v.answer for v in group.verdicts], [float(is_right(v)) for v in group.verdicts], k)


def _failed(groups: Sequence[Group]) -> dict[str, int]:
    """Answers that are not there, by reason: the sampler's, else the judge's."""
    pairs = [p for g in groups for p in zip(g.rollouts, g.verdicts, strict=True)]
    reasons = [v.status if r.status.usable else r.status for r, v in pairs]
    return {str(reason): n for reason, n in Counter(reasons).items() if not reason.usable}


def _confidences(groups: Sequence[Group]) -> dict[str, tuple[Column, Column]]:
    """(confidence in [0, 1], correct) of the answers: share of their group that agrees, exp(mean ln p)."""
    pairs = [p for g in groups for p in zip(g.rollouts, g.verdicts, strict=True)]
    if not pairs:
        return {}
    correct = np.array([float(is_right(v)) for _, v in pairs])
    own = [r.logprobs[r.observed < 0] for r, _ in pairs]
    mean = np.array([float(logprobs.mean()) if len(logprobs) else math.nan for logprobs in own])
    agrees = np.array([c for g in groups for c in consistency(g)])
    return known({"consistency": agrees, "logprob": np.exp(mean)}, correct)


def _metrics(groups: Sequence[Group], confident: Mapping[str, tuple[Column, Column]]) -> dict[str, float]:
    """Names of the catalogue (entroray/metrics/README.md); one over nothing is left out."""
    rollouts = [r for g in groups for r in g.rollouts]
    if not rollouts:
        return {}
    found = distinct(groups) | answers(groups)
    found |= _lengths(rollouts)
    for name, pair in confident.items():
        for kind, score in (("ece", expected_error), ("brier", brier), ("auroc", auroc)):
            found[f"calibration/{kind}_{name}"] = score(*pair)
    return {name: float(value) for name, value in found.items() if math.isfinite(value)}


def _diagram(confidence: Column, correct: Column) -> dict[str, list[float | None]]:
    drawn = asdict(reliability(confidence, correct))
    plain = lambda column: [x if math.isfinite(x) else None for x in column.tolist()]
    return {name: plain(column) for name, column in drawn.items()}


def _entropies(groups: Sequence[Group], words: Words) -> dict[str, Any]:
    """Of the policy's whole distribution where each token was drawn, nats; nothing where it was not noted."""
    noted = [r for g in groups for r in g.rollouts if r.notes is not None and r.length]
    if not noted:
        return {}
    by_response = [_entropy(r) for r in noted]
    flat = np.concatenate(by_response)
    drawn = ~np.isnan(flat)
    if not drawn.any():
        return {}
    varentropy = np.concatenate([r.notes.varentropy for r in noted if r.notes]).astype(np.float64)
    ids = np.concatenate([r.token_ids for r in noted])
    entropy = flat[drawn]
    threshold, tokens = uncertain_tokens(ids[drawn], entropy)
    summary = {"entropy/mean": entropy.mean(), "varentropy/mean": varentropy[drawn].mean()}
    levels = np.quantile(entropy, list(QUANTILES.values()))
    summary |= {f"entropy/{name}": x for name, x in zip(QUANTILES, levels, strict=True)}
    return {
        "entropy": {name: float(x) for name, x in summary.items()},
        "positions": [asdict(place) for place in entropy_by_position(by_response)],
        "uncertain": {
            "above": threshold,
            "tokens": [{"text": words.name(u.token_id), **asdict(u)} for u in tokens],
        },
    }


def _entropy(rollout: Rollout) -> Column:
    """[L] nats, NaN where nobody drew."""
    assert rollout.notes is not None
    return np.where(rollout.observed < 0, rollout.notes.entropy, np.nan).astype(np.float64)


def _decoded(paths: Sequence[Group], found: Sequence[Sequence[float | NoGap]]) -> dict[str, Column]:
    """Whether the surest path is right, and that of the best supported answer [P]; wrong where none is."""
    chosen = {
        "cot/surest": [most_confident(g) for g in found],
        "cot/supported": [
            most_supported(g, [v.answer for v in group.verdicts])
            for g, group in zip(found, paths, strict=True)
        ],
    }
    hit = lambda group, i: float(i is not None and is_right(group.verdicts[i]))
    return {name: np.array([hit(*p) for p in zip(paths, at, strict=True)]) for name, at in chosen.items()}


def _paths(found: Sequence[Sequence[float | NoGap]], confidence: Column, correct: Column) -> dict[str, Any]:
    """How many paths have a gap, why the others have none, and the mean gap of right and wrong ones."""
    lost = Counter(str(g) for each in found for g in each if isinstance(g, NoGap))
    sides = {"gap_right": confidence[correct >= 1], "gap_wrong": confidence[correct < 1]}
    means = {name: float(side.mean()) for name, side in sides.items() if len(side)}
    without = sum(all(isinstance(g, NoGap) for g in each) for each in found)
    counts = {"paths": sum(map(len, found)), "located": len(confidence), "prompts_without": without}
    return {**counts, "lost": dict(lost), **means}


def _located(paths: Sequence[Group], found: Sequence[Sequence[float | NoGap]]) -> tuple[Column, Column]:
    """(gap, correct) of the paths whose answer was found."""
    pairs = [
        (g, float(is_right(v)))
        for group, each in zip(paths, found, strict=True)
        for g, v in zip(each, group.verdicts, strict=True)
        if not isinstance(g, NoGap)
    ]
    both = np.array(pairs, np.float64).reshape(-1, 2)
    return both[:, 0], both[:, 1]


def _shown(groups: Sequence[Group], words: Words) -> list[dict[str, Any]]:
    """The first right and the first wrong answers, of prompts answered both ways before others."""
    mixed = sorted(groups, key=lambda g: len({is_right(v) for v in g.verdicts}) < 2)  # stable
    pairs = [p for g in mixed for p in _first_of_each(g)]
    chosen = [p for kind in (True, False) for p in [p for p in pairs if is_right(p[2]) is kind][:SHOWN]]
    return [_response(*p, words) for p in chosen]


def _first_of_each(group: Group) -> list[tuple[Group, Rollout, Verdict]]:
    first: dict[bool, tuple[Group, Rollout, Verdict]] = {}
    for rollout, verdict in zip(group.rollouts, group.verdicts, strict=True):
        first.setdefault(is_right(verdict), (group, rollout, verdict))
    return list(first.values())


def _response(group: Group, rollout: Rollout, verdict: Verdict, words: Words) -> dict[str, Any]:
    entropy = _entropy(rollout).tolist() if rollout.notes is not None else [math.nan] * rollout.length
    return {
        "prompt": group.prompt.text,
        "reference": group.prompt.reference,
        "text": rollout.text,
        "answer": verdict.answer,
        "right": is_right(verdict),
        "right_of_prompt": f"{count_right(group)} of {len(group.verdicts)}",
        "status": str(verdict.status),
        "tokens": [
            [words.name(int(t)), h if math.isfinite(h) else None]
            for t, h in zip(rollout.token_ids, entropy, strict=True)
        ],
    }
