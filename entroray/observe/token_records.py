"""Token records: one Parquet row per response token, from which every entropy metric can be derived again."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from torch import Tensor

from entroray.metrics.step import aligned
from entroray.train.batching import observed_tokens
from entroray.types import REASONS, Group, Rollout, Status, Tokens, Verdict

UNITS = {
    "logprob_behavior": "nats",
    "logprob_old": "nats",
    "entropy": "nats",
    "varentropy": "nats^2",
    "version": "committed steps; the learner was at step - 1",
    "rollout": "row within the step",
    "temperature": "of the policy, in the learner too",
    "sampler_entropy": "nats, before shaping; null where the sampler kept no notes",
    "sampler_varentropy": "nats^2, before shaping",
    "sampler_temperature": "really drawn at; 0 the likeliest was taken, null inserted",
    "mask_reason": "null where the token counts in the aggregates",
    "replayed": "the rollout is a success of an earlier step; its version says which",
}


def record_path(run_dir: Path, step: int) -> Path:
    """Where the records of `step` lie."""
    return run_dir / "tokens" / f"step-{step:06d}.parquet"


def step_of(file: Path) -> int:
    """The step that `file` holds the records of."""
    return int(file.stem.removeprefix("step-"))


def files(run_dir: Path) -> list[Path]:
    """Every record file of the run, oldest step first."""
    return sorted((run_dir / "tokens").glob("step-*.parquet"), key=step_of)


def record_table(step: int, groups: Sequence[Group], tokens: Tokens) -> pa.Table:
    """One row per response token, masked ones included (`mask_reason` says why); logs in nats, float32.

    Learner statistics outside the mask that are not finite are null. ValueError where `tokens` are not
    the rollouts of `groups`, in their order.
    """
    rollouts = aligned(groups, tokens)
    judged = [(g.prompt.id, v) for g in groups for v in g.verdicts]
    row, mask = tokens.row.cpu().numpy(), tokens.mask.cpu().numpy()
    status = [_status(r.status, v) for r, (_, v) in zip(rollouts, judged, strict=True)]
    reason = [s if s != Status.OK else "masked" for s in status]
    drawn = _drawn(rollouts)

    def learnt(x: Tensor) -> pa.Array:
        values = x.detach().cpu().float().numpy()
        return pa.array(values, mask=~mask & ~np.isfinite(values))

    def sampled(name: str, dtype: type) -> pa.Array:
        return pa.array(np.concatenate([getattr(r, name) for r in rollouts] or [[]]).astype(dtype))

    def per_row(values: Sequence[float]) -> pa.Array:
        return pa.array(np.array(values, np.float32)[row])

    columns = {
        "step": pa.array(np.full(len(row), step, np.int32)),
        "version": sampled("versions", np.int32),
        "prompt_id": _words([name for name, _ in judged], row),
        "rollout": pa.array(row.astype(np.int32)),
        "position": pa.array(tokens.position.cpu().numpy().astype(np.int32)),
        "token_id": sampled("token_ids", np.int32),
        "logprob_behavior": learnt(tokens.behavior_logprobs),
        "logprob_old": learnt(tokens.old_logprobs),
        "entropy": learnt(tokens.entropy),
        "varentropy": learnt(tokens.varentropy),
        "temperature": learnt(tokens.temperature),
        **{f"sampler_{name}": pa.array(x, mask=np.isnan(x)) for name, x in drawn.items()},
        "advantage": learnt(tokens.advantages),
        "scale": learnt(tokens.scale),
        "selected": pa.array(tokens.selected.cpu().numpy()),
        "mask_reason": _reasons(reason, row, mask, observed_tokens(rollouts)),
        "reward": per_row([v.reward for _, v in judged]),
        "correct": per_row([v.correct for _, v in judged]),
        "status": _words(status, row),
        "replayed": pa.array(np.array([r.replayed for r in rollouts], bool)[row]),
    }
    return pa.table(columns, metadata=UNITS)


def write_records(file: Path, records: pa.Table) -> None:
    """Written aside and renamed, so that a reader sees the whole file or none."""
    aside = file.with_name(file.name + ".part")
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        pq.write_table(records, aside, compression="zstd")
        os.replace(aside, file)
    finally:
        aside.unlink(missing_ok=True)


def _drawn(rollouts: Sequence[Rollout]) -> dict[str, NDArray[np.float32]]:
    """The sampler's own columns, NaN where it has nothing to say."""

    def column(name: str, otherwise: Callable[[Rollout], float]) -> NDArray[np.float32]:
        plain = lambda r: np.full(r.length, otherwise(r), np.float32)
        pieces = [getattr(r.notes, name) if r.notes else plain(r) for r in rollouts]
        return np.concatenate(pieces or [[]]).astype(np.float32)

    unknown = lambda r: np.nan
    return {
        "entropy": column("entropy", unknown),
        "varentropy": column("varentropy", unknown),
        "temperature": column("temperature", lambda r: r.temperature),
    }


def _reasons(
    per_row: Sequence[str], row: NDArray, mask: NDArray[np.bool_], observed: NDArray[np.int8]
) -> pa.Array:
    """Why a token is outside the mask: what it is an observation of, else its rollout's reason."""
    words = [*map(str, REASONS), *per_row]
    return _words(words, np.where(observed < 0, row + len(REASONS), observed), null=mask)


def _status(sampled: Status, verdict: Verdict) -> str:
    return str(sampled if verdict.status is Status.OK else verdict.status)


def _words(per_row: Sequence[str], row: NDArray, null: NDArray[np.bool_] | None = None) -> pa.Array:
    """A text per token, stored once per distinct text."""
    words, code = np.unique(np.array(per_row, dtype=object), return_inverse=True)
    index = pa.array(code.astype(np.int32)[row], mask=null)
    return pa.DictionaryArray.from_arrays(index, pa.array(words.tolist(), pa.string()))
