"""The driver's view of a sync: weights served everywhere, and both sides compared on a fixed text."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from entroray.config import DriverConfig
from entroray.errors import SyncError
from entroray.workers.cluster import Gang
from entroray.workers.engine_pool import EnginePool


@dataclass
class WeightSync:
    """Moves the engines to the learner's weights; both must give the same log-probs (T=1) on the probe."""

    learner: Gang
    engines: EnginePool
    probe_ids: tuple[int, ...]
    driver: DriverConfig
    deadline: float
    """Seconds for a call to the learner or to an engine."""
    dtype: str = "float32"
    """Of the weights on both sides."""
    compared: bool = False
    """Whether learner and engines were compared since this was made."""

    async def __call__(self, version: int) -> dict[str, float]:
        """Serve `version` everywhere; SyncError if an engine holds something else."""
        await self.engines.update_weights(version)
        due = not self.compared or (self.driver.probe.every and version % self.driver.probe.every == 0)
        self.compared = True
        return (await self.measure()) if due else {}

    async def compare(self) -> float:
        """Largest log-prob difference (nats) on the probe between any engine and the learner."""
        return (await self.measure())["sync/probe_error"]

    async def measure(self) -> dict[str, float]:
        """Differences on the probe between the learner and the engine that is furthest from it in each.

        SyncError where they are too large: in float32 the largest of ln p, in bfloat16, whose error grows as
        a token's probability falls, its mean, and the largest of p by twice as much.
        """
        ids, deadline, tolerance = self.probe_ids, self.deadline, self.driver.probe.tolerance
        scored = await self.learner.all(lambda rank, h: h.prompt_logprobs.remote(ids), deadline=deadline)
        ask = lambda h: h.prompt_logprobs.remote(ids)
        while not (answers := await self.engines.call_all(ask, deadline=deadline, what="scoring the probe")):
            await self.engines.wait_for_engine()  # all were lost: nothing is compared with nobody
        gaps = {name: probe_gaps(answer, scored[0]) for name, answer in answers.items()}
        limits = (
            [tolerance, np.inf, np.inf] if self.dtype == "float32" else [np.inf, tolerance, 2 * tolerance]
        )
        wrong = [name for name, gap in gaps.items() if not (gap <= limits).all()]
        largest, mean, of_p = map(float, np.max([*gaps.values()], axis=0))
        if wrong:
            rounded = f" on average and {2 * tolerance:g} of probability"
            allowed = f"{tolerance:g} nats{'' if self.dtype == 'float32' else rounded}"
            raise SyncError(
                f"{', '.join(wrong)}: other log-probs than the learner's on the probe text, {mean:.4f} nats "
                f"apart on average and {largest:.4f} at most, {of_p:.4f} of probability; {allowed} are "
                "allowed (driver.probe.tolerance). Their weights differ, or their precision does"
            )
        return {
            "sync/probe_error": largest,
            "sync/probe_mean_error": mean,
            "sync/probe_probability_error": of_p,
        }


def probe_gaps(engine: ArrayLike, learner: ArrayLike) -> NDArray[np.float64]:
    """Largest and mean |difference| of ln p (nats), and the largest of p, of two rows of log-probs [n]."""
    a, b = np.asarray(engine, dtype=np.float64), np.asarray(learner, dtype=np.float64)
    apart = np.abs(a - b)
    return np.array([apart.max(), apart.mean(), np.abs(np.exp(a) - np.exp(b)).max()])
