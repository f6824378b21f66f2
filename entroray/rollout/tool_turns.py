"""Responses in turns: the policy writes a call and stops, a tool answers, and the policy goes on."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from entroray.data.demonstrations import WorkedAnswer
from entroray.roles import Generator, Tool, tunable
from entroray.rollout.splice import cut, join, observation
from entroray.seeds import seeds as seeds_of
from entroray.types import Answer, MaskReason, Prompt, Rollout, Span, Status

Encode = Callable[[str], Sequence[int]]


@dataclass(frozen=True)
class Syntax:
    """How a call is written in a response, and how its answer stands behind it."""

    open: str
    close: str
    answer: str = "{answer}"

    def call(self, turn: str) -> str | None:
        """What a turn asks: it ends with the first `close`; None where it asks nothing.

        A `close` that nothing opened asks for nothing, "", which no tool has an answer to.
        """
        before, closed, _ = turn.partition(self.close)
        _, opened, asked = before.rpartition(self.open)
        return (asked if opened else "") if closed else None

    def said(self, text: str) -> str:
        """The answer as the policy reads it."""
        return self.answer.replace("{answer}", text)


class Dialogue(NamedTuple):
    """A response so far, and the call that it waits for; None where it is over."""

    whole: Rollout
    call: str | None


@dataclass(frozen=True)
class ToolTurns:
    """A Generator whose responses go on behind what a tool said, which is an observation in them.

    A response is never tokenised again: each turn reads the prompt's ids and every id that came since. It
    ends as the policy ends it, or truncated: at the token limit, which what the tool says counts against,
    or at one call more than `calls`. Where the tool gave no answer in time, or died, the response has
    failed as it has, and is sampled anew. The members of a group take their turns together.
    """

    generator: Generator
    tool: Tool
    syntax: Syntax
    calls: int
    """Most calls that one response has answered."""
    encode: Encode
    """Text -> ids, as they stand within a response: nothing added, no special token read."""
    decode: Callable[[Sequence[int]], str]
    report: Callable[..., None] = lambda kind, **fields: None
    """Hears of each kind of error of the tool, once."""
    told: set[str] = field(default_factory=set)

    async def sample(self, prompt: Prompt, seeds: Sequence[int], after: Sequence[int] = ()) -> list[Rollout]:
        drawn = await self.generator.sample(prompt, seeds, after)
        begun = self.decode(after).rpartition(self.syntax.close)[2]  # what is there may stand within a call
        talks = [Dialogue(r, self._call(r, begun)) for r in drawn]
        for turn in range(1, self.calls + 1):
            if all(talk.call is None for talk in talks):
                break
            talks = await self._turn(prompt, talks, [turn_seed(s, turn) for s in seeds], tuple(after))
        return [talk.whole if talk.call is None else _truncated(talk.whole) for talk in talks]

    async def first_tokens(self, prompt: Prompt, count: int) -> list[Rollout]:
        """As the engines answer; a first token calls nothing."""
        return await self.generator.first_tokens(prompt, count)

    def at(self, temperature: float) -> "ToolTurns":
        """The same at another temperature of the policy."""
        return replace(self, generator=tunable(self.generator).at(temperature))

    def moved(self, rule: Mapping[str, float], max_tokens: float | None) -> "ToolTurns":
        """The same with numbers of the sampler's rule set, and a longest response; None leaves that."""
        return replace(self, generator=tunable(self.generator).moved(rule, max_tokens))

    def hotter(self, factor: float) -> "ToolTurns":
        """The same, every turn drawn at `factor` times the temperature."""
        return replace(self, generator=tunable(self.generator).hotter(factor))

    def _call(self, drawn: Rollout, begun: str = "") -> str | None:
        ended = drawn.status is Status.OK
        return self.syntax.call(begun + self.decode(drawn.token_ids.tolist())) if ended else None

    async def _turn(
        self, prompt: Prompt, talks: list[Dialogue], seeds: list[int], before: tuple[int, ...]
    ) -> list[Dialogue]:
        """Every open call answered, then every response that still has room drawn on."""
        answers = iter(await self.tool.answer(prompt, [t.call for t in talks if t.call is not None]))
        heard = [t if t.call is None else self._heard(t, next(answers), before) for t in talks]
        pairs = zip(heard, seeds, strict=True)
        return list(await asyncio.gather(*(self._go_on(prompt, t, seed, before) for t, seed in pairs)))

    def _heard(self, talk: Dialogue, answer: Answer, before: tuple[int, ...]) -> Dialogue:
        """The response with the answer behind its call; over where there is none, or no room behind it."""
        self._note(answer)
        if not answer.status.usable:
            return Dialogue(replace(talk.whole, status=answer.status), None)
        why = MaskReason.TOOL_ERROR if answer.failed else MaskReason.TOOL
        heard = observation(talk.whole, self.encode(self.syntax.said(answer.text)), why)
        whole, room = join(talk.whole, heard), talk.whole.limit - len(before)
        if whole.length < room:
            return Dialogue(whole, talk.call)
        whole = cut(whole, room)
        text = self.decode([*before, *whole.token_ids.tolist()])
        return Dialogue(_truncated(replace(whole, text=text)), None)

    async def _go_on(self, prompt: Prompt, talk: Dialogue, seed: int, before: tuple[int, ...]) -> Dialogue:
        if talk.call is None:
            return talk
        (drawn,) = await self.generator.sample(prompt, [seed], (*before, *talk.whole.token_ids.tolist()))
        return Dialogue(join(talk.whole, drawn), self._call(drawn))

    def _note(self, answer: Answer) -> None:
        kind = answer.detail.partition(":")[0]
        if answer.failed and kind not in self.told:
            self.told.add(kind)
            self.report("tool_error", detail=answer.detail)


def turn_seed(seed: int, turn: int) -> int:
    """The seed of a response's `turn`th turn after its first, the same whatever happens beside it."""
    return seeds_of(seed, turn, 0, 1)[0]


def _truncated(rollout: Rollout) -> Rollout:
    return replace(rollout, status=Status.TRUNCATED)


def encode_demonstration(
    worked: WorkedAnswer, syntax: Syntax, encode: Encode
) -> tuple[list[int], tuple[Span, ...]]:
    """A demonstration as the same ids that its turns would have, and which of them the tool says."""
    ids: list[int] = []
    spans: list[Span] = []
    for call, answer in worked.calls:
        ids += encode(f"{syntax.open}{call}{syntax.close}")
        start = len(ids)
        ids += encode(syntax.said(answer))
        spans.append(Span(start, len(ids), MaskReason.TOOL))
    return [*ids, *encode(worked.end)], tuple(spans)
