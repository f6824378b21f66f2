"""Rare successes, kept and put before the policy again (RLEP, arXiv 2507.07451; UEC-RL, arXiv 2604.14646)."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from entroray.kept_sets import KeptSets
from entroray.types import Group, MaskReason, Rollout, SamplerNotes, Span, Status, Verdict, Version

ARRAYS = {"token_ids": np.int32, "logprobs": np.float32, "versions": np.int32}
NOTES = ("entropy", "varentropy", "temperature")


@dataclass
class Replay:
    """The newest right rollout of each prompt that is rarely answered, within `tokens` tokens in all.

    `rare` is the share of right answers, over all draws of a group, up to which they are rare. A prompt
    answered more often leaves; if there is no room, those kept longest leave.
    """

    tokens: int
    rare: float = 0.25
    kept: dict[str, tuple[Rollout, Verdict]] = field(default_factory=dict)

    def insert_success(self, group: Group) -> Group:
        """`group` with the success kept of its prompt as its last rollout, if none of its own is right.

        A group whose rollouts share prefixes is left as it is.
        """
        found = self.kept.get(group.prompt.id)
        if found is None or group.share_right > 0 or any(r.parent is not None for r in group.rollouts):
            return group
        rollout, verdict = found
        rollouts, verdicts = (*group.rollouts[:-1], rollout), (*group.verdicts[:-1], verdict)
        return replace(group, rollouts=rollouts, verdicts=verdicts, replaced=group.rollouts[-1:])

    def observe(self, group: Group) -> None:
        """Keep a success of a group mostly wrong; forget those of one that is not."""
        draws = group.draws
        share = sum(g.share_right * len(g.rollouts) for g in draws) / sum(len(g.rollouts) for g in draws)
        if share > self.rare:
            self.kept.pop(group.prompt.id, None)
        elif share > 0 and (success := _success(group)):
            self.kept.pop(group.prompt.id, None)  # the newest come last
            self.kept[group.prompt.id] = success
            self._make_room()

    def _make_room(self) -> None:
        held = sum(r.length for r, _ in self.kept.values())
        while held > self.tokens:
            oldest = next(iter(self.kept))
            held -= self.kept.pop(oldest)[0].length

    def metrics(self, groups: Sequence[Group], judged: Sequence[Group], version: Version) -> dict[str, float]:
        """Of the groups trained on; `version` is what the update of them made."""
        rows = [r for g in groups for r in g.rollouts]
        old = [r for r in rows if r.replayed]
        found = {
            "replay/kept": float(len(self.kept)),
            "replay/groups": sum(any(r.replayed for r in g.rollouts) for g in groups) / len(groups),
            "replay/share": sum(r.length for r in old) / sum(r.length for r in rows),
        }
        if old:
            found["replay/age"] = sum(version - 1 - r.version for r in old) / len(old)
        return found

    def state(self) -> dict[str, Any]:
        return {name: [_plain(r), asdict(v)] for name, (r, v) in self.kept.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`, in place, the oldest first."""
        self.kept.clear()
        for name, (rollout, verdict) in state.items():
            self.kept[name] = _rollout(rollout), Verdict(**verdict | {"status": Status(verdict["status"])})


def _success(group: Group) -> tuple[Rollout, Verdict] | None:
    """Its first right rollout that stands by itself, marked as replayed from here on."""
    for rollout, verdict in zip(group.rollouts, group.verdicts, strict=True):
        if verdict.correct and rollout.parent is None:
            return replace(rollout, replayed=True), verdict
    return None


def _plain(rollout: Rollout) -> dict[str, Any]:
    arrays = {name: getattr(rollout, name).tolist() for name in ARRAYS}
    scalars = {n: getattr(rollout, n) for n in ("prompt_id", "text", "temperature", "limit")}
    spans = [[s.start, s.stop, str(s.why)] for s in rollout.spans]
    notes = [getattr(rollout.notes, name).tolist() for name in NOTES] if rollout.notes else None
    kept = rollout.kept and rollout.kept.plain()
    return arrays | scalars | {"status": str(rollout.status), "spans": spans, "notes": notes, "kept": kept}


def _rollout(state: Mapping[str, Any]) -> Rollout:
    arrays = {name: np.array(state[name], dtype=dtype) for name, dtype in ARRAYS.items()}
    notes = state["notes"] and SamplerNotes(*(np.array(column, np.float32) for column in state["notes"]))
    spans = tuple(Span(start, stop, MaskReason(why)) for start, stop, why in state["spans"])
    kept = KeptSets.from_plain(found) if (found := state.get("kept")) else None
    own: dict[str, Any] = {**state, **arrays, "notes": notes, "kept": kept, "spans": spans, "replayed": True}
    return Rollout(**own | {"status": Status(state["status"])})
