"""Token records: one Parquet row per response token, from which every entropy metric can be derived again."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from torch import Tensor

from entroray.metrics.step import aligned, kept_sizes
from entroray.observe.run_files import SCHEMAS
from entroray.observe.run_files import WORD as WORD
from entroray.observe.run_files import files as files
from entroray.observe.run_files import record_path as record_path
from entroray.observe.run_files import step_of as step_of
from entroray.train.batching import observed_tokens
from entroray.types import REASONS, Group, Rollout, Status, Tokens, Verdict

MEASURED = (
    *("logprob_behavior", "logprob_old", "entropy", "varentropy"),
    *("sampler_entropy", "sampler_varentropy", "vocabulary_entropy", "kept_mass"),
)
"""Columns that hold another number at each token: a dictionary of them would be longer than they are."""
ENCODINGS = dict.fromkeys(MEASURED, "BYTE_STREAM_SPLIT") | dict.fromkeys(
    ("rollout", "position"), "DELTA_BINARY_PACKED"
)
SCHEMA = SCHEMAS["tokens"]


def record_table(step: int, groups: Sequence[Group], tokens: Tokens) -> pa.Table:
    """A table of `SCHEMA` with one row per response token, masked ones included.

    Learner statistics outside the mask are null if not finite. ValueError if `tokens` are not the rollouts
    of `groups`, in their order.
    """
    rollouts = aligned(groups, tokens)
    judged = [(g.prompt.id, v) for g in groups for v in g.verdicts]
    length, mask = tokens.length.cpu().numpy(), tokens.mask.cpu().numpy()
    pairs = zip(rollouts, judged, strict=True)
    status = [rollout_status(r, v) for r, (_, v) in pairs]
    reason = [s if s != Status.OK else "masked" for s in status]
    parts = [parts_object(v.parts) for _, v in judged]

    def learnt(x: Tensor) -> pa.Array:
        values = x.detach().cpu().float().numpy()
        return _unless(~mask & ~np.isfinite(values), values)

    sampled = lambda name: np.concatenate([np.empty(0, np.int32), *(getattr(r, name) for r in rollouts)])
    per_row = lambda values, kind=np.float32: np.repeat(np.array(values, kind), length)
    row = per_row(range(len(rollouts)), np.int32)
    size = kept_sizes(rollouts)
    of_sets = {n: _known(n, tokens, len(row), size) for n in ("vocabulary_entropy", "kept_mass")}

    columns = {
        "step": np.full(len(row), step, np.int32),
        "version": sampled("versions"),
        "prompt_id": _words([name for name, _ in judged], row),
        "rollout": row,
        "position": tokens.position.cpu().numpy().astype(np.int32),
        "token_id": sampled("token_ids"),
        "logprob_behavior": learnt(tokens.behavior_logprobs),
        "logprob_old": learnt(tokens.old_logprobs),
        "entropy": learnt(tokens.entropy),
        "varentropy": learnt(tokens.varentropy),
        "temperature": learnt(tokens.temperature),
        **{f"sampler_{name}": _unless(np.isnan(x), x) for name, x in _drawn(rollouts, per_row).items()},
        **of_sets,
        "kept_size": _unless(size == 0, size),
        "advantage": learnt(tokens.advantages),
        "scale": learnt(tokens.scale),
        "selected": tokens.selected.cpu().numpy(),
        "mask_reason": _reasons(reason, row, mask, observed_tokens(rollouts)),
        "reward": per_row([v.reward for _, v in judged]),
        "correct": per_row([v.correct for _, v in judged]),
        "parts": _words(parts, row, null=per_row([not each for each in parts], bool)),
        "status": _words(status, row),
        "replayed": per_row([r.replayed for r in rollouts], bool),
    }
    return pa.table(columns, schema=SCHEMA)


def _known(name: str, tokens: Tokens, count: int, size: NDArray[np.int32]) -> pa.Array:
    """A statistic that is measured beside sets, null where a token has none."""
    if name not in tokens.extra or not size.any():
        return pa.nulls(count, pa.float32())
    return _unless(size == 0, tokens.extra[name].detach().cpu().float().numpy())


def _unless(null: NDArray[np.bool_], values: NDArray) -> pa.Array:
    return pa.array(values, mask=null if null.any() else None)


def rollout_status(rollout: Rollout, verdict: Verdict) -> str:
    """`ok`, `truncated`, or why sampling or judging failed."""
    return str(rollout.status if verdict.status is Status.OK else verdict.status)


def parts_object(parts: Mapping[str, float]) -> str:
    """A JSON object, in which NaN is null; empty without parts."""
    finite = {name: value if np.isfinite(value) else None for name, value in parts.items()}
    return json.dumps(finite) if finite else ""


def write_records(file: Path, records: pa.Table, half: Sequence[str] = ()) -> None:
    """Write aside and rename, so that a reader sees the whole file or none.

    Nothing is lost, but in the columns of `half`, which get 16 bits: 3 digits of a number up to 65,504.
    """
    for name in half:
        place, field = records.schema.get_field_index(name), records.schema.field(name)
        records = records.set_column(place, field.with_type(pa.float16()), records[name].cast(pa.float16()))
    aside = file.with_name(file.name + ".part")
    file.parent.mkdir(parents=True, exist_ok=True)
    words = [name for name in records.column_names if name not in ENCODINGS]
    encodings = {name: how for name, how in ENCODINGS.items() if name not in half}  # DuckDB reads no others
    try:
        pq.write_table(records, aside, compression="zstd", use_dictionary=words, column_encoding=encodings)
        os.replace(aside, file)
    finally:
        aside.unlink(missing_ok=True)


def _drawn(rollouts: Sequence[Rollout], per_row: Callable[..., NDArray]) -> dict[str, NDArray[np.float32]]:
    """The sampler's own columns, NaN without notes."""
    otherwise = {
        "entropy": per_row([np.nan] * len(rollouts)),
        "varentropy": per_row([np.nan] * len(rollouts)),
        "temperature": per_row([r.temperature for r in rollouts]),
    }
    if not any(r.notes for r in rollouts):
        return otherwise
    edges = np.cumsum([r.length for r in rollouts])
    for name, column in otherwise.items():
        for r, end in zip(rollouts, edges, strict=True):
            if r.notes:
                column[end - r.length : end] = getattr(r.notes, name)
    return otherwise


def _reasons(
    per_row: Sequence[str], row: NDArray, mask: NDArray[np.bool_], observed: NDArray[np.int8]
) -> pa.Array:
    """Why a token is masked: the kind of observation that it is, else its rollout's status."""
    words = [*map(str, REASONS), *per_row]
    return _words(words, np.where(observed < 0, row + len(REASONS), observed), null=mask)


def _words(per_row: Sequence[str], row: NDArray, null: NDArray[np.bool_] | None = None) -> pa.Array:
    """A text per token, stored once for each distinct text."""
    words = {word: place for place, word in enumerate(dict.fromkeys(per_row))}
    code = np.array([words[word] for word in per_row], np.int32)[row]
    index = pa.array(code) if null is None else _unless(null, code)
    return pa.DictionaryArray.from_arrays(index, pa.array([*words], pa.string()))
