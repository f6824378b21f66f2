"""An update by the overhead that micro-batches are cut with: python -m tests.bench.microbatch_cost

A learner rank without Ray, in this process, with the tiny model: lengths by chance, mean 56, at most 256.
Each overhead of `policy.microbatches` takes its turn, so that a drifting machine shows in none.
"""

import argparse
import os
import socket
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from entroray.config import LearnerConfig, Model, WarmStartConfig
from entroray.objective import build_objective, count_tokens
from entroray.policy import microbatches
from entroray.policy.tiny_model import build_tiny_model
from entroray.rows import objective_row
from entroray.train.batching import assemble, tokens_of
from entroray.types import Group, Prompt, Rollout, Verdict
from entroray.workers import cluster

OVERHEADS = (16, 64, 128, 192, 256, 384, 512, 1024)


def rank_here(folder: str) -> Any:
    """A rank of a gang of one."""
    from entroray.workers.deepspeed_backend import DeepSpeedBackend
    from entroray.workers.learner_rank import LearnerRank, LearnerSettings

    settings = LearnerSettings(LearnerConfig(lr=1e-7), Model(path=folder), "plasma", 0, 1_000_000)
    rank = LearnerRank(0, settings, build_objective(objective_row("grpo")), DeepSpeedBackend)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    rank.start("127.0.0.1", port, 60.0)
    return rank


def groups_by_chance(rows: int) -> list[Group]:
    """Groups of 8 responses, half of them right."""
    random = np.random.default_rng(0)

    def rollout() -> Rollout:
        length = int(min(256, random.geometric(1 / 56)))
        drawn = random.integers(0, 250, length).astype(np.int32)
        flat = np.full(length, -np.log(260), dtype=np.float32)
        return Rollout("p", drawn, flat, np.zeros(length, np.int32), "", 1.0, 256)

    prompt = Prompt("p", "", tuple(range(12)), "")
    verdicts = tuple(Verdict(float(i % 2), bool(i % 2)) for i in range(8))
    return [Group(prompt, tuple(rollout() for _ in range(8)), verdicts) for _ in range(rows // 8)]


def pieces(rank: Any, groups: list[Group], overhead: int) -> list[Any]:
    """One update's micro-batches."""
    batch = assemble(groups)
    lengths = batch.prompt_lengths + batch.response_lengths
    with patch.object(microbatches, "OVERHEAD", overhead):
        plan = microbatches.plan_microbatches(lengths, ranks=1, token_budget=8192)[0]
    zero = np.zeros(len(batch.response_ids), dtype=np.float32)
    scores = {name: zero for name in ("logprobs", "entropy", "varentropy")}
    credited = rank.objective.credit(
        tokens_of(groups, [rank.objective.estimate(g) for g in groups], scores, 0)
    )
    counted = replace(credited, counts=count_tokens(credited))
    return [*zip(batch.cut(plan), counted.cut(plan), strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    asked = parser.parse_args()
    os.environ.update(cluster.environment() | cluster.CPU_ONLY)
    with tempfile.TemporaryDirectory() as folder:
        build_tiny_model(Path(folder), WarmStartConfig().size, seed=0)
        rank, groups = rank_here(folder), groups_by_chance(asked.rows)
        given = {overhead: pieces(rank, groups, overhead) for overhead in OVERHEADS}
        found: dict[int, list[float]] = {overhead: [] for overhead in OVERHEADS}
        for _ in range(asked.rounds + 1):
            for overhead, micros in given.items():
                began = time.perf_counter()
                rank.score_and_update(micros, rank.objective)
                found[overhead].append(time.perf_counter() - began)
        rank.stop()
    for overhead, seconds in found.items():
        middle = statistics.median(seconds[1:])
        print(f"overhead {overhead:5}: {len(given[overhead]):3} micro-batches, {middle:.3f} s an update")


if __name__ == "__main__":
    main()
