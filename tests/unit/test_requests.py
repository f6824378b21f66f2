"""What is made of an engine's answer, and how long one is waited for; no engine runs here."""

from collections.abc import Sequence
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from entroray.engine.vllm_request import Request, as_rollout
from entroray.engine.waiting import Waiting
from entroray.policy.tokenizer import byte_tokenizer, response_text
from entroray.types import Draw, Rollout, Status

TOKENIZER = byte_tokenizer()
END = TOKENIZER.eos_token_id
READ = response_text(TOKENIZER, {END})
WORDS = ["12", "\n\n\n", "<stop>=", "st", "op", "a\nb", "€", "<end>"]
"""Tokens of several characters, which may reach beyond a stop string."""


def words(ids: Sequence[int]) -> str:
    return "".join(WORDS[i] for i in ids).removesuffix("<end>")


def answered(ids: Sequence[int], read: Any = READ, stop: tuple[str, ...] = (), **ended: Any) -> Rollout:
    """The response that vLLM's completion of these tokens becomes."""
    how = {"finish_reason": "stop", "stop_reason": None, "after": ()} | ended
    logprobs = SimpleNamespace(logprobs=[-0.5] * len(ids))
    completion = SimpleNamespace(
        token_ids=list(ids), logprobs=logprobs, weight_versions=(), text="not ours",
        finish_reason=how["finish_reason"], stop_reason=how["stop_reason"],
    )  # fmt: skip
    request = Request("p", (1,), (0,), Draw(1.0, 9, stop=stop), 1.0, how["after"])
    return as_rollout(request, completion, read, None)


def encoded(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def test_the_text_of_a_response_shows_special_tokens_and_no_end() -> None:
    assert answered(encoded("<|user|>12<|end|>")).text == "<|user|>12"
    cut = answered(encoded("1<|pad|>"), finish_reason="length")
    assert cut.text == "1<|pad|>" and cut.status is Status.TRUNCATED
    assert answered(encoded("2<|end|>"), after=tuple(encoded("1<|user|>"))).text == "1<|user|>2"


@pytest.mark.parametrize(
    ("ids", "stop", "text"),
    [
        ([0, 1], "\n", "12\n"),  # the first of three in one token
        ([0, 1], "\n\n", "12\n\n"),
        ([0, 2], "<stop>", "12<stop>"),
        ([0, 3, 4, 0], "stop12", "12stop12"),  # over three tokens
        ([5, 5], "\nba", "a\nba"),
        ([6, 5], "€a\n", "€a\n"),
        ([0, 3, 4], "op", "12stop"),
        ([4, 0, 4], "op", "op12op"),  # not one that stood there before it counted (min_tokens)
        ([0, 7], "<end>", "12"),  # an end token that is a stop string, too, is an end token
    ],
)
def test_a_response_ends_with_the_stop_string_that_ended_it(ids: list[int], stop: str, text: str) -> None:
    assert answered(ids, words, (stop,), stop_reason=stop).text == text
    begun = answered(ids[1:], words, (stop,), stop_reason=stop, after=(ids[0],))
    assert begun.text == text and begun.status is Status.OK
    assert answered(ids, words, (stop,)).text == words(ids), "where the end token ended it nothing is cut"


def test_a_stop_character_may_begin_in_one_token_and_end_within_the_next() -> None:
    pieces = [b"a", b"\xe2\x82", b"\xac==\n"]
    read = lambda ids: b"".join(pieces[i] for i in ids).decode(errors="replace")
    assert read([0, 1]) == "a\ufffd" and answered([0, 1, 2], read, ("€",), stop_reason="€").text == "a€"


def test_a_response_stopped_for_its_loops_is_whole() -> None:
    looped = answered(
        [0, 0, 0], words, ("stop",), finish_reason="repetition", stop_reason="repetition_detected"
    )
    assert looped.text == "121212" and looped.status is Status.TRUNCATED


def waiting(deadline: float, *names: str, admitted: float = 100.0, **begun: float) -> Waiting:
    request = Request("p", (1,), tuple(range(len(names))), Draw(1.0, 9), deadline)
    return Waiting(request, Future(), admitted, set(names), begun)


def test_a_samples_clock_starts_with_its_first_token() -> None:
    both = waiting(10.0, "a", "b", a=150.0, b=155.0)
    assert both.late(160.0, idle_since=0.0) == set()
    assert both.late(160.1, idle_since=0.0) == {"a"} and both.late(170.0, idle_since=0.0) == {"a", "b"}


def test_a_sample_in_the_queue_waits_while_others_are_at_work_and_not_for_ever() -> None:
    queued = waiting(10.0, "a")
    assert queued.late(109.0, idle_since=0.0) == set()
    assert queued.late(9000.0, idle_since=8995.0) == set(), "the engine was at work on others until then"
    assert queued.late(110.1, idle_since=0.0) == {"a"} == queued.late(9000.0, idle_since=8989.0)
    assert waiting(10.0, "a", "b", b=8995.0).late(9000.0, idle_since=8989.0) == {"a"}
