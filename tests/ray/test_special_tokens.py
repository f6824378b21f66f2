"""The shared engine: special tokens in responses and as stop strings, and what it says while it works."""

from dataclasses import replace
from typing import Any

import pytest

from entroray.engine.generator import Request
from entroray.policy.tokenizer import byte_tokenizer, encode_frame, response_text
from entroray.rollout.tool_turns import Syntax, ToolTurns
from entroray.types import Answer, Draw, Prompt, Rollout, Status
from entroray.workers import cluster
from tests.ray.stack import Stack

TOKENIZER = byte_tokenizer()
SPECIAL = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"]
PAD, END, USER, ASSISTANT = TOKENIZER.convert_tokens_to_ids(SPECIAL)
PROMPT = Prompt("q", "", (1, 2, 3), "")
PLAIN = Draw(1.0, 100)
"""Of a random model of 260 tokens: each is drawn in about a third of these responses."""


@pytest.fixture(scope="module")
def engine(stack: Stack) -> Any:
    return stack.wait(stack.engine())


def ask(stack: Stack, work: Any) -> Any:
    return stack.wait(cluster.settle(work, deadline=100.0, what="engine"))


def request(draw: Draw, *seeds: int, **changes: Any) -> Request:
    return replace(Request("q", PROMPT.token_ids, seeds, draw, 60.0), **changes)


def draws(stack: Stack, engine: Any, draw: Draw, *seeds: int) -> list[Rollout]:
    return ask(stack, engine.sample.remote(request(draw, *(seeds or range(48)))))


def whole(rollout: Rollout) -> str:
    """Every token's own text but that of an end token."""
    ids = rollout.token_ids.tolist()
    return TOKENIZER.decode(ids[:-1] if ids[-1] == END else ids)


def test_judges_read_special_tokens_and_never_the_end(stack: Stack, engine: Any) -> None:
    for draw in (PLAIN, replace(PLAIN, stop=("no such text",))):
        rollouts = draws(stack, engine, draw)
        assert all(r.text == whole(r) and "<|end|>" not in r.text for r in rollouts)
        assert sum(r.token_ids[-1] == END for r in rollouts) > 4
        seen = [r for r in rollouts if {PAD, USER, ASSISTANT} & set(r.token_ids.tolist())]
        assert len(seen) > 10 and all("<|" in r.text for r in seen)


def test_nothing_of_generation_config_reaches_the_draws(stack: Stack, engine: Any) -> None:
    drawn = draws(stack, engine, replace(PLAIN, max_tokens=8))
    assert len({r.token_ids.tobytes() for r in drawn}) > 40, "its top_k of 1 would make one of all 48"


def test_a_stop_string_ends_a_response_whatever_tokens_it_is_made_of(stack: Stack, engine: Any) -> None:
    rollouts = draws(stack, engine, replace(PLAIN, stop=("<|user|>", "q")))
    q = TOKENIZER.convert_tokens_to_ids("q")
    assert all(r.text == whole(r) and not {USER, q} & set(r.token_ids[:-1].tolist()) for r in rollouts)
    for last, text in ((USER, "<|user|>"), (q, "q")):
        stopped = [r for r in rollouts if r.token_ids[-1] == last]
        assert len(stopped) > 4 and all(r.status is Status.OK and r.text.endswith(text) for r in stopped)
    seed, ids, at = next(
        (seed, ids, i)
        for seed, ids in enumerate(r.token_ids.tolist() for r in draws(stack, engine, PLAIN))
        for i in range(3, len(ids))
        if ids[i] in (PAD, USER, ASSISTANT) and max(ids[i - 2 : i]) < 94  # behind two letters
    )
    mixed = TOKENIZER.decode(ids[at - 2 : at + 1])
    (cut,) = draws(stack, engine, replace(PLAIN, stop=(mixed,)), seed)
    assert cut.token_ids.tolist() == ids[: at + 1] and cut.text.endswith(mixed) and cut.status is Status.OK


def test_a_call_may_begin_and_end_with_special_tokens(stack: Stack, engine: Any) -> None:
    asked: list[str] = []

    class Echo:
        async def answer(self, prompt: Prompt, calls: Any) -> list[Answer]:
            asked.extend(calls)
            return [Answer("<|pad|>") for _ in calls]

    class Engine:
        async def sample(self, prompt: Prompt, seeds: Any, draw: Draw, after: Any = ()) -> list[Rollout]:
            work = engine.sample.remote(request(draw, *seeds, after=tuple(after)))
            return await cluster.settle(work, deadline=90.0, what="engine")

    syntax = Syntax("<|pad|>", "<|user|>", "<|assistant|>{answer}")
    encode, decode = encode_frame(TOKENIZER), response_text(TOKENIZER, ())
    turns = ToolTurns(Engine(), Echo(), syntax, 1, encode, decode)
    begun = turns.sample(PROMPT, range(64), replace(PLAIN, stop=("<|user|>",)), [PAD])
    rollouts = stack.wait(begun)
    called = [r for r in rollouts if r.spans]
    assert len(called) > 4 and all(asked[: len(called)]), "each call stands behind `open`"
    for r in called:
        (span,) = r.spans
        shown = r.token_ids[span.start - 1 : span.stop].tolist()
        assert shown[:2] == [USER, ASSISTANT] and PAD not in shown, "the tool's text is no token"
        assert "<|user|><|assistant|><|pad|>".startswith(TOKENIZER.decode(shown))
        assert r.text == "<|pad|>" + whole(r)


def test_an_engine_at_work_says_so_and_its_pool_waits_for_it(stack: Stack, engine: Any) -> None:
    def set_beat(_: Any, seconds: float) -> None:
        from entroray.engine import waiting

        waiting.BEAT = seconds

    async def indices() -> list[list[int]]:
        asked = [request(PLAIN, *range(64)), request(PLAIN, *range(64, 80))]
        stream = engine.sample_all.options(num_returns="streaming").remote(asked)
        heard: list[list[int]] = []
        while not {0, 1} <= {index for each in heard for index in each}:
            heard.append(list(await cluster.settle_next(stream, deadline=60.0, what="engine")))
        return heard

    pool = stack.wait(stack.machine()).engines
    ask(stack, engine.__ray_call__.remote(set_beat, 0.005))
    try:
        heard = stack.wait(indices())
        rollouts = stack.wait(pool.sample(request(PLAIN, *range(64))))
    finally:
        ask(stack, engine.__ray_call__.remote(set_beat, 10.0))
    assert heard.count([]) > 2 and sorted(index for each in heard for index in each) == [0, 1]
    assert len(rollouts) == 64 and all(r.status.usable for r in rollouts)
