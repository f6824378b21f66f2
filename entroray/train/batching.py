"""Groups -> Batch for the learner, and its scores -> Tokens for the objective."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from entroray.errors import InfrastructureError
from entroray.objective import Objective
from entroray.policy.head import TokenStats
from entroray.roles import Scores
from entroray.rollout.splice import join_sets
from entroray.types import Batch, Counts, Group, Rollout, Tokens, Version


def rollouts_of(groups: Sequence[Group]) -> list[Rollout]:
    """All rollouts, group by group: the order of rows everywhere."""
    return [rollout for group in groups for rollout in group.rollouts]


def group_index(groups: Sequence[Group]) -> np.ndarray:
    """[B] which group each row belongs to."""
    return np.repeat(np.arange(len(groups)), [len(g.rollouts) for g in groups])


def assemble(groups: Sequence[Group]) -> Batch:
    """Rows of prompt and response ids, flat, and the sets drawn from.

    InfrastructureError where some tokens were drawn from a set and others have none.
    """
    rollouts = rollouts_of(groups)
    kept = join_sets(rollouts)
    if kept is not None and ((kept.sizes == 0) & (observed_tokens(rollouts) < 0)).any():
        raise InfrastructureError(
            "tokens were drawn without the set that sampler.top_p and sampler.top_k left, beside others "
            "with theirs: one update needs the same of all; begin a new run"
        )
    prompts = [np.asarray(g.prompt.token_ids, dtype=np.int32) for g in groups for _ in g.rollouts]
    lengths = lambda rows: np.array([len(r) for r in rows], dtype=np.int32)
    responses = [r.token_ids for r in rollouts]
    return Batch(
        prompt_ids=np.concatenate(prompts),
        prompt_lengths=lengths(prompts),
        response_ids=np.concatenate(responses),
        response_lengths=lengths(responses),
        temperatures=np.array([r.temperature for r in rollouts], dtype=np.float32),
        kept=kept,
    )


def observed_tokens(rollouts: Sequence[Rollout]) -> NDArray[np.int8]:
    """[N] index into `types.REASONS` of the tokens that the policy did not choose, -1 elsewhere."""
    return np.concatenate([np.empty(0, dtype=np.int8), *(r.observed for r in rollouts)])


def unknown_scores(batch: Batch, objective: Objective) -> Scores:
    """NaN in place of what `objective` has scored, for a step whose scores come from its update."""
    names = {"logprobs", "entropy", "varentropy", *objective.statistics, *objective.needs & {"ref_logprobs"}}
    return dict.fromkeys(names, np.full(len(batch.response_ids), np.nan, dtype=np.float32))


def with_scores(tokens: Tokens, scores: Scores) -> Tokens:
    """`tokens` of a step under the policy that is about to be updated, as `scores` have it."""
    columns = _columns(scores)
    return replace(tokens, **columns | {"extra": {**tokens.extra, **columns["extra"]}})


def _columns(scores: Scores) -> dict[str, Any]:
    """Fields of `Tokens`."""
    column = {k: torch.from_numpy(np.asarray(v)) for k, v in scores.items()}
    known = {name: column.pop(name) for name in ("logprobs", "entropy", "varentropy")}
    old = {"old_logprobs": known["logprobs"], "ref_logprobs": column.pop("ref_logprobs", None)}
    return {**known, **old, "extra": column}


def tokens_of(
    groups: Sequence[Group],
    advantages: Sequence[Float[Tensor, " G"]],
    scores: Scores,
    step: Version,
    seed: int = 0,
) -> Tokens:
    """A scored batch as the policy that is about to be updated sees it; not yet credited.

    `seed` is the run's, for what is selected by chance.
    """
    rollouts = rollouts_of(groups)
    verdicts = [v for g in groups for v in g.verdicts]
    mask = torch.from_numpy(observed_tokens(rollouts) < 0)
    lengths = [r.length for r in rollouts]
    temperatures = torch.tensor([r.temperature for r in rollouts])
    return Tokens.from_columns(
        lengths=lengths,
        groups=group_index(groups).tolist(),
        advantages=torch.cat(list(advantages)).tolist(),
        mask=mask,
        **_columns(scores),
        behavior_logprobs=torch.from_numpy(np.concatenate([r.logprobs for r in rollouts])),
        temperature=temperatures.repeat_interleave(torch.tensor(lengths)),
        selected=mask,
        reward=torch.tensor([v.reward for v in verdicts]),
        correct=torch.tensor([float(v.correct) for v in verdicts]),
        version=torch.tensor([r.version for r in rollouts]),
        step=step,
        seed=seed,
        counts=Counts(int(mask.sum()), int(mask.sum()), len(rollouts), len(groups)),
        drawn_before=_drawn_before(rollouts),
    )


def _drawn_before(rollouts: Sequence[Rollout]) -> Tensor | None:
    branched = any(r.parent is not None for r in rollouts)
    return torch.tensor([r.drawn_before for r in rollouts]) if branched else None


def tokens_on(tokens: Tokens, device: torch.device) -> Tokens:
    """`tokens` with every tensor on `device`."""
    move = lambda v: v.to(device) if isinstance(v, Tensor) else v
    moved: dict[str, Any] = {k: move(v) for k, v in vars(tokens).items()}
    return replace(tokens, **moved | {"extra": {k: move(v) for k, v in tokens.extra.items()}})


def with_live_statistics(tokens: Tokens, stats: Mapping[str, Tensor]) -> Tokens:
    """`tokens` under the current policy: what the head computed in place of what was scored."""
    own = {name: x for name, x in stats.items() if name in TokenStats._fields}
    extra = {name: x for name, x in stats.items() if name not in TokenStats._fields}
    return replace(tokens, **own, extra={**tokens.extra, **extra})  # type: ignore[arg-type]
