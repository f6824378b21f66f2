"""CoT-decoding: where an answer stands, its gap, which path is chosen, and what a path is made of."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from entroray.evaluation.cot_decoding import Decoding, decode_paths, path_gaps, words
from entroray.metrics.answer_confidence import (
    NoGap,
    answer_span,
    most_confident,
    most_supported,
    probability_gap,
)
from entroray.policy.tokenizer import byte_tokenizer
from entroray.rollout.splice import cut, join
from entroray.types import Draw, Group, Prompt, Rollout, Status, TopTokens, Verdict

TOKENIZER = byte_tokenizer()
WORDS = words(TOKENIZER)
PIECES = ["The ", "sum", " =", "=12", "\n4", "2", "."]
"""A vocabulary whose tokens straddle what is looked for."""


def pieced(ids: Sequence[int]) -> str:
    return "".join(PIECES[i] for i in ids)


def test_an_answer_is_found_where_its_tokens_are() -> None:
    everything = list(range(len(PIECES)))
    assert answer_span(everything, "42", pieced) == range(4, 6)
    assert answer_span(everything, "12", pieced) == range(3, 4), "the token of the answer begins before it"
    assert answer_span(everything, "sum", pieced) == range(1, 2)
    assert answer_span(everything, pieced(everything), pieced) == range(0, 7)
    assert answer_span([5, 0, 5], "2", pieced) == range(2, 3), "the last place it stands in"


def test_an_answer_that_is_not_there_is_a_typed_value() -> None:
    assert answer_span([0, 1], None, pieced) is NoGap.NO_ANSWER
    assert answer_span([0, 1], "", pieced) is NoGap.NO_ANSWER
    assert answer_span([0, 1], "43", pieced) is NoGap.NOT_IN_TEXT


def test_a_character_of_several_bytes_counts_whole() -> None:
    ids = TOKENIZER.encode("a=é€!<|end|>", add_special_tokens=False)
    assert len(ids) == 1 + 1 + 2 + 3 + 1 + 1
    assert answer_span(ids, "é€", WORDS.text) == range(2, 7)
    assert answer_span(ids, "€", WORDS.text) == range(4, 7)
    assert answer_span(ids, "!", WORDS.text) == range(7, 8), "the end token is no part of it"


def test_tokens_are_named_for_a_reader() -> None:
    name = lambda text: [WORDS.name(i) for i in TOKENIZER.encode(text, add_special_tokens=False)]
    assert name("7 ") == ["7", " "]
    assert name("<|end|>") == ["<|end|>"]
    assert name("é") == ["⟨Ã⟩", "⟨©⟩"], "half a character is shown by its name in the vocabulary"
    assert WORDS.name(4000) == "⟨4000⟩", "a row of the embedding beyond the tokenizer"


def test_a_gap_is_the_mean_over_the_answers_tokens_alone() -> None:
    p = np.array([[0.5, 0.5], [0.9, 0.05], [0.6, 0.3], [1.0, 0.0]], np.float32)
    assert probability_gap(p, range(1, 3)) == pytest.approx((0.85 + 0.3) / 2)
    assert probability_gap(p, range(3, 4)) == 1.0


def test_the_surest_path_and_the_best_supported_answer_may_differ() -> None:
    found: list[float | NoGap] = [0.5, NoGap.NOT_IN_TEXT, 0.9, 0.6, NoGap.NO_ANSWER]
    answers = ["4", "4", "5", "4", None]
    assert most_confident(found) == 2
    assert most_supported(found, answers) == 3, "0.5 + 0.6 for 4, of which the fourth is surer, 0.9 for 5"
    assert most_confident([NoGap.NO_ANSWER]) is None and most_supported([NoGap.FAILED], ["4"]) is None
    assert most_confident([0.5, 0.5]) == 0 and most_supported([0.5, 0.5], ["b", "a"]) == 0


PROMPT = Prompt("p", "2+2", (1, 2), "4")


def said(text: str, status: Status = Status.OK, deep: int = 2, limit: int = 9) -> Rollout:
    """A greedy answer by bytes whose first token was likelier than `5` and then `<|end|>`."""
    ids = np.array(TOKENIZER.encode(text, add_special_tokens=False), np.int32)
    others = TOKENIZER.encode("5<|end|>", add_special_tokens=False)
    ranked = np.array([[i, *others] for i in ids], np.int32).reshape(-1, 3)[:, :deep]
    p = np.tile(np.array([0.7, 0.2, 0.1], np.float32), (len(ids), 1))[:, :deep]
    n = len(ids)
    return Rollout(
        "p", ids, np.zeros(n, np.float32), np.zeros(n, np.int32), text, 0.0, limit, status,
        top_tokens=TopTokens(ranked, p),
    )  # fmt: skip


class Follower:
    """Continues whatever it is given with `=4`."""

    def __init__(self, status: Status = Status.OK) -> None:
        self.status, self.asked = status, []

    async def sample(
        self, prompt: Prompt, seeds: Sequence[int], draw: Draw, after: Sequence[int] = ()
    ) -> list[Rollout]:
        assert (draw.temperature, draw.top_tokens) == (0.0, 2)
        self.asked.append(tuple(after))
        whole = WORDS.text([*after, *TOKENIZER.encode("=4")])
        return [replace(said("=4", self.status), text=whole)]

    async def judge(self, prompt: Prompt, rollouts: Sequence[Rollout]) -> list[Verdict]:
        return [Verdict(1.0, True, r.text.rpartition("=")[2] or None) for r in rollouts]


def forked(greedy: Rollout, world: Follower, paths: int) -> Group:
    group = Group(PROMPT, (greedy,), (Verdict(1.0, True, "4"),))
    how = Decoding(paths, Draw(1.0, 9).greedy(2), lambda token: token in WORDS.ends)
    return asyncio.run(decode_paths([group], how, world, world, WORDS.text))[0]


def test_a_path_is_a_likely_first_token_and_what_follows_it_greedily() -> None:
    world = Follower()
    group = forked(said("7-3=4", deep=3), world, paths=3)
    five, end = TOKENIZER.encode("5<|end|>", add_special_tokens=False)
    assert world.asked == [(five,)], "nothing follows an end token, and the greedy answer is there already"
    _, second, ended = group.rollouts
    assert second.text == "5=4" and second.token_ids[0] == five and second.length == 3
    assert second.logprobs[0] == pytest.approx(np.log(0.2)) and second.observed.tolist() == [2, -1, -1]
    assert second.top_tokens is not None and second.top_tokens.probabilities.shape == (3, 2)
    assert ended.token_ids.tolist() == [end] and ended.text == "" and ended.status is Status.OK
    assert path_gaps(group, WORDS.text) == [pytest.approx(0.5), pytest.approx(0.5), NoGap.NO_ANSWER]
    assert len(forked(said("7", deep=3), Follower(), paths=1).rollouts) == 1


def test_a_path_that_failed_is_counted_and_not_scored() -> None:
    group = forked(said("7-3=4"), Follower(Status.TIMEOUT), paths=2)
    assert path_gaps(group, WORDS.text) == [pytest.approx(0.5), NoGap.FAILED]
    failed = replace(said(""), status=Status.TIMEOUT, top_tokens=None)
    assert len(forked(failed, Follower(), paths=2).rollouts) == 1


def test_one_token_responses_are_cut_not_followed() -> None:
    world = Follower()
    _, second = forked(said("7", limit=1), world, paths=2).rollouts
    assert world.asked == [] and second.status is Status.TRUNCATED and second.text == "5"


def test_likeliest_tokens_survive_cutting_and_joining_as_deep_as_both_go() -> None:
    whole = join(cut(said("12", deep=3), 1), said("4"))
    assert whole.top_tokens is not None and whole.top_tokens.token_ids.shape == (2, 2)
    assert join(said("1"), replace(said("2"), top_tokens=None)).top_tokens is None


def test_special_tokens_of_a_path_are_read_and_only_end_tokens_end_it() -> None:
    user, end = TOKENIZER.encode("<|user|><|end|>", add_special_tokens=False)
    assert WORDS.text([user, end]) == "<|user|>" and WORDS.ends == {end}
    ids = TOKENIZER.encode("<|user|>=42<|pad|>.<|end|>", add_special_tokens=False)
    assert answer_span(ids, "42", WORDS.text) == range(2, 4)
    assert answer_span(ids, "42.", WORDS.text) is NoGap.NOT_IN_TEXT, "a token that nobody hides stands within"
