"""The driver costs the same for each group however many a step has, and writing leaves its loop alone."""

import asyncio
import os
import statistics
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from entroray.observe import token_records
from entroray.observe.journal import Journal
from entroray.train.batching import tokens_of
from entroray.train.threads import in_thread
from entroray.types import Batch, Group, Prompt, Rollout, Tokens, Verdict
from tests.bench.driver_cost import measured

HERE = Path(__file__).parents[2]
ON_THE_LOOP = 1e-7
"""Seconds a token, of writing metrics and token records."""
BYTES = 15.0
"""Of a token's record, where every column that is measured is another number at each token."""


@pytest.mark.bench
@pytest.mark.parametrize("lag", [0, 1])
def test_rollouts_a_second_do_not_fall_with_the_groups_of_a_step(lag: int) -> None:
    pairs = [[measured(HERE, groups, lag) for groups in (64, 8192)] for _ in range(3)]
    assert statistics.median(many / few for few, many in pairs) >= 0.8, f"rollouts a second: {pairs}"


def cutting(rows: int) -> float:
    """Seconds of cutting so many rows of 64 tokens into micro-batches of two, as an update does."""
    lengths, n = np.full(rows, 64, np.int32), 64 * rows
    batch = Batch(np.zeros(n, np.int32), lengths, np.zeros(n, np.int32), lengths, np.ones(rows, np.float32))
    columns = {name: torch.rand(n) for name in ("logprobs", "old_logprobs", "entropy")}
    tokens = Tokens.from_columns(**columns, lengths=lengths.tolist(), advantages=[0.0] * rows)
    pieces = np.split(np.random.default_rng(0).permutation(rows), rows // 2)
    began = time.process_time()
    batch.cut(pieces)
    tokens.cut(pieces)
    return time.process_time() - began


@pytest.mark.bench
def test_a_row_of_many_is_cut_into_a_micro_batch_at_the_cost_of_one_of_few() -> None:
    few, many = (min(cutting(rows) for _ in range(3)) for rows in (512, 8192))
    assert many / 8192 <= 1.5 * few / 512, f"512 rows in {few:.3f} s, 8,192 in {many:.3f} s"


def a_step(rows: int, length: int) -> tuple[list[Group], Tokens]:
    """Groups of 8 rollouts whose every number is drawn by chance."""
    rng = np.random.default_rng(0)
    column = lambda n: rng.random(n).astype(np.float32) * 4
    some = lambda: (rng.integers(0, 512, length, np.int32), -column(length), np.zeros(length, np.int32))
    verdicts = tuple(Verdict(float(i % 2), bool(i % 2)) for i in range(8))
    groups = [
        Group(
            Prompt(f"q{g}", "", (0,), ""),
            tuple(Rollout(f"q{g}", *some(), "", 1.0, length) for _ in range(8)),
            verdicts,
        )
        for g in range(rows // 8)
    ]
    scores = {name: column(rows * length) for name in ("logprobs", "entropy", "varentropy")}
    return groups, tokens_of(groups, [torch.zeros(8)] * len(groups), scores, 0)


@pytest.mark.bench
def test_a_step_is_written_at_no_cost_to_the_event_loop_and_in_few_bytes(tmp_path: Path) -> None:
    groups, tokens = a_step(4096, 64)
    book = Journal(tmp_path, tokens_every=1)

    async def write() -> float:
        began = time.thread_time()
        await in_thread(lambda: book.step(1, {"entropy/mean": 1.0}, groups, tokens))
        return time.thread_time() - began

    on_the_loop = asyncio.run(write()) / len(tokens.row)
    size = os.path.getsize(token_records.record_path(tmp_path, 1)) / len(tokens.row)
    assert on_the_loop <= ON_THE_LOOP and size <= BYTES, (on_the_loop, size)
