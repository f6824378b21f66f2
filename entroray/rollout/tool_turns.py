"""Responses in turns: the policy writes a call and stops, a tool answers, and the policy goes on."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

from entroray.data.demonstrations import WorkedAnswer
from entroray.roles import Generator, Tool
from entroray.rollout.splice import cut, join, observation
from entroray.seeds import seeds as seeds_of
from entroray.types import Answer, Draw, MaskReason, Prompt, Rollout, Span, Status

Encode = Callable[[str, str], Sequence[int]]
"""Ids of a frame with a text in place of its `{answer}`; special tokens are read in the frame alone."""
ANSWER = "{answer}"


@dataclass(frozen=True)
class Syntax:
    """How a call is written in a response, and how its answer stands behind it."""

    open: str
    close: str
    answer: str = ANSWER

    def call(self, turn: str) -> str | None:
        """What a turn asks: it ends with the first `close`; None if it asks nothing.

        A `close` that nothing opened asks for nothing, "", which no tool has an answer to.
        """
        before, closed, _ = turn.partition(self.close)
        _, opened, call = before.rpartition(self.open)
        return (call if opened else "") if closed else None

    @property
    def frame(self) -> str:
        """Of a call, which stands in place of `{answer}`."""
        return f"{self.open}{ANSWER}{self.close}"


class Dialogue(NamedTuple):
    """A response so far, and the call that it waits for; None if it is over."""

    response: Rollout
    call: str | None


@dataclass(frozen=True)
class ToolTurns:
    """A Generator whose responses go on behind the answers of a tool, observations in them (README.md)."""

    generator: Generator
    tool: Tool
    syntax: Syntax
    calls: int
    """Most calls that one response has answered."""
    encode: Encode
    decode: Callable[[Sequence[int]], str]
    report: Callable[..., None] = lambda kind, **fields: None
    """Called once for each kind of error of the tool."""
    reported: set[str] = field(default_factory=set)

    async def sample(
        self, prompt: Prompt, seeds: Sequence[int], draw: Draw, after: Sequence[int] = ()
    ) -> list[Rollout]:
        drawn = await self.generator.sample(prompt, seeds, draw, after)
        begun = self.decode(after).rpartition(self.syntax.close)[2]  # what is there may be within a call
        dialogues = [Dialogue(r, self._find_call(r, begun)) for r in drawn]
        for turn in range(1, self.calls + 1):
            if all(dialogue.call is None for dialogue in dialogues):
                break
            go_on = partial(self._go_on, prompt, draw, tuple(after))
            answered = await self._answer(prompt, dialogues, tuple(after))
            own = (turn_seed(seed, turn) for seed in seeds)
            dialogues = await asyncio.gather(*map(go_on, answered, own))
        return [d.response if d.call is None else _truncated(d.response) for d in dialogues]

    def _find_call(self, drawn: Rollout, begun: str = "") -> str | None:
        ended = drawn.status is Status.OK
        return self.syntax.call(begun + self.decode(drawn.token_ids.tolist())) if ended else None

    async def _answer(
        self, prompt: Prompt, dialogues: list[Dialogue], before: tuple[int, ...]
    ) -> list[Dialogue]:
        """Every open call answered."""
        answers = iter(await self.tool.answer(prompt, [d.call for d in dialogues if d.call is not None]))
        return [d if d.call is None else self._append(d, next(answers), before) for d in dialogues]

    def _append(self, dialogue: Dialogue, answer: Answer, before: tuple[int, ...]) -> Dialogue:
        """The response with the answer behind its call; over if there is none, or no room behind it."""
        self._report_error(answer)
        if not answer.status.usable:
            return Dialogue(replace(dialogue.response, status=answer.status), None)
        why = MaskReason.TOOL_ERROR if answer.failed else MaskReason.TOOL
        appended = observation(dialogue.response, self.encode(self.syntax.answer, answer.text), why)
        response, room = _joined(dialogue.response, appended), dialogue.response.limit - len(before)
        if response.length < room:
            return Dialogue(response, dialogue.call)
        response = cut(response, room)
        text = self.decode([*before, *response.token_ids.tolist()])
        return Dialogue(_truncated(replace(response, text=text)), None)

    async def _go_on(
        self, prompt: Prompt, draw: Draw, before: tuple[int, ...], dialogue: Dialogue, seed: int
    ) -> Dialogue:
        if dialogue.call is None:
            return dialogue
        there = (*before, *dialogue.response.token_ids.tolist())
        (drawn,) = await self.generator.sample(prompt, [seed], draw, there)
        return Dialogue(_joined(dialogue.response, drawn), self._find_call(drawn))

    def _report_error(self, answer: Answer) -> None:
        kind = answer.detail.partition(":")[0]
        if answer.failed and kind not in self.reported:
            self.reported.add(kind)
            self.report("tool_error", detail=answer.detail)


def turn_seed(seed: int, turn: int) -> int:
    """The seed of a response's `turn`th turn after its first, the same whatever happens beside it."""
    return seeds_of(seed, turn, 0, 1)[0]


def _joined(head: Rollout, tail: Rollout) -> Rollout:
    """`join`, under the seed that all turns' seeds follow from."""
    return replace(join(head, tail), seed=head.seed)


def _truncated(rollout: Rollout) -> Rollout:
    return replace(rollout, status=Status.TRUNCATED)


def encode_demonstration(
    worked: WorkedAnswer, syntax: Syntax, encode: Encode
) -> tuple[list[int], tuple[Span, ...]]:
    """The ids that the turns of a demonstration would have, and which of them are the tool's."""
    ids: list[int] = []
    spans: list[Span] = []
    for call, answer in worked.calls:
        ids += encode(syntax.frame, call)
        start = len(ids)
        ids += encode(syntax.answer, answer)
        spans.append(Span(start, len(ids), MaskReason.TOOL))
    return [*ids, *encode(ANSWER, worked.end)], tuple(spans)
