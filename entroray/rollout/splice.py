"""Responses made of pieces: what is cut off one, put before another, or put in by a tool."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from entroray.kept_sets import KeptSets
from entroray.types import MaskReason, Rollout, SamplerNotes, Span, Status, TopTokens


def cut(rollout: Rollout, length: int) -> Rollout:
    """Its first `length` tokens; the text stays that of the whole. ValueError when it has fewer."""
    if not 0 <= length <= rollout.length:
        raise ValueError(f"{length} of {rollout.length} tokens cannot be kept")
    notes = rollout.notes and SamplerNotes(*(column[:length] for column in _columns(rollout.notes)))
    spans = [Span(s.start, min(s.stop, length), s.why) for s in rollout.spans if s.start < length]
    per_token: dict[str, Any] = {
        name: getattr(rollout, name)[:length] for name in ("token_ids", "logprobs", "versions")
    }
    top = rollout.top_tokens
    top_tokens = top and TopTokens(top.token_ids[:length], top.probabilities[:length])
    kept = rollout.kept and rollout.kept.take(np.arange(length))
    return replace(rollout, **per_token, notes=notes, kept=kept, spans=tuple(spans), top_tokens=top_tokens)


def as_observation(rollout: Rollout, why: MaskReason) -> Rollout:
    """The same tokens, none of them learnt from."""
    return replace(rollout, spans=(*rollout.spans, Span(0, rollout.length, why)) if rollout.length else ())


def join(head: Rollout, tail: Rollout) -> Rollout:
    """The response that begins as `head` and goes on as `tail`, which says how it ended and reads whole."""
    moved = tuple(Span(s.start + head.length, s.stop + head.length, s.why) for s in tail.spans)
    both = lambda name: np.concatenate([getattr(head, name), getattr(tail, name)])
    per_token: dict[str, Any] = {name: both(name) for name in ("token_ids", "logprobs", "versions")}
    spliced: dict[str, Any] = {"notes": _join_notes(head, tail), "top_tokens": _join_top_tokens(head, tail)}
    spliced["kept"] = join_sets([head, tail])
    return replace(tail, **per_token, **spliced, spans=(*head.spans, *moved))


def openings(rollout: Rollout) -> list[Rollout]:
    """One forced token each: the most probable ones where `rollout` began, which reports them, in order."""
    assert rollout.top_tokens is not None, "it must report its most probable tokens"
    first = replace(cut(rollout, 1), status=Status.OK, kept=None, spans=(Span(0, 1, MaskReason.FORCED),))
    pairs = zip(rollout.top_tokens.token_ids[0], rollout.top_tokens.probabilities[0], strict=True)
    one = lambda x, dtype: np.array([x], dtype)
    return [replace(first, token_ids=one(i, np.int32), logprobs=np.log(one(p, np.float32))) for i, p in pairs]


def observation(like: Rollout, token_ids: Sequence[int], why: MaskReason) -> Rollout:
    """Tokens nobody drew, as an observation of probability 1 under the weights `like` ended with."""
    ids = np.asarray(token_ids, dtype=np.int32)
    version = like.versions[-1:] if like.length else np.zeros(1, np.int32)
    per_token: dict[str, Any] = {
        "logprobs": np.zeros(len(ids), np.float32),
        "versions": np.repeat(version, len(ids)),
    }
    return as_observation(
        replace(like, token_ids=ids, **per_token, notes=None, kept=None, top_tokens=None, spans=()), why
    )


def join_sets(parts: Sequence[Rollout]) -> KeptSets | None:
    """The sets of all their tokens, none where a part has none; None where no part has any."""
    if all(part.kept is None for part in parts):
        return None
    return KeptSets.joined([part.kept or KeptSets.none(part.length) for part in parts])


def _join_notes(head: Rollout, tail: Rollout) -> SamplerNotes | None:
    if head.notes is None and tail.notes is None:
        return None
    pieces = zip(_notes(head), _notes(tail), strict=True)
    return SamplerNotes(*(np.concatenate(piece) for piece in pieces))


def _notes(rollout: Rollout) -> Sequence[NDArray[np.float32]]:
    """Its sampler's notes; where it has none, drawn at the policy's temperature and nothing known of H."""
    if rollout.notes is not None:
        return _columns(rollout.notes)
    unknown = np.full(rollout.length, np.nan, np.float32)
    return unknown, unknown, np.full(rollout.length, rollout.temperature, np.float32)


def _join_top_tokens(head: Rollout, tail: Rollout) -> TopTokens | None:
    """Known of the whole where it is known of both pieces, as deep as both go."""
    a, b = head.top_tokens, tail.top_tokens
    if a is None or b is None:
        return None
    deep = min(a.token_ids.shape[1], b.token_ids.shape[1])
    both = lambda x, y: np.concatenate([x[:, :deep], y[:, :deep]])
    return TopTokens(both(a.token_ids, b.token_ids), both(a.probabilities, b.probabilities))


def _columns(notes: SamplerNotes) -> Sequence[NDArray[np.float32]]:
    return notes.entropy, notes.varentropy, notes.temperature
