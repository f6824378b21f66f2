"""The driver's view of a sync: weights served everywhere, and both sides compared on a fixed text."""

from dataclasses import dataclass

import numpy as np

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
    compared: bool = False
    """Whether learner and engines were compared since this was made."""

    async def __call__(self, version: int) -> dict[str, float]:
        """Serve `version` everywhere; SyncError if an engine holds something else."""
        await self.engines.update_weights(version)
        due = not self.compared or (self.driver.probe.every and version % self.driver.probe.every == 0)
        self.compared = True
        return {"sync/probe_error": await self.compare()} if due else {}

    async def compare(self) -> float:
        """Largest log-prob difference (nats) on the probe between any engine and the learner."""
        ids, deadline, tolerance = self.probe_ids, self.deadline, self.driver.probe.tolerance
        scored = await self.learner.all(lambda rank, h: h.prompt_logprobs.remote(ids), deadline=deadline)
        ask = lambda h: h.prompt_logprobs.remote(ids)
        while not (answers := await self.engines.call_all(ask, deadline=deadline, what="scoring the probe")):
            await self.engines.wait_for_engine()  # all were lost: nothing is compared with nobody
        gaps = {n: float(np.abs(np.asarray(a) - np.asarray(scored[0])).max()) for n, a in answers.items()}
        wrong = [name for name, gap in gaps.items() if not gap <= tolerance]
        if wrong:
            raise SyncError(
                f"{', '.join(wrong)}: other log-probs than the learner's on the probe text, "
                f"{max(gaps.values()):.4f} nats apart, {tolerance:g} allowed (driver.probe.tolerance). "
                "Their weights differ, or their precision does"
            )
        return max(gaps.values())
