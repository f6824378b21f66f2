"""Top-p and top-k in training: what vLLM is asked, what is read of its answer, what is refused."""

import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from entroray.engine import vllm_request
from entroray.engine.vllm_request import Noted, Request, as_rollout, probe_params, sampling_params
from entroray.errors import ConfigError, InfrastructureError
from entroray.kept_sets import KeptSets, encode
from entroray.types import Draw
from entroray.wiring import actors, sampler, warm_start
from entroray.wiring.parts import build_parts
from tests.composed import configured

GPU = ("cluster=gpu", "learner.lr=1e-6", "model.path=/models/some")
CUT = Draw(0.8, 9, top_p=0.9, top_k=50, kept=True)


@pytest.fixture
def params(monkeypatch: pytest.MonkeyPatch) -> None:
    """What vLLM's SamplingParams is called with."""
    kinds = SimpleNamespace(RequestOutputKind=SimpleNamespace(FINAL_ONLY="last"))
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=dict))
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", kinds)


def asked(draw: Draw, masks: bool) -> Any:
    return sampling_params(Request("q", (1,), (0,), draw, 1.0), 0, "name", masks)


def test_our_processor_cuts_on_a_cpu_and_vllm_on_a_gpu(params: None) -> None:
    ours, theirs = asked(CUT, masks=False), asked(CUT, masks=True)
    assert (ours["top_p"], ours["top_k"], ours["temperature"]) == (1.0, 0, 0.8)
    assert ours["extra_args"]["entroray"]["kept"] == [50, 0.9]
    assert ours["extra_args"]["entroray"]["rule"] == '{"fn": "fixed"}'
    assert (theirs["top_p"], theirs["top_k"], theirs["extra_args"]) == (0.9, 50, None)


def test_an_evaluation_is_cut_by_vllm_itself(params: None) -> None:
    for draw in (replace(CUT, kept=False), replace(CUT, kept=False, rule={"fn": "fixed"})):
        told = asked(draw, masks=False)
        assert (told["top_p"], told["top_k"]) == (0.9, 50)
        assert not told["extra_args"] or told["extra_args"]["entroray"]["kept"] is None


def test_an_engine_that_tells_masks_is_asked_for_nothing_it_refuses(params: None) -> None:
    """vLLM 0.32.0 refuses temperature 0, top_k 0 and logits processors there."""
    greedy = asked(CUT.greedy(), masks=True)
    assert (greedy["temperature"], greedy["top_k"]) == (1.0, 1) and not CUT.greedy().kept
    assert (asked(CUT.greedy(), masks=False)["temperature"], probe_params(False)["top_k"]) == (0.0, 0)
    assert probe_params(True)["top_k"] == 1
    noted = Request("q", (1,), (0,), replace(CUT, rule={"fn": "fixed"}), 1.0)
    assert not vllm_request.without_notes(noted).draw.notes
    assert vllm_request.without_notes(replace(noted, draw=replace(CUT, factor=1.5))).draw.notes


def answered(ids: list[int], mask: Any = None, noted: Noted | None = None, draw: Draw = CUT) -> Any:
    completion = SimpleNamespace(
        token_ids=ids, logprobs=SimpleNamespace(logprobs=[-0.5] * len(ids)), weight_versions=(),
        finish_reason="stop", stop_reason=None, sampling_mask=mask and SimpleNamespace(token_ids=mask),
    )  # fmt: skip
    return as_rollout(Request("q", (1,), (0,), draw, 1.0), completion, lambda ids: "", noted)


def test_sets_come_by_vllms_mask_or_by_our_processor() -> None:
    by_mask = answered([5, 7], [[2, 5, 90_000], [7]])
    assert by_mask.notes is None and by_mask.kept.sizes.tolist() == [3, 1]
    assert by_mask.kept.members()[1].tolist() == [2, 5, 90_000, 7]
    values = np.ones((3, 3), np.float32)
    told = KeptSets.of([2, 1, 1], [encode(np.array(s), 300) for s in ([4, 5], [7], [9])])
    ours = answered([5, 7], noted=Noted(values, told))
    assert ours.notes is None and ours.kept.members()[1].tolist() == [4, 5, 7], "as many as there are tokens"
    assert answered([5, 7], noted=Noted(values, told), draw=replace(CUT, rule={"fn": "fixed"})).notes
    assert answered([5], [[5]], draw=replace(CUT, kept=False)).kept is None


@pytest.mark.parametrize("mask", [None, [[5]], [[5], [8, 9]]])
def test_a_token_without_its_set_or_outside_of_it_is_an_error(mask: Any) -> None:
    with pytest.raises(InfrastructureError, match=r"sampler\.top_p, sampler\.top_k"):
        answered([5, 7], mask)


def test_training_draws_ask_for_sets_and_evaluations_do_not() -> None:
    config = configured("sampler.top_p=0.9")
    drawn = sampler.training_draw(config.sampler, config.rollout, build_parts(config), None)
    assert (drawn.kept, drawn.top_p, drawn.top_k, drawn.notes) == (True, 0.9, 0, False)
    assert not sampler.evaluation_draw(config.sampler, config.rollout, {}).kept
    assert not sampler.plain_draw(config.sampler, config.rollout).kept
    whole = configured()
    assert not sampler.training_draw(whole.sampler, whole.rollout, build_parts(whole), None).kept
    assert not sampler.describe_sets(whole) and "our logits processor" in sampler.describe_sets(config)


def test_a_cut_changes_neither_the_tiny_model_nor_how_it_is_measured() -> None:
    cut, whole = configured("sampler.top_p=0.9", "sampler.top_k=50"), configured()
    assert warm_start.cached_folder(cut) == warm_start.cached_folder(whole)
    drawn, usual = (sampler.plain_draw(warm_start._supervised(c).sampler, c.rollout) for c in (cut, whole))
    assert drawn == usual and (drawn.top_p, drawn.top_k) == (1.0, 0)


def test_log_probs_of_a_greedy_draw_among_one_token_are_not_known() -> None:
    greedy = CUT.greedy()
    assert np.isnan(answered([5, 7], [[5], [7]], draw=greedy).logprobs).all()
    assert answered([5, 7], draw=greedy).logprobs.tolist() == [-0.5, -0.5], "of an engine without masks"


def options(*told: str) -> dict[str, Any]:
    config = configured(*told)
    return actors.logits_processors(config, build_parts(config))


def test_engines_are_started_with_what_tells_the_sets() -> None:
    assert options() == {} and options(*GPU) == {}
    (ours,) = options("sampler.top_k=20")["logits_processors"]
    assert ours == vllm_request.PROCESSOR
    assert options(*GPU, "sampler.top_p=0.9", "sampler.top_k=1024") == {"return_sampling_mask": True}


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ([*GPU, "sampler.top_p=0.9"], r"sampler\.top_p=0\.9 .*GPU.*set sampler\.top_k=1024"),
        ([*GPU, "sampler.top_k=1025"], r"sampler\.top_k=1025 .*set sampler\.top_k=1024"),
        ([*GPU, "sampler.top_k=50", "sampler=by_entropy"], r"sampler\.rule.*sampler=fixed.*top_k=0"),
        ([*GPU, "sampler.top_k=50", "rollout=branching"], r"rollout\.plan.*rollout=plain"),
        ([*GPU, "sampler.top_k=50", "rollout=hotter_again"], r"rollout\.second\.factor=1\.\d+ is not 1"),
        (
            [*GPU, "sampler.top_k=50", "evaluate=aime24", "evaluate.sets.aime24.temperature=0"],
            r"evaluate\.sets\.aime24 has temperature 0",
        ),
        (["sampler.top_k=5", "+generator.engine.speculative_config={a: b}"], r"speculative_config"),
        ([*GPU, "sampler.top_k=5", "+generator.engine.speculative_config={a: b}"], r"speculative_config"),
        (["sampler.top_k=1"], r"sampler\.top_k=1 .*gradient.*sampler\.top_k=0"),
        (["sampler.top_k=-1"], r"sampler\.top_k=-1.*or 0 for all"),
        (
            [
                "sampler.top_k=5",
                "+generator.engine.logits_processors=['mine:Own']",
                "objective.correction={fn: truncated_importance}",
            ],
            r"generator\.engine\.logits_processors=\['mine:Own'\].*sampler\.top_k=0",
        ),
        (
            ["+generator.engine.return_sampling_mask=true"],
            r"return_sampling_mask=True: .*sampler\.top_p",
        ),
    ],
)
def test_what_cannot_tell_its_sets_is_refused(told: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        configured(*told)


def test_sets_go_with_everything_on_a_cpu() -> None:
    for how in ("sampler=by_entropy", "sampler=quadrants", "rollout=branching", "rollout=hotter_again"):
        configured("sampler.top_p=0.9", "sampler.top_k=2000", how)
    configured(*GPU, "sampler.top_p=0.9", "sampler.top_k=50")
