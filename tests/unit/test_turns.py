"""Responses in turns: what the policy reads in each, whose tokens are whose, how a response ends."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from entroray.data.demonstrations import WorkedAnswer, chain_sum_calls
from entroray.data.sources import reasoning_gym
from entroray.metrics.catalogue import family_metrics
from entroray.metrics.step import step_metrics
from entroray.objective import build_objective
from entroray.reward import build_verification
from entroray.reward.tools import Call, calculator
from entroray.rollout.splice import cut
from entroray.rollout.tool_turns import Syntax, ToolTurns, encode_demonstration, turn_seed
from entroray.train.batching import tokens_of
from entroray.train.warm_start import demonstration_group
from entroray.types import (
    Answer,
    Draw,
    Group,
    MaskReason,
    Prompt,
    Rollout,
    SamplerNotes,
    Span,
    Status,
    Verdict,
)
from tests.documented import matches
from tests.toy import ToyWorld, driver

PROMPT = Prompt("p", "2+3=", tuple(b"2+3="), "5")
SYNTAX = Syntax("[", "]")
LIMIT = 20
DRAW = Draw(1.0, LIMIT)
GRPO = Path(__file__).parents[2] / "conf" / "objective" / "grpo.yaml"


def encode(text: str) -> list[int]:
    return list(text.encode())


def framed(frame: str, text: str) -> list[int]:
    return encode(frame.replace("{answer}", text))


def decode(ids: Sequence[int]) -> str:
    return bytes(map(int, ids)).decode()


class Script:
    """A generator that says what it is told to, turn by turn, and notes what it read; a tool beside it."""

    def __init__(self, *turns: str, answers: Sequence[Answer] = (), status: Status = Status.OK):
        self.turns, self.answers, self.status = list(turns), list(answers), status
        self.read: list[tuple[str, int]] = []
        self.asked: list[list[str]] = []

    async def sample(
        self, prompt: Prompt, seeds: Sequence[int], draw: Draw, after: Sequence[int] = ()
    ) -> list[Rollout]:
        assert draw is DRAW, "every turn is drawn as the first"
        self.read += [(decode(after), seed) for seed in seeds]
        return [replace(self._say(tuple(after), len(self.read)), seed=seed) for seed in seeds]

    def _say(self, after: tuple[int, ...], version: int) -> Rollout:
        ids = encode(self.turns.pop(0))
        whole = ids[: LIMIT - len(after)]
        status = self.status if len(whole) == len(ids) else Status.TRUNCATED
        n, text = len(whole), decode([*after, *whole])
        columns = np.array(whole, np.int32), np.full(n, -0.5, np.float32), np.full(n, version, np.int32)
        return Rollout("p", *columns, text, 1.0, LIMIT, status)

    async def answer(self, prompt: Prompt, calls: Sequence[str]) -> list[Answer]:
        self.asked.append(list(calls))
        return [self.answers.pop(0) for _ in calls]


def talk(script: Script, seeds: Sequence[int] = (7,), calls: int = 3, after: str = "") -> list[Rollout]:
    turns = ToolTurns(script, script, SYNTAX, calls, framed, decode)
    return asyncio.run(turns.sample(PROMPT, seeds, DRAW, encode(after)))


def why(rollout: Rollout) -> str:
    return "".join({-1: ".", 3: "t", 4: "e"}[int(code)] for code in rollout.observed)


def test_each_turn_reads_every_token_before_it_and_nothing_else() -> None:
    script = Script("[2+3]", "[5*2]", "=10", answers=[Answer("5"), Answer("10")])
    (whole,) = talk(script)
    assert script.read == [("", 7), ("[2+3]5", turn_seed(7, 1)), ("[2+3]5[5*2]10", turn_seed(7, 2))]
    assert script.asked == [["2+3"], ["5*2"]] and whole.seed == 7
    assert decode(whole.token_ids) == whole.text == "[2+3]5[5*2]10=10" and whole.status is Status.OK
    assert why(whole) == ".....t.....tt..."
    assert whole.versions.tolist() == [1] * 6 + [2] * 7 + [3] * 3  # the tool's: of the turn that called
    assert whole.logprobs.tolist() == [-0.5] * 5 + [0] + [-0.5] * 5 + [0, 0] + [-0.5] * 3


def test_ids_are_never_made_from_text_again() -> None:
    """A tokenizer of two letters a token: the text of two turns would be cut otherwise than it was drawn."""
    words = {"[1": 0, "+": 1, "1": 2, "]": 3, "]2": 4, "2": 5, "=": 6}
    names = {i: w for w, i in words.items()}
    read = []

    class Pairs(Script):
        async def sample(self, prompt, seeds, draw, after=()):
            read.append(tuple(after))
            ids = [[0, 1, 2, 3], [6, 5]][len(read) - 1]
            columns = np.array(ids, np.int32), np.zeros(len(ids), np.float32), np.ones(len(ids), np.int32)
            text = "".join(names[i] for i in (*after, *ids))
            return [Rollout("p", *columns, text, 1.0, LIMIT)]

    script = Pairs(answers=[Answer("2")])
    joined = lambda ids: "".join(names[i] for i in ids)
    turns = ToolTurns(script, script, SYNTAX, 2, lambda frame, text: [words[text]], joined)
    (whole,) = asyncio.run(turns.sample(PROMPT, [1], DRAW))
    assert read == [(), (0, 1, 2, 3, 5)]  # "]" and "2" stay apart, though "]2" is a token
    assert whole.token_ids.tolist() == [0, 1, 2, 3, 5, 6, 5] and whole.text == "[1+1]2=2"


def test_members_of_a_group_call_together_and_end_apart() -> None:
    script = Script("=5", "[1]", "[2]", "=1", "=2", answers=[Answer("1"), Answer("2")])
    texts = [r.text for r in talk(script, seeds=(1, 2, 3))]
    assert texts == ["=5", "[1]1=1", "[2]2=2"] and script.asked == [["1", "2"]]


@pytest.mark.parametrize(
    ("turns", "answers", "text", "marks"),
    [
        (["[1+", "x"], [], "[1+", "..."),  # ends by itself, within a call
        (["[1]", "[2]", "[3]", "[4]"], list("123"), "[1]1[2]2[3]3[4]", "...t...t...t..."),  # one too many
        (["[12345678901234567890"], [], "[1234567890123456789", "." * 20),  # cut within a call
        (["[12345]", "x"], ["6" * 40], "[12345]" + "6" * 13, "." * 7 + "t" * 13),  # the answer has no room
        (["[1]", "x" * 30], ["1"], "[1]1" + "x" * 16, "...t" + "." * 16),  # cut in the last turn
    ],
)
def test_how_a_response_ends(turns: list[str], answers: list[str], text: str, marks: str) -> None:
    (whole,) = talk(Script(*turns, answers=list(map(Answer, answers))))
    assert whole.text == decode(whole.token_ids) == text and why(whole) == marks
    assert whole.status is (Status.OK if text == "[1+" else Status.TRUNCATED)


def test_a_tool_that_failed_is_read_as_an_error_and_one_that_gave_no_answer_fails_the_response() -> None:
    heard = []
    script = Script("[1/0]", "=0", answers=[Answer("error", True, detail="ZeroDivisionError: by zero")])
    turns = ToolTurns(
        script, script, SYNTAX, 3, framed, decode, lambda kind, **said: heard.append((kind, said))
    )
    (whole,) = asyncio.run(turns.sample(PROMPT, [1], DRAW))
    assert whole.text == "[1/0]error=0" and why(whole) == ".....eeeee.." and whole.status is Status.OK
    assert heard == [("tool_error", {"detail": "ZeroDivisionError: by zero"})]
    for status in (Status.TIMEOUT, Status.INFRA_FAILED):
        script = Script("[1]", answers=[Answer("", status=status)])
        (late,) = talk(script)
        assert late.status is status and len(script.read) == 1
    (failed,) = talk(Script("[1]", status=Status.TIMEOUT))
    assert failed.status is Status.TIMEOUT, "what failed is not listened to"


def test_a_continuation_holds_what_follows_and_counts_what_was_there() -> None:
    script = Script("3]", "=5", answers=[Answer("5")])
    (tail,) = talk(script, after="[2+3][")
    assert [read for read, _ in script.read] == ["[2+3][", "[2+3][3]5"]
    assert script.asked == [["3"]], "a call that was begun before is whole"
    assert decode(tail.token_ids) == "3]5=5" and tail.text == "[2+3][3]5=5" and why(tail) == "..t.."
    (full,) = talk(Script("3]", answers=[Answer("5" * 30)]), after="[2+3][")
    assert full.length == LIMIT - 6 and full.text == "[2+3][3]" + "5" * 12


def test_calls_are_found_between_their_marks() -> None:
    wide = Syntax("<calc>", "</calc>", "={answer};")
    assert wide.call("so <calc>1+<calc>2</calc>") == "2"
    assert wide.call("no call") is None and wide.call("2</calc>") == ""
    assert SYNTAX.call("[1]=") == "1", "a token may reach beyond the mark that ended the turn"
    assert wide.frame == "<calc>{answer}</calc>"


def test_seeds_of_turns_are_fixed_and_apart() -> None:
    assert turn_seed(7, 1) == turn_seed(7, 1)
    assert len({turn_seed(seed, turn) for seed in range(50) for turn in range(1, 4)}) == 150


# Tools.


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("12+34", "46"),
        (" 7 - 9*2 ", "-11"),
        ("(1+2)*-3", "-9"),
        ("1/3", "0.333333"),
        ("0.1+0.2", "0.3"),
        ("6/3", "2"),
        ("2.5", "2.5"),
    ],
)
def test_the_calculator_calculates(call: str, said: str) -> None:
    assert calculator()(call, PROMPT) == said


@pytest.mark.parametrize(
    "call", ["", "1/0", "2**9999999", "1+", "x", "__import__('os')", "1//2", "1" * 101, "(1)(2)"]
)
def test_the_calculator_refuses_the_rest_with_an_error_text(call: str) -> None:
    judge = build_verification(judges={"": {"fn": "math"}}, tool={"fn": "calculator"})
    verdict = judge(Call(call), PROMPT)
    assert (verdict.answer, verdict.correct, verdict.status) == ("error", 0, Status.OK) and verdict.detail


def test_judge_and_tool_are_told_apart() -> None:
    spec = {"fn": "gym", "task": "chain_sum", "extract": "after"}
    judge = build_verification(judges={"": spec}, tool={"fn": "calculator", "digits": 3})
    prompt = replace(PROMPT, entry={"answer": "5"})
    assert judge("=5", prompt).correct == 1 and judge("5", prompt).correct == 0
    assert judge(Call("2/3"), prompt).answer == "0.667"


# What becomes of them.


def test_a_demonstration_has_the_ids_of_its_turns_and_the_tools_are_not_learnt() -> None:
    worked = WorkedAnswer((("2+3", "5"), ("5*2", "10")), "=10")
    ids, spans = encode_demonstration(worked, SYNTAX, framed)
    script = Script("[2+3]", "[5*2]", "=10", answers=[Answer("5"), Answer("10")])
    (drawn,) = talk(script)
    group = demonstration_group(PROMPT, [*ids, 0], spans)
    assert ids == drawn.token_ids.tolist()
    assert why(group.rollouts[0]) == why(drawn) + "."
    zero = {name: np.zeros(17, np.float32) for name in ("logprobs", "entropy", "varentropy")}
    tokens = tokens_of([group], [torch.ones(1)], zero, 0)
    assert tokens.mask.tolist() == [c == "." for c in ".....t.....tt...."]


def test_worked_sums_say_what_the_calculator_says() -> None:
    settings = {"min_terms": 1, "max_terms": 4, "min_digits": 1, "max_digits": 2, "allow_negation": True}
    for question in reasoning_gym("chain_sum", size=40, seed=5, **settings)[0]:
        worked = chain_sum_calls(question.row)
        assert [calculator()(call, PROMPT) for call, _ in worked.calls] == [said for _, said in worked.calls]
        assert worked.end == f"={question.answer}"


def test_tools_are_counted_and_their_tokens_are_in_no_entropy() -> None:
    script = Script("[1]", "=1", answers=[Answer("1")])
    (called,), n = talk(script), 6
    notes = SamplerNotes(*(np.array(x, np.float32) for x in ([1, 1, 1, np.nan, 1, 1], [1] * 6, [0.5] * 6)))
    called = replace(called, notes=notes, spans=(*called.spans, Span(5, 6, MaskReason.TOOL_ERROR)))
    plain = replace(called, notes=None, spans=())
    group = Group(PROMPT, (called, plain), (Verdict(1.0, True), Verdict(0.0, False)))
    columns = {k: np.ones(2 * n, np.float32) for k in ("logprobs", "entropy", "varentropy")}
    columns["entropy"][[3, 5]] = 99.0
    found = step_metrics([group], tokens_of([group], [torch.zeros(2)], columns, 3))
    assert (found["tool/calls"], found["tool/failed"]) == (1.0, 0.5)
    assert found["tool/share"] == pytest.approx(2 / 12)
    told = [name for name in found if name.startswith("tool/")]
    assert all(matches(name, family_metrics("tool")) for name in told) and len(told) == 3
    assert found["entropy/mean"] == 1.0 and found["sampler/gap"] == 0.0
    bare = step_metrics(
        [replace(group, rollouts=(plain, plain))], tokens_of([group], [torch.zeros(2)], columns, 3)
    )
    assert not any(name.startswith("tool/") for name in bare)


class Calling(ToyWorld):
    """The toy with a tool: token 7 is a call, and ends a turn; what it is answered is token 0."""

    def __init__(self, *given, **settings) -> None:
        super().__init__(*given, **settings)
        self.groups: list[Group] = []

    def _draw(self, *given) -> Rollout:
        drawn = super()._draw(*given)
        calls = np.flatnonzero(drawn.token_ids == 7)
        return cut(drawn, int(calls[0]) + 1) if len(calls) else drawn

    async def answer(self, prompt: Prompt, calls: Sequence[str]) -> list[Answer]:
        await asyncio.sleep(0.001)
        return [Answer("0") for _ in calls]

    def step(self, step, metrics, groups, tokens) -> None:
        super().step(step, metrics, groups, tokens)
        self.groups += groups
        assert tokens.mask.tolist() == [code < 0 for g in groups for r in g.rollouts for code in r.observed]


@pytest.mark.parametrize("max_lag", [0, 1])
def test_the_driver_trains_responses_of_several_turns(monkeypatch: pytest.MonkeyPatch, max_lag: int) -> None:
    """With a lag the weights change between two turns of one response, and its tokens say so."""
    monkeypatch.setattr("tests.toy.LENGTH", 5)

    async def at_once(work: Callable[[], Any]) -> Any:
        return work()

    # else all responses of this world, which take no time, are drawn while a thread works
    monkeypatch.setattr("entroray.train.driver.in_thread", at_once)
    world = Calling(build_objective(yaml.safe_load(GRPO.read_text())), lr=0.1)
    marked = lambda ids: "".join("[]" if i == 7 else str(i) for i in ids)
    d = driver(world, max_lag=max_lag)
    d.roles = replace(
        d.roles, generator=ToolTurns(world, world, SYNTAX, 4, lambda frame, text: [int(text)], marked)
    )
    asyncio.run(d.train(5))
    rollouts = [r for g in world.groups for r in g.rollouts]
    called = [r for r in rollouts if 7 in r.token_ids[:-1].tolist()]
    assert len(called) > 20 and all(r.token_ids[i + 1] == 0 for r in called for i in answers_at(r))
    assert all(answers_at(r) == [s.start - 1 for s in r.spans] for r in called)
    assert max(s["lag/max"] for s in world.steps) == max_lag
    assert any(len(set(r.versions)) > 1 for r in called) == (max_lag > 0)
    assert all((np.diff(r.versions) >= 0).all() for r in called)
    assert world.steps[-1]["tool/calls"] > 0 and world.steps[-1]["tool/failed"] == 0


def answers_at(rollout: Rollout) -> list[int]:
    """Where a call stands that there was room to answer."""
    return [i for i in np.flatnonzero(rollout.token_ids == 7).tolist() if i + 1 < rollout.length]
