"""Rollout records: one Parquet row per rollout, beside the token records of the same step."""

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from entroray.observe.run_files import SCHEMAS
from entroray.observe.token_records import parts_object, rollout_status
from entroray.types import Group

SCHEMA = SCHEMAS["rollouts"]


def rollout_table(step: int, groups: Sequence[Group]) -> pa.Table:
    """A table of `SCHEMA` with one row per rollout, in the order of the token records."""
    return pa.Table.from_pylist(list(_rows(step, groups)), schema=SCHEMA)


def _rows(step: int, groups: Sequence[Group]) -> Iterator[dict[str, Any]]:
    first = 0
    for at, group in enumerate(groups):
        rows = range(first, first + len(group.rollouts))
        first = rows.stop
        prompt = group.prompt
        for row, r, v in zip(rows, group.rollouts, group.verdicts, strict=True):
            yield {
                "step": step, "group": at, "rollout": row, "siblings": [i for i in rows if i != row],
                "parent": None if r.parent is None else rows[r.parent],
                "prompt_id": prompt.id, "domain": prompt.domain, "prompt": prompt.text,
                "reference": prompt.reference, "response": r.text, "answer": v.answer,
                "reward": v.reward, "correct": v.correct, "parts": parts_object(v.parts) or None,
                "status": rollout_status(r, v), "detail": v.detail, "seed": r.seed,
                "version_first": r.version, "version_last": int(r.versions.max()) if r.length else 0,
                "length": r.length, "limit": r.limit, "temperature": r.temperature, "replayed": r.replayed,
            }  # fmt: skip
