"""A whole run in one process: a policy that is a table of logits, a task that is one token.

Drives the true driver, stream and objectives; only the machines are tables.
"""

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from entroray.metrics import token_entropy
from entroray.objective import Objective, corrected
from entroray.policy.vocabulary_statistics import named
from entroray.roles import Prompts
from entroray.rollout.selection import Selection
from entroray.train.batching import with_scores
from entroray.train.diagnostics import NO_DIAGNOSTICS, DiagnosticsSchedule
from entroray.train.driver import Driver, Knobs, LoopSettings, Roles
from entroray.types import Batch, Draw, Group, Prompt, Rollout, Status, Tokens, TopTokens, Verdict

VOCABULARY, TARGET, LENGTH = 8, 3, 2


class ToyPrompts:
    """q0, q1, q2, ... without end."""

    position = 0

    def __next__(self) -> Prompt:
        self.position += 1
        return self.at(self.position - 1)

    def at(self, position: int) -> Prompt:
        return Prompt(f"q{position}", f"q{position}", (0,), str(TARGET))


class ToyWorld:
    """Generator, verifier, learner, sync and journal at once."""

    def __init__(
        self, objective: Objective, *, lr: float = 2.0, seed: int = 0, slow: str = "", bad: str = ""
    ):
        self.objective, self.lr, self.slow, self.bad = objective, lr, slow, bad
        self.rng = torch.Generator().manual_seed(seed)
        self.logits = torch.zeros(VOCABULARY, requires_grad=True)
        self.served, self.version = self.logits.detach().clone(), 0
        self.steps: list[dict[str, float]] = []
        self.events: list[str] = []
        self.trained: list[str] = []
        self.gate: asyncio.Event | None = None

    async def sample(
        self, prompt: Prompt, seeds: Sequence[int], draw: Draw, after: Sequence[int] = ()
    ) -> list[Rollout]:
        if draw.top_tokens:
            return [self._most_probable(prompt, draw)]
        if prompt.id == self.slow and self.gate:
            version, logp = self.version, self.served.log_softmax(-1)
            await self.gate.wait()
        else:
            await asyncio.sleep(0)
            version, logp = self.version, self.served.log_softmax(-1)
        return [self._draw(prompt, version, logp, tuple(after)) for _ in seeds]

    def _draw(self, prompt: Prompt, version: int, logp: torch.Tensor, after: tuple[int, ...]) -> Rollout:
        left = LENGTH - len(after)
        ids = torch.multinomial(logp.exp(), left, replacement=True, generator=self.rng)
        failed = prompt.id == self.bad
        return Rollout(
            prompt.id,
            ids.numpy().astype(np.int32),
            logp[ids].numpy(),
            np.full(left, version, dtype=np.int32),
            " ".join(map(str, [*after, *ids.tolist()])),
            1.0,
            LENGTH,
            Status.INFRA_FAILED if failed else Status.OK,
        )

    def _most_probable(self, prompt: Prompt, draw: Draw) -> Rollout:
        """One token, and those most probable in its place."""
        logp = self.served.log_softmax(-1)
        best = torch.argsort(logp, descending=True, stable=True)[: draw.top_tokens]
        ids, version = best[None].numpy().astype(np.int32), np.full(1, self.version, np.int32)
        columns = ids[0, :1], logp[best[:1]].numpy(), version
        top = TopTokens(ids, logp[best][None].exp().numpy())
        return Rollout(prompt.id, *columns, str(ids[0, 0]), 1.0, 1, Status.TRUNCATED, top_tokens=top)

    async def judge(self, prompt: Prompt, rollouts: Sequence[Rollout]) -> list[Verdict]:
        right = [float(r.token_ids[0] == int(prompt.reference)) for r in rollouts]
        return [Verdict(x, bool(x)) for x in right]

    def _see(self, batch: Batch) -> dict[str, torch.Tensor]:
        logp = self.logits.log_softmax(-1)
        entropy, varentropy = token_entropy(self.logits.expand(len(batch.response_ids), -1), 1.0)
        picked = logp[torch.from_numpy(batch.response_ids).long()]
        return {"logprobs": picked, "entropy": entropy, "varentropy": varentropy}

    async def score(
        self, batch: Batch, group: Any, updates: int = 1, extra: Sequence[str] = ()
    ) -> Mapping[str, np.ndarray]:
        for _ in range(5):  # what runs beside the learner gets its turns
            await asyncio.sleep(0)
        with torch.no_grad():
            more = {name: named(name)(self.logits[None].log_softmax(-1)) for name in extra}
            seen = self._see(batch) | {k: v.expand(len(batch.response_ids)) for k, v in more.items()}
            return {k: v.numpy() for k, v in seen.items()}

    async def update(
        self, batch: Batch, tokens: Tokens, objective: Objective, updates: int = 1, lr: float | None = None
    ) -> dict[str, float]:
        live = replace(tokens, **self._see(batch))
        loss = objective.loss(live) / objective.denominator(tokens.counts)
        (grad,) = torch.autograd.grad(loss, self.logits)
        with torch.no_grad():
            self.logits -= self.lr * grad
        return {"update/loss": loss.item()}

    async def score_and_update(
        self, batch: Batch, tokens: Tokens, objective: Objective, lr: float | None = None
    ) -> tuple[dict[str, float], Mapping[str, np.ndarray]]:
        scores = await self.score(batch, tokens.group.numpy())
        known = corrected(objective, with_scores(tokens, scores))
        return await self.update(batch, known, objective, 1, lr), scores

    async def __call__(self, version: int) -> dict[str, float]:
        self.served, self.version = self.logits.detach().clone(), version
        return {}

    def step(self, step: int, metrics: Mapping[str, float], groups: Sequence[Group], tokens: Tokens) -> None:
        self.steps.append({"step": step, **metrics})
        self.trained += [g.prompt.id for g in groups]

    def skipped(self, step: int, batch: Batch, tokens: Tokens) -> None:
        self.events.append("skipped")

    def event(self, kind: str, **fields: Any) -> None:
        self.events.append(kind)


PACE = LoopSettings(
    group_size=8,
    groups_per_step=4,
    max_lag=0,
    wait=True,
    resamples=2,
    refill_limit=10,
    max_failed=1.0,
    max_skipped=3,
    stall=20.0,
)


def driver(
    world: ToyWorld,
    *,
    diagnostics: DiagnosticsSchedule = NO_DIAGNOSTICS,
    prompts: Prompts | None = None,
    selection: Selection | None = None,
    **changes: Any,
) -> Driver:
    """The true driver over `world`."""
    roles = Roles(world, world, world, world, world)  # type: ignore[arg-type]
    pace, order = replace(PACE, **changes), prompts or ToyPrompts()
    knobs = Knobs(world.objective, Draw(1.0, LENGTH))
    return Driver(order, roles, knobs, pace, seed=0, diagnostics=diagnostics, selection=selection)


def trained(d: Driver, steps: int, state: dict | None = None) -> dict[int, dict]:
    """The driver's state after each step, up to `steps`; from `state` on, as read from a file."""
    states = {}

    async def run() -> None:
        if state:
            d.restore(json.loads(json.dumps(state)))
        await d.train(steps, after)

    async def after(step: int, metrics: object) -> None:
        states[step] = d.state()

    asyncio.run(run())
    return states
