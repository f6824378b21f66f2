"""Responses made of pieces: which token is whose, and which of them are learnt from."""

from dataclasses import replace

import numpy as np
import pyarrow.compute as pc
import pytest
import torch

from entroray.observe.token_records import record_table
from entroray.rollout.splice import as_observation, cut, join, observation
from entroray.train.batching import observed_tokens, tokens_of
from entroray.types import Group, MaskReason, Prompt, Rollout, SamplerNotes, Span, Verdict

NAMES = dict(enumerate(MaskReason))


def drawn(ids: list[int], version: int = 1, **more) -> Rollout:
    n = len(ids)
    rows = np.array(ids, np.int32), -np.arange(n, dtype=np.float32), np.full(n, version, np.int32)
    return Rollout("p", *rows, text=" ".join(map(str, ids)), temperature=0.5, limit=9, **more)


def why(rollout: Rollout) -> list[str]:
    return [str(NAMES.get(int(code), "")) for code in rollout.observed]


def test_a_branch_has_its_parents_first_tokens_and_learns_from_its_own() -> None:
    parent, tail = drawn([5, 6, 7, 8], version=1), drawn([9, 10], version=2)
    branch = join(as_observation(cut(parent, 2), MaskReason.PREFIX), replace(tail, text="5 6 9 10"))
    assert branch.token_ids.tolist() == [5, 6, 9, 10]
    assert branch.logprobs.tolist() == [0, -1, 0, -1]
    assert branch.versions.tolist() == [1, 1, 2, 2]
    assert branch.text == "5 6 9 10"
    assert why(branch) == ["prefix", "prefix", "", ""]


def test_what_a_tool_says_stands_between_two_turns_as_an_observation() -> None:
    first, second = drawn([1, 2], version=3), drawn([4], version=4)
    whole = join(join(first, observation(first, [30, 31], MaskReason.TOOL)), second)
    assert why(whole) == ["", "", "tool", "tool", ""]
    assert whole.logprobs.tolist() == [0, -1, 0, 0, 0]  # a token nobody drew has probability 1
    assert whole.versions.tolist() == [3, 3, 3, 3, 4]


def test_notes_of_a_sampler_survive_cutting_and_joining() -> None:
    notes = SamplerNotes(*(np.array(x, np.float32) for x in ([1, 2], [3, 4], [0.5, np.nan])))
    first = drawn([1, 2], notes=notes)
    whole = join(cut(first, 2), drawn([3]))
    assert whole.notes is not None
    assert whole.notes.entropy[:2].tolist() == [1, 2] and np.isnan(whole.notes.entropy[2])
    assert whole.notes.temperature[2] == np.float32(0.5)
    assert why(whole) == ["", "inserted", ""]


def test_cutting_keeps_the_part_of_a_span_that_is_left() -> None:
    piece = cut(replace(drawn([1, 2, 3]), spans=(Span(1, 3, MaskReason.TOOL),)), 2)
    assert piece.spans == (Span(1, 2, MaskReason.TOOL),)
    assert cut(drawn([1, 2]), 0).length == 0
    with pytest.raises(ValueError, match=r"^3 .* 2 "):
        cut(drawn([1, 2]), 3)


def test_observations_are_outside_the_mask_and_say_why_in_the_records() -> None:
    parent = drawn([5, 6, 7])
    branch = join(as_observation(cut(parent, 1), MaskReason.PREFIX), drawn([8]))
    group = Group(Prompt("p", "p", (0,), ""), (parent, branch), (Verdict(1.0, True), Verdict(0.0, False)))
    columns = {name: np.zeros(5, np.float32) for name in ("logprobs", "entropy", "varentropy")}
    t = tokens_of([group], [torch.tensor([1.0, -1.0])], columns, 0)
    assert observed_tokens(group.rollouts).tolist() == [-1, -1, -1, 1, -1]
    assert t.mask.tolist() == [True, True, True, False, True] and t.counts.tokens == 4
    reasons = record_table(1, [group], t)["mask_reason"]
    assert pc.cast(reasons, "string").to_pylist() == [None, None, None, "prefix", None]
