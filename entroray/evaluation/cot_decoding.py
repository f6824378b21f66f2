"""CoT-decoding: each likely first token followed greedily, judged like any answer (arXiv 2402.10200)."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from entroray.metrics.answer_confidence import NoGap, answer_span, probability_gap
from entroray.policy.tokenizer import end_ids, response_text, token_name
from entroray.roles import Generator, Verifier
from entroray.rollout.splice import join, openings
from entroray.types import Draw, Group, Prompt, Rollout, Status

Text = Callable[[Sequence[int]], str]
"""Of a response's tokens, as its judge reads them: all but the end token it ends with."""
TWO = 2
"""Probabilities a gap is taken between."""


@dataclass(frozen=True)
class Words:
    """What an evaluation asks of a tokenizer."""

    text: Text
    name: Callable[[int], str]
    """Of one token for a reader."""
    ends: frozenset[int]
    """Tokens that end a response."""


def words(tokenizer: Any, model: str | None = None) -> Words:
    """`tokenizer` as an evaluation of `model` sees it."""
    ends = frozenset(end_ids(tokenizer, model))
    return Words(response_text(tokenizer, ends), partial(token_name, tokenizer), ends)


@dataclass(frozen=True)
class Decoding:
    """How first tokens are followed."""

    paths: int
    """First tokens, the most probable first, which is the greedy answer."""
    draw: Draw
    """Greedy, reporting the two most probable tokens at each position."""
    ends: Callable[[int], bool]
    """Whether a response is over after this first token."""


async def decode_paths(
    groups: Sequence[Group], how: Decoding, generator: Generator, verifier: Verifier, text: Text
) -> list[Group]:
    """Groups of one greedy answer that reports its top tokens -> groups of `how.paths` answers each.

    Fewer if the greedy answer failed. Rollouts are in order of their first token's probability.
    """
    return list(await asyncio.gather(*(_fork(group, how, generator, verifier, text) for group in groups)))


async def _fork(group: Group, how: Decoding, generator: Generator, verifier: Verifier, text: Text) -> Group:
    greedy, prompt = group.rollouts[0], group.prompt
    if not greedy.status.usable or not greedy.length:
        return group
    others = [begun for begun in _beginnings(greedy, text) if begun.token_ids[0] != greedy.token_ids[0]]
    others = others[: how.paths - 1]
    paths = await asyncio.gather(*(_follow(prompt, begun, how, generator) for begun in others))
    judged = await verifier.judge(prompt, paths)
    return Group(prompt, (greedy, *paths), (*group.verdicts, *judged))


def _beginnings(greedy: Rollout, text: Text) -> list[Rollout]:
    """One token each: the most probable ones where `greedy` began, by falling probability."""
    status = Status.TRUNCATED if greedy.limit == 1 else Status.OK
    return [replace(o, text=text(o.token_ids.tolist()), status=status) for o in openings(greedy)]


async def _follow(prompt: Prompt, begun: Rollout, how: Decoding, generator: Generator) -> Rollout:
    token = int(begun.token_ids[0])
    if begun.limit == 1 or how.ends(token):
        return begun
    (rest,) = await generator.sample(prompt, (0,), how.draw, (token,))
    return join(begun, rest) if rest.status.usable else rest


def path_gaps(group: Group, text: Text) -> list[float | NoGap]:
    """Confidence of each path, or why it has none."""
    pairs = zip(group.rollouts, group.verdicts, strict=True)
    return [
        _gap(r, v.answer, text) if r.status.usable and v.status.usable else NoGap.FAILED for r, v in pairs
    ]


def _gap(rollout: Rollout, answer: str | None, text: Text) -> float | NoGap:
    span = answer_span(rollout.token_ids.tolist(), answer, text)
    if isinstance(span, NoGap):
        return span
    assert rollout.top_tokens is not None
    return probability_gap(rollout.top_tokens.probabilities, span)
