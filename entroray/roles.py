"""What the driver asks of the machines; anything that answers these calls will do."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from entroray.objective import Objective
from entroray.types import Answer, Batch, Draw, Group, Prompt, Rollout, Tokens, Verdict, Version

Scores = Mapping[str, NDArray[np.float32]]
"""Columns [N] of a scored batch: logprobs, entropy, varentropy, and what the objective needs besides."""


StepMetrics = Callable[[Sequence[Group], Sequence[Group], Version], dict[str, float]]
"""Groups trained on, groups judged, the version they made -> metrics of the step."""


class Prompts(Protocol):
    """Prompts without end, each at a position that can be returned to."""

    position: int
    """One past that of the prompt given last."""

    def __next__(self) -> Prompt: ...

    def at(self, position: int) -> Prompt | None:
        """The prompt at `position`, without moving; None for one that is passed over, never for one given."""


class Resumable(Protocol):
    """What is remembered from step to step; it is in the checkpoint."""

    def state(self) -> Any:
        """Plain JSON."""

    def restore(self, state: Any) -> None:
        """Go on from `state`."""


class GroupObserver(Resumable, Protocol):
    """What is remembered of prompts."""

    def observe(self, group: Group) -> None:
        """Take in a finished group; called after the step, in order of issue."""


class Generator(Protocol):
    async def sample(
        self, prompt: Prompt, seeds: Sequence[int], draw: Draw, after: Sequence[int] = ()
    ) -> list[Rollout]:
        """One rollout per seed; one that failed says so in its status.

        `after` are tokens the response already has: a rollout then holds what follows them, the text of
        the whole, and is cut where the whole has `draw.max_tokens`. `rollout/splice.py` joins them.
        """


class Verifier(Protocol):
    async def judge(self, prompt: Prompt, rollouts: Sequence[Rollout]) -> list[Verdict]:
        """One verdict per rollout, in order; what failed says so in its status."""


class Tool(Protocol):
    async def answer(self, prompt: Prompt, calls: Sequence[str]) -> list[Answer]:
        """One answer per call, in order; a call that the tool cannot answer is answered with an error."""


class Learner(Protocol):
    async def score(
        self, batch: Batch, group: NDArray[np.int64], updates: int = 1, extra: Sequence[str] = ()
    ) -> Scores:
        """Statistics of every response token under the present weights.

        `group` [B] and `updates` are those of the update to come, so that both read the same micro-batches;
        `extra` names further statistics of the whole distribution.
        """

    async def update(
        self, batch: Batch, tokens: Tokens, objective: Objective, updates: int = 1, lr: float | None = None
    ) -> dict[str, float]:
        """The `updates` optimizer updates of one step; returns metrics.

        `lr` takes the place of the learning-rate schedule's base; None leaves it.
        """

    async def score_and_update(
        self, batch: Batch, tokens: Tokens, objective: Objective, lr: float | None = None
    ) -> tuple[dict[str, float], Scores]:
        """One `update` of tokens that nothing has scored (`unknown_scores`): metrics, and their scores.

        Those are of the weights before it, read by its own forward pass; the weights after it are what
        `score` and `update` would have made, bit for bit.
        """


class Sync(Protocol):
    async def __call__(self, version: Version) -> dict[str, float]:
        """Serve the learner's weights as `version` on every generator; returns metrics."""


class Journal(Protocol):
    """`step` and `skipped` are called in a thread, one at a time; `event` also meanwhile."""

    def step(self, step: int, metrics: Mapping[str, float], groups: Sequence[Group], tokens: Tokens) -> None:
        """Record one committed step."""

    def skipped(self, step: int, batch: Batch, tokens: Tokens) -> None:
        """Keep what an update that was left out would have been made of."""

    def event(self, kind: str, **fields: Any) -> None:
        """Record something that happened."""
