"""Pools and gangs of actors in the shape of the roles the driver knows."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from entroray.engine.generator import Generator
from entroray.engine.vllm_request import QUEUE, Request
from entroray.errors import InfrastructureError
from entroray.metrics.update import update_metrics
from entroray.objective import Objective, count_tokens
from entroray.ops import token_places
from entroray.policy.microbatches import Rows, cut_by_groups, plan_microbatches
from entroray.roles import Scores
from entroray.types import Answer, Batch, Draw, Prompt, Rollout, Tokens, Verdict
from entroray.workers.cluster import Gang
from entroray.workers.engine_pool import EnginePool
from entroray.workers.verifier_pool import VerifierPool


@dataclass(frozen=True)
class GeneratorRole:
    """One engine, or a pool of them, as a Generator."""

    engine: EnginePool | Generator
    deadline: float
    """Seconds from the first token of a response, or of a turn of it, to its last."""
    queue: float = QUEUE
    """Seconds of waiting for a first token, and for a sign of the engine's life, at most."""

    async def sample(
        self, prompt: Prompt, seeds: Sequence[int], draw: Draw, after: Sequence[int] = ()
    ) -> list[Rollout]:
        begun, ids = tuple(after), prompt.token_ids
        request = Request(prompt.id, ids, tuple(seeds), draw, self.deadline, begun, self.queue)
        drawn = await self.engine.sample(request)
        return [replace(r, seed=seed) for r, seed in zip(drawn, seeds, strict=True)]


@dataclass(frozen=True)
class VerifierRole:
    """The pool of verifiers as a Verifier, and as the Tool whose calls they run."""

    pool: VerifierPool
    deadline: float
    """Of the whole call, queue included; each item has its own inside the verifier."""

    async def judge(self, prompt: Prompt, rollouts: Sequence[Rollout]) -> list[Verdict]:
        bare = [r if r.kept is None else replace(r, kept=None) for r in rollouts]  # which no judge reads
        return await self.pool.call(lambda h: h.judge.remote(prompt, bare), deadline=self.deadline)

    async def answer(self, prompt: Prompt, calls: Sequence[str]) -> list[Answer]:
        return await self.pool.call(lambda h: h.answer.remote(prompt, list(calls)), deadline=self.deadline)


@dataclass(frozen=True)
class LearnerRole:
    """The gang of ranks as a Learner: cuts rows into updates and micro-batches, gathers columns."""

    gang: Gang
    token_budget: int
    deadline: float
    engines: EnginePool | None = None
    """Those that must leave each rank the card that one of them shares with it, until the next sync."""
    plan: Callable[..., list[list[Rows]]] = plan_microbatches
    """Or `plan_packed`, where ranks lay rows end to end."""

    async def score(
        self, batch: Batch, group: NDArray[np.int64], updates: int = 1, extra: Sequence[str] = ()
    ) -> Scores:
        """Scored in the micro-batches it will be updated in, so that the first ratio is exactly 1."""
        await self._take_card()
        plans = self._plans(batch, group, min(updates, len(np.unique(group))))
        per_rank = [[m for p in plans for m in p[rank]] for rank in range(len(self.gang.handles))]
        batches = await asyncio.to_thread(lambda: [*map(batch.cut, per_rank)])
        scored = await self.gang.all(
            lambda rank, h: h.score.remote(batches[rank], tuple(extra)), deadline=self.deadline
        )
        return _scatter(batch.response_lengths, per_rank, scored)

    async def update(
        self, batch: Batch, tokens: Tokens, objective: Objective, updates: int = 1, lr: float | None = None
    ) -> dict[str, float]:
        """`updates` optimizer updates, each over whole groups, with its own global counts."""
        await self._take_card()  # a warm start has scored nothing before
        plans = self._plans(batch, tokens.group.numpy(), updates)
        return _summary([await self._update("update", batch, tokens, m, objective, lr) for m in plans])

    async def score_and_update(
        self, batch: Batch, tokens: Tokens, objective: Objective, lr: float | None = None
    ) -> tuple[dict[str, float], Scores]:
        """In the micro-batches that `score` and `update` would take."""
        await self._take_card()
        (micros,) = self._plans(batch, tokens.group.numpy(), 1)
        done = await self._update("score_and_update", batch, tokens, micros, objective, lr)
        sums, columns = zip(*done, strict=True)
        return _summary([list(sums)]), _scatter(batch.response_lengths, micros, list(columns))

    async def _update(
        self, call: str, batch: Batch, tokens: Tokens, micros: list[list[Rows]], *settings: Any
    ) -> list[Any]:
        """What each rank's `call` gives for one optimizer update over its `micros`."""
        rows = np.sort(np.concatenate([*chain.from_iterable(micros)]))
        own = tokens if len(rows) == batch.num_rows else tokens.take(torch.from_numpy(rows))
        counted = replace(tokens, counts=count_tokens(own))
        parts = lambda r: [*zip(batch.cut(r), counted.cut(r), strict=True)]
        cut = await asyncio.to_thread(lambda: [*map(parts, micros)])
        return await self.gang.all(
            lambda rank, h: getattr(h, call).remote(cut[rank], *settings), deadline=self.deadline
        )

    async def _take_card(self) -> None:
        if self.engines:
            await rest(self.engines, self.deadline)

    def _plans(self, batch: Batch, group: NDArray[np.int64], updates: int) -> list[list[list[Rows]]]:
        """[update][rank][micro-batch] -> rows."""
        lengths = batch.prompt_lengths + batch.response_lengths
        plans = []
        for rows in cut_by_groups(group, updates):
            local = self.plan(lengths[rows], ranks=len(self.gang.handles), token_budget=self.token_budget)
            plans.append([[rows[m] for m in micros] for micros in local])
        return plans


async def rest(engines: EnginePool, deadline: float) -> None:
    """Every engine leaves its card until the next sync; one that is starting in place of another starts
    first, for it would fill the card of a rank at work. InfrastructureError after `deadline` seconds."""
    sleep, what, ends = lambda h: h.sleep.remote(), "sleeping", time.monotonic() + deadline
    asleep = False
    while not asleep:
        if (left := ends - time.monotonic()) <= 0:
            raise InfrastructureError(
                f"engines have not left their cards within {deadline:.0f} s: raise driver.call_deadline"
            )
        if engines.replacing:
            await asyncio.wait([*engines.replacing], timeout=left)
        else:
            await engines.call_all(sleep, deadline=left, what=what, newcomers=True)
            asleep = not engines.replacing  # that one is dead may be seen as it is told to sleep


def _scatter(
    lengths: NDArray[np.int32], per_rank: list[list[Rows]], scored: list[list[dict[str, NDArray]]]
) -> Scores:
    """Each rank's columns back to the order of the batch."""
    out: dict[str, NDArray[np.float32]] = {}
    for micros, columns in zip(per_rank, scored, strict=True):
        for places, column in zip(token_places(lengths, micros), columns, strict=True):
            for name, values in column.items():
                if name not in out:
                    out[name] = np.zeros(lengths.sum(), dtype=np.float32)
                out[name][places] = values[: len(places)]
    return out


def _summary(updates: list[list[dict[str, float]]]) -> dict[str, float]:
    """Sums of all ranks and updates -> metrics of the step."""
    applied = [u for u in updates if not u[0]["skipped"]] or updates  # a skipped one has no loss to speak of
    ranks = [r for update in applied for r in update]
    tokens = max(1.0, sum(r["tokens"] for r in ranks))
    return {
        "update/loss": sum(r["loss"] for r in ranks) / len(applied),
        "update/grad_norm": sum(u[0]["grad_norm"] for u in applied) / len(applied),
        "update/skipped": sum(u[0]["skipped"] for u in updates),
        "update/lr": updates[-1][0]["lr"],
        "update/ratio_max": max(r["ratio_max"] for r in ranks),
        "update/entropy": sum(r["entropy"] for r in ranks) / tokens,
        **update_metrics(ranks, tokens),
        **_by_rule(ranks),
    }


def _by_rule(sums: list[dict[str, float]]) -> dict[str, float]:
    """Tokens that each rule inside the update touched, all updates together."""
    total: Counter[str] = Counter()
    for each in sums:
        for name in (n for n in each if n.startswith("rule:")):
            total[f"objective/{name.removeprefix('rule:')}_tokens"] += each[name]  # type: ignore[assignment]
    return dict(total)
