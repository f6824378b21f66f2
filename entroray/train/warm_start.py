"""Supervised warm start through the same learner: right answers as rollouts, the `supervised` row as loss."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence

import numpy as np

from entroray.config import WarmStartConfig
from entroray.errors import PreflightError
from entroray.metrics.pass_at_k import is_right
from entroray.objective import Objective
from entroray.roles import Generator, Learner, Sync, Verifier
from entroray.seeds import seeds
from entroray.train.batching import assemble, tokens_of
from entroray.types import Draw, Group, Prompt, Rollout, Span, Verdict


def demonstration_group(prompt: Prompt, response: Sequence[int], spans: Sequence[Span] = ()) -> Group:
    """A right answer as a group of one; the `spans` of a tool are not learnt."""
    ids = np.asarray(response, dtype=np.int32)
    blank = np.zeros(len(ids))
    columns = ids, blank.astype(np.float32), blank.astype(np.int32)
    rollout = Rollout(prompt.id, *columns, "", 1.0, limit=len(ids), spans=tuple(spans))
    return Group(prompt, (rollout,), (Verdict(1.0, True),))


async def sampled_accuracy(
    generator: Generator, verifier: Verifier, prompts: Sequence[Prompt], draw: Draw, seed: int
) -> float:
    """Share of right answers, one sample a prompt, as training will sample; failures count as wrong."""

    async def one(index: int, prompt: Prompt) -> bool:
        rollouts = await generator.sample(prompt, seeds(seed, index, 0, 1), draw)
        return is_right((await verifier.judge(prompt, rollouts))[0])

    right = await asyncio.gather(*(one(i, p) for i, p in enumerate(prompts)))
    return sum(right) / len(right)


async def warm_start(
    demonstrations: Iterator[Group],
    learner: Learner,
    sync: Sync,
    objective: Objective,
    check: Callable[[], Awaitable[float]],
    settings: WarmStartConfig,
    report: Callable[[int, float, float], None],
) -> float:
    """Supervised steps until `await check()`, the sampled accuracy, reaches `settings.band[0]`; returns it.

    `report(step, loss, accuracy)` is called after every check. PreflightError if the band is not reached.
    """
    reached = 0.0
    for step in range(1, settings.max_steps + 1):
        groups = [next(demonstrations) for _ in range(settings.rows_per_step)]
        batch = assemble(groups)
        zero = np.zeros(len(batch.response_ids), dtype=np.float32)
        scores = {name: zero for name in ("logprobs", "entropy", "varentropy")}
        advantages = [objective.estimate(g) for g in groups]
        tokens = objective.credit(tokens_of(groups, advantages, scores, step))
        metrics = await learner.update(batch, tokens, objective)
        if step % settings.check_every == 0:
            await sync(step)
            reached = await check()
            report(step, metrics["update/loss"], reached)
            if reached >= settings.band[0]:
                return reached
    raise PreflightError(
        f"the warm start reached {reached:.2f} sampled accuracy in {settings.max_steps} steps, below "
        f"model.warm_start.band={list(settings.band)}: raise model.warm_start.max_steps, or lower the band"
    )


def overshoot_remedy(reached: float, settings: WarmStartConfig) -> str:
    """What to do about a warm start that ended at an accuracy above the band; empty if it did not."""
    if reached <= settings.band[1]:
        return ""
    return (
        f"above model.warm_start.band={list(settings.band)}: a model.warm_start.check_every below "
        f"{settings.check_every} looks before it is passed"
    )
