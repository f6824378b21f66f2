"""What the driver asks of the machines; anything that answers these calls will do."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from entroray.errors import ConfigError
from entroray.types import Answer, Batch, Group, Prompt, Rollout, Tokens, Verdict, Version

Scores = Mapping[str, NDArray[np.float32]]
"""Columns [N] of a scored batch: logprobs, entropy, varentropy, and what the objective needs besides."""


StepMetrics = Callable[[Sequence[Group], Sequence[Group], Version], dict[str, float]]
"""Groups trained on, groups judged, the version they made -> metrics of the step."""


class Prompts(Protocol):
    """Prompts without end, each at a position that can be returned to."""

    position: int
    """One past that of the prompt given last."""

    def __next__(self) -> Prompt: ...

    def at(self, position: int) -> Prompt:
        """The prompt at `position`, without moving."""
        ...


@runtime_checkable
class Generator(Protocol):
    async def sample(self, prompt: Prompt, seeds: Sequence[int], after: Sequence[int] = ()) -> list[Rollout]:
        """One rollout per seed; what failed says so in its status.

        `after` are tokens the response already has: a rollout then holds what follows them, the text of
        the whole, and is cut where the whole is as long as responses may be. `rollout/splice.py` joins them.
        """
        ...

    async def first_tokens(self, prompt: Prompt, count: int) -> list[Rollout]:
        """Forced rollouts of one token: the `count` likeliest first that do not end the response, in order.

        Their log-probs are of the policy's distribution without the end token. Where the deadline passed
        there is one rollout, which says so.
        """
        ...


@runtime_checkable
class Tunable(Generator, Protocol):
    """A generator that draws otherwise when asked to: by `control` and rollout.second alone."""

    def at(self, temperature: float) -> "Tunable":
        """It, at another temperature of the policy."""
        ...

    def moved(self, rule: Mapping[str, float], max_tokens: float | None) -> "Tunable":
        """It, with numbers of the sampler's rule set, and a longest response; None leaves that."""
        ...

    def hotter(self, factor: float) -> "Tunable":
        """It, drawing at `factor` times the temperature; the log-probs are of what it drew from."""
        ...


@runtime_checkable
class Racing(Generator, Protocol):
    """A generator that can give up its slowest: for runs with rollout.early alone."""

    def first(self, count: int) -> "Racing":
        """It, giving up the rest of a call when `count` rollouts have finished: those come `abandoned`."""
        ...


def tunable(generator: Generator) -> Tunable:
    """`generator`, which must be `Tunable`; ConfigError where it is not."""
    if isinstance(generator, Tunable):
        return generator
    raise ConfigError(
        f"the generator {type(generator).__name__} cannot draw otherwise (it needs at, moved and hotter): "
        "add them, or leave out rollout.second and what control moves of sampler.* and rollout.max_tokens"
    )


def racing(generator: Generator) -> Racing:
    """`generator`, which must be `Racing`; ConfigError where it is not."""
    if isinstance(generator, Racing):
        return generator
    raise ConfigError(
        f"the generator {type(generator).__name__} cannot give up its slowest (it lacks first): add it, or "
        "say rollout.early.extra=0"
    )


@runtime_checkable
class Verifier(Protocol):
    async def judge(self, prompt: Prompt, rollouts: Sequence[Rollout]) -> list[Verdict]:
        """One verdict per rollout, in order; what failed says so in its status."""
        ...


@runtime_checkable
class Tool(Protocol):
    async def answer(self, prompt: Prompt, calls: Sequence[str]) -> list[Answer]:
        """One answer per call, in order; a call that the tool cannot answer is answered with an error."""
        ...


@runtime_checkable
class Learner(Protocol):
    async def score(self, batch: Batch, group: NDArray[np.int64], extra: Sequence[str] = ()) -> Scores:
        """Statistics of every response token under the present weights; `group` [B] as it will be updated.

        `extra` names further statistics of the whole distribution that this one call is to return.
        """
        ...

    async def update(self, batch: Batch, tokens: Tokens) -> dict[str, float]:
        """All optimizer updates of one step; returns metrics."""
        ...


@runtime_checkable
class Sync(Protocol):
    async def __call__(self, version: Version) -> dict[str, float]:
        """Serve the learner's weights as `version` on every generator; returns metrics."""
        ...


@runtime_checkable
class Journal(Protocol):
    def step(self, step: int, metrics: Mapping[str, float], groups: Sequence[Group], tokens: Tokens) -> None:
        """Record one committed step."""
        ...

    def skipped(self, step: int, batch: Batch, tokens: Tokens) -> None:
        """Keep what an update that was left out would have been made of."""
        ...

    def event(self, kind: str, **fields: Any) -> None:
        """Record something that happened."""
        ...
