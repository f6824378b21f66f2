"""Where responses branch and what becomes of a family: pure, the same in every run with the same seeds."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from entroray.errors import ConfigError
from entroray.rollout.splice import as_observation, cut, join
from entroray.types import MaskReason, Rollout, Status, Verdict

Weight = Literal["equal", "entropy"]


def choose_positions(
    rollout: Rollout, count: int, seed: int, *, top: int | None, weight: Weight
) -> list[int]:
    """At most `count` positions to branch at, drawn without replacement by a hash of `seed`.

    Among the `top` of highest entropy (nats; all where it is None), each as likely as the others or in
    proportion to its entropy. Never the first token it drew itself, where a branch would be a sibling, nor
    the one that ended it, nor one that it did not draw. ConfigError where the sampler noted no entropies.
    """
    if rollout.notes is None:
        raise ConfigError("rollout.plan cannot branch a response without `notes`: take rollout=plain")
    at = np.arange(rollout.inherited + 1, rollout.length - (rollout.status is Status.OK))
    entropy = rollout.notes.entropy[at].astype(np.float64)
    open_ = (rollout.observed[at] < 0) & (entropy > 0)
    at, entropy = at[open_], entropy[open_]
    highest = np.lexsort((at, -entropy))[:top]
    at, entropy = at[highest], entropy[highest]
    waits = -np.log(_uniform(seed, at)) / (entropy if weight == "entropy" else 1.0)
    return [int(position) for position in at[np.argsort(waits, kind="stable")][:count]]


def _uniform(seed: int, at: NDArray[np.int64]) -> NDArray[np.float64]:
    """A number u in (0, 1) for each position. Of -ln u / w the least is i's with chance w_i / sum w."""
    digests = [hashlib.shake_128(f"{seed}:{position}".encode()).digest(8) for position in at]
    return np.array([(int.from_bytes(d, "little") + 0.5) / 2**64 for d in digests])


def branch_off(parent: Rollout, index: int, position: int, tail: Rollout) -> Rollout:
    """What begins as `parent`, the rollout at `index` of the group, and goes on from `position` as `tail`."""
    return replace(join(as_observation(cut(parent, position), MaskReason.PREFIX), tail), parent=index)


class Attempt(NamedTuple):
    """The members of one draw, or of several, by what became of them."""

    kept: tuple[tuple[Rollout, Verdict], ...] = ()
    """Those that can be used, their parents named by their places here."""
    abandoned: tuple[Rollout, ...] = ()
    failed: tuple[tuple[Rollout, Verdict], ...] = ()

    def then(self, later: "Attempt") -> "Attempt":
        """Both; the later draw has no branches."""
        kept, abandoned = self.kept + later.kept, self.abandoned + later.abandoned
        return Attempt(kept, abandoned, self.failed + later.failed)


def sort_members(judged: Sequence[tuple[Rollout, Verdict]]) -> Attempt:
    """The members of one draw by what became of them.

    A branch whose parent cannot be used fails with it: its first tokens would be trained on nowhere.
    """
    place: dict[int | None, int | None] = {None: None}
    kept, failed = list[tuple[Rollout, Verdict]](), list[tuple[Rollout, Verdict]]()
    abandoned: list[Rollout] = []
    for index, (rollout, verdict) in enumerate(judged):
        if rollout.status.usable and verdict.status.usable and rollout.parent in place:
            place[index], parent = len(kept), place[rollout.parent]
            kept.append((rollout if parent == rollout.parent else replace(rollout, parent=parent), verdict))
        elif rollout.status is Status.ABANDONED:
            abandoned.append(rollout)
        else:
            failed.append((rollout, verdict))
    return Attempt(tuple(kept), tuple(abandoned), tuple(failed))


def failure(rollout: Rollout, verdict: Verdict) -> str:
    """Why a member failed: its status, its verdict's, or that its parent did."""
    status = verdict.status if rollout.status.usable else rollout.status
    return "parent_failed" if status.usable else str(status)
