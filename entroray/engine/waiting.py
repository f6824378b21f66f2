"""Who waits for what of an engine, and what is out of time."""

from concurrent.futures import Future
from dataclasses import dataclass, field

from entroray.engine.vllm_request import Request
from entroray.types import Rollout


@dataclass
class Waiting:
    """A request's samples, filled in as they finish; times are of `time.monotonic`."""

    request: Request
    future: Future
    admitted: float
    left: set[str]
    begun: dict[str, float] = field(default_factory=dict)
    """When a sample was first seen to have a token."""
    done: dict[str, Rollout] = field(default_factory=dict)

    def late(self, now: float, idle_since: float) -> set[str]:
        """Samples without an answer `request.deadline` seconds after their first token.

        One without a token waits for its turn, `request.patience`: since it was admitted, and again since
        the engine was last at work on others, which end in time themselves.
        """
        first, lasts = max(self.admitted, idle_since) + self.request.patience, self.request.deadline
        return {n for n in self.left if (self.begun[n] + lasts if n in self.begun else first) < now}
