"""What an engine does on GPUs, on vLLM's own classes with a stand-in for its card: steps ahead and runner V2.

vLLM's queue of batches and its interface of logits processors are the true ones; no step is computed.
"""

import json
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from entroray.engine import overlap
from entroray.engine.generator import Generator
from entroray.engine.starting import PROCESSOR_V2, fit_processors, runner
from entroray.engine.vllm_request import PROCESSOR
from entroray.errors import ConfigError, InfrastructureError
from entroray.rollout import reshape

# --- steps ahead ---


class Scheduler:
    """One endless request, whose n-th token is n."""

    def __init__(self) -> None:
        self.paused, self.scheduled, self.read = False, 0, list[int]()

    def set_pause_state(self, state: Any) -> None:
        self.paused = state.name == "PAUSED_ALL"

    def has_requests(self) -> bool:
        return not self.paused

    def schedule(self, throttle: bool) -> Any:
        self.scheduled += 1
        return SimpleNamespace(total_num_scheduled_tokens=1, pending_structured_output_tokens=False)

    def get_grammar_bitmask(self, output: Any) -> None:
        return None

    def update_from_output(self, scheduled: Any, output: int) -> dict[int, Any]:
        self.read.append(output)
        return {0: SimpleNamespace(outputs=[output], weight_version=None)}


class Card:
    """An executor whose steps are drawn by the weights there are as they are launched."""

    def __init__(self) -> None:
        self.weights, self.drawn, self.calls, self.is_sleeping = "0", list[str](), list[str](), False

    def execute_model(self, scheduled: Any, non_block: bool) -> Future:
        return Future()

    def sample_tokens(self, grammar: Any, non_block: bool) -> Future:
        self.drawn.append(self.weights)
        (future := Future()).set_result(len(self.drawn))  # type: ignore[var-annotated]
        return future

    def collective_rpc(self, method: str, *_: Any) -> list[None]:
        self.calls.append(method)
        return [None]


class Llm:
    """As much of vLLM's `LLM` as an update needs, around a true `EngineCore`."""

    def __init__(self, core: Any):
        self.core, self.asked = core, list[str]()
        self.llm_engine = SimpleNamespace(engine_core=SimpleNamespace(engine_core=core), step=self.step)

    def sleep(self, level: int, mode: str) -> None:
        assert self.core.sleep(level, mode) is None

    def wake_up(self, tags: list[str]) -> None:
        self.core.wake_up(tags)

    def step(self) -> list[tuple[int, str]]:
        """(token, the version it is given) of what is read."""
        outputs, _ = self.core.step_fn()
        return [(token, eco.weight_version) for eco in (outputs or {}).values() for token in eco.outputs]

    def start_weight_update(self) -> None:
        assert not self.core.batch_queue, "steps of the old weights are under way"

    def update_weights(self, request: Any) -> None:
        self.core.model_executor.weights = "7"

    def collective_rpc(self, method: Any) -> list[Any]:
        return [method(SimpleNamespace(weight_transfer_engine=None))]

    def finish_weight_update(self, weight_version: str) -> None:
        self.core.set_weight_version(weight_version)

    def get_weight_version(self) -> str:
        return self.core.get_weight_version()


@pytest.fixture
def ahead() -> Any:
    """An engine two steps deep, as vLLM's runner V2 has it."""
    from vllm.v1.engine.core import EngineCore

    core: Any = object.__new__(EngineCore)
    core.scheduler, core.model_executor = Scheduler(), Card()
    core.batch_queue_size, core.batch_queue = 2, deque(maxlen=2)
    core.step_fn, core.log_stats, core._weight_version = core.step_with_batch_queue, False, "0"
    core.is_mm_encoder_only = core.is_pooling_model = core.check_for_draft_tokens = False
    core.aborts_queue = SimpleNamespace(empty=lambda: True)
    detail = SimpleNamespace(enable_logging_iteration_details=False)
    core.vllm_config = SimpleNamespace(observability_config=detail)
    engine: Any = object.__new__(Generator)
    engine.llm, engine.salt, engine.staged, engine.kept = Llm(core), 0, None, []
    engine.asleep, engine.paused, engine.updating = 0, False, False
    engine.threads = SimpleNamespace(most=1, take=lambda number: None)
    engine._collect = engine.kept.extend
    return engine


def test_tokens_under_way_when_weights_change_have_the_version_that_drew_them_and_none_is_lost(
    ahead: Any,
) -> None:
    for _ in range(5):
        ahead.kept += ahead.llm.step()
    core = ahead.llm.core
    assert core.batch_queue and len(core.model_executor.drawn) > len(ahead.kept), "one is always ahead"
    ahead._open()
    assert not core.batch_queue and "synchronize_device" in core.model_executor.calls
    ahead._load_staged({})
    assert ahead._commit(7, keep_kv=True) == (7, None)
    for _ in range(4):
        ahead.kept += ahead.llm.step()
    tokens, versions = zip(*ahead.kept, strict=True)
    drawn = core.model_executor.drawn
    assert list(tokens) == list(range(1, len(tokens) + 1)) and len(tokens) >= len(drawn) - 1
    assert list(versions) == drawn[: len(tokens)] and set(versions) == {"0", "7"}


def test_without_coming_to_rest_a_token_would_have_the_wrong_version(
    ahead: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the test above would miss if the stand-ins attributed tokens by themselves."""
    for _ in range(5):
        ahead.kept += ahead.llm.step()
    core = ahead.llm.core
    core.model_executor.weights = "7"
    core.set_weight_version("7")
    ahead.kept += ahead.llm.step()
    assert [v for _, v in ahead.kept] != core.model_executor.drawn[: len(ahead.kept)]


def test_a_card_that_hangs_is_not_waited_for_for_ever(ahead: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ahead.llm.step()
    ahead.llm.llm_engine.step = list  # nothing is ever read
    clock = iter(range(0, 1000, 50))
    monkeypatch.setattr(overlap.time, "monotonic", lambda: float(next(clock)))
    with pytest.raises(InfrastructureError, match=r"1 steps .* 60 s: .*generator\.overlap=false"):
        ahead._open()


def test_an_engine_without_steps_ahead_is_not_paused(ahead: Any) -> None:
    ahead.llm.core.batch_queue = None
    ahead._open()
    assert not ahead.llm.core.scheduler.paused and not ahead.llm.core.model_executor.calls


# --- runner V2 ---

RULES = {
    "fixed": {"fn": "fixed"},
    "ramp": {"fn": "by_entropy", "minimum": 0.6, "maximum": 1.8, "start": 1.0, "full": 3.0},
    "corners": {"fn": "quadrants", "low_entropy": 2.0, "low_varentropy": 1.1, "high_varentropy": 1.1},
}
SLOTS = 8


class Batch:
    """Requests in vLLM's slots, as V2 hands them to a processor."""

    def __init__(self) -> None:
        from entroray.engine.logits_processor_v2 import Shaping

        counts = lambda: SimpleNamespace(np=np.zeros(SLOTS, np.int32))
        self.states: Any = SimpleNamespace(
            max_num_reqs=SLOTS, device=torch.device("cpu"), prompt_len=counts(), prefill_len=counts()
        )
        self.shaping = Shaping(None, self.states)

    def add(self, slot: int, name: str | None, *, prompt: int = 3, begun: int = 0, **asked: Any) -> bool:
        from vllm import SamplingParams

        told = {"rule": json.dumps(RULES["ramp"]), "factor": 1.0, "insert": None} | asked
        temperature = told.pop("temperature", 1.0)
        extra = {"entroray": told | {"name": name}} if name else None
        self.states.prompt_len.np[slot], self.states.prefill_len.np[slot] = prompt, prompt + begun
        params = SamplingParams(max_tokens=9, temperature=temperature, extra_args=extra)
        return self.shaping.add_request(slot, params)

    def step(self, logits: torch.Tensor, lengths: dict[int, int]) -> torch.Tensor:
        """Reshaped logits; `lengths` are of each slot's row with what was read in this step."""
        self.shaping.apply_staged_writes()
        slots, padded = np.array(list(lengths)), np.array([*lengths.values(), 0, 0], np.int32)
        context: Any = SimpleNamespace(
            idx_mapping=torch.from_numpy(slots.astype(np.int32)),
            idx_mapping_np=slots,
            seq_lens_upper_bound_np=padded,
        )
        return self.shaping.apply(logits.clone(), context)


@pytest.fixture
def batch() -> Iterator[Batch]:
    from entroray.engine.logits_processor import NOTES

    assert not NOTES.slots
    yield Batch()
    assert not NOTES.slots, "a test leaves no notes to the next"


def notes(*names: str) -> list[np.ndarray]:
    from entroray.engine.logits_processor_v2 import drain

    return [noted.values for noted in drain(None, names) if noted]


def rows(count: int, seed: int = 0) -> torch.Tensor:
    """Logits [count, 50] of entropies from 0 to 3.9 nats."""
    scale = torch.linspace(0.1, 12.0, count)[:, None]
    return torch.randn(count, 50, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("temperature", [1.0, 0.8])
@pytest.mark.parametrize("rule", RULES)
def test_v2_draws_and_notes_what_v1_does(batch: Batch, rule: str, temperature: float) -> None:
    """V1 sees logits over the temperature, V2 before; 12 rows in two steps, by V1's own bundle of rows."""
    from entroray.engine.logits_processor import NOTES, Row, Shaping

    z, told = rows(6), json.dumps(RULES[rule])
    for slot in range(6):
        batch.add(slot, f"two {slot}", rule=told, factor=1.1, temperature=temperature)
    v1 = Shaping(None, torch.device("cpu"), False)
    tokens: list[list[int]] = [[] for _ in range(6)]
    for i in range(6):
        v1.rows[i] = Row(NOTES.open(f"one {i}", 9), tokens[i], told, temperature, 1.1, None, None)
    v1.bundles = v1._bundles()
    for step in range(2):
        ours = batch.step(z + step, {slot: 3 + step for slot in range(6)})
        theirs = v1.apply((z + step) / temperature)
        torch.testing.assert_close(ours / temperature, theirs, atol=1e-5, rtol=1e-5)
        for each in tokens:
            each.append(0)
    two, one = notes(*(f"two {i}" for i in range(6))), notes(*(f"one {i}" for i in range(6)))
    np.testing.assert_allclose(np.array(two), np.array(one), atol=1e-4)
    assert np.array(two).shape == (6, 2, 3) and (rule == "fixed" or np.ptp(np.array(two)[..., 2]) > 0.1)


def test_v2_leaves_rows_alone_that_bring_no_rule_and_notes_no_part_of_a_prompt(batch: Batch) -> None:
    assert batch.add(2, "a") and batch.add(5, "b") and not batch.add(1, None)
    assert not batch.add(4, "greedy", temperature=0.0)
    z = rows(3)
    out = batch.step(z, {1: 9, 5: 2, 2: 3})  # b has read two of its three tokens
    assert torch.equal(out[0], z[0]) and not torch.equal(out[2], z[2])
    batch.step(z, {5: 3, 1: 10, 2: 4})
    a, b = notes("a", "b")
    assert len(a) == 2 and len(b) == 1 and not np.isnan(a).any() and not np.isnan(b).any()
    batch.add(5, None)  # the slot is another's now
    assert torch.equal(batch.step(z[:1], {5: 8})[0], z[0])


def test_v2_goes_on_where_a_pre_empted_request_stopped_in_whichever_slot(batch: Batch) -> None:
    batch.add(0, "a")
    for length in (3, 4):
        batch.step(rows(1, length), {0: length})
    batch.add(6, "a", begun=2)
    batch.step(rows(1, 9), {6: 4})  # it reads its own tokens anew, in two parts, and notes none of them
    batch.step(rows(1, 5), {6: 5})
    (found,) = notes("a")
    want = [reshape.measure_entropy(rows(1, length))[0].item() for length in (3, 4, 5)]
    np.testing.assert_allclose(found[:, 0], want, atol=1e-5)


def test_v2_notes_nothing_of_a_step_beyond_the_end_of_a_request(batch: Batch) -> None:
    """With steps ahead a request's last token is read after one more of it was scheduled."""
    batch.add(0, "a")
    batch.step(rows(1), {0: 3})
    assert len(notes("a")[0]) == 1
    batch.step(rows(1), {0: 4})
    batch.add(0, "b")
    batch.step(rows(1), {0: 3})
    assert len(notes("b")[0]) == 1


def test_v2_inserts_a_token_once_a_response_and_again_after_no_pre_emption(batch: Batch) -> None:
    told = {"rule": json.dumps({"fn": "quadrants", "high_entropy": 2.5}), "insert": 33}
    flat = torch.zeros(1, 50)
    batch.add(3, "a", **told)
    first = batch.step(flat, {3: 3})
    assert first.isfinite().sum() == 1 and first[0, 33] == 0
    batch.add(0, "a", begun=1, **told)
    assert batch.step(flat, {0: 4}).isfinite().all() and batch.step(flat, {0: 5}).isfinite().all()
    assert np.isnan(notes("a")[0][:, 2]).tolist() == [True, False, False]


def test_v2_waits_for_notes_under_way_only_where_a_request_comes_back(
    batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    from entroray.engine import logits_processor_v2 as v2

    class Event:
        there = waited = False

        def query(self) -> bool:
            return self.there

        def synchronize(self) -> None:
            self.there = self.waited = True

    events = [Event(), Event()]
    coming = iter(events)
    monkeypatch.setattr(v2, "_to_host", lambda values: (next(coming), values))
    batch.add(0, "a")
    batch.step(rows(1), {0: 3})
    v2.flush()
    assert len(v2.PENDING) == 1, "not there yet"
    events[0].there = True
    batch.step(rows(1), {0: 4})
    assert len(v2.PENDING) == 1 and not events[1].waited
    batch.add(2, "a", begun=2)
    assert not v2.PENDING and events[1].waited and len(notes("a")[0]) == 2


def test_one_token_is_left_to_some_rows_without_looking_which() -> None:
    z, here = rows(4), torch.tensor([True, False, True, False])
    looked, unseen = z.clone(), z.clone()
    reshape.keep_only(looked, here.nonzero().squeeze(-1), torch.tensor([7, 9]))
    reshape.keep_where(unseen, here, torch.tensor([7, 3, 9, 3]))
    assert torch.equal(looked, unseen)


def test_a_rule_does_not_keep_an_engine_on_gpus_from_runner_v2(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm.triton_utils

    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
    v1 = "entroray.engine.logits_processor:Shaping"
    assert fit_processors([PROCESSOR], ahead=False) == [v1], "without Triton, as here"
    assert os.environ.pop("VLLM_USE_V2_MODEL_RUNNER") == "0"
    monkeypatch.setattr(vllm.triton_utils, "HAS_TRITON", True)
    fits = "vllm.v1.worker.gpu.sample.bad_words:BadWordsState"
    assert fit_processors([PROCESSOR, fits], ahead=True) == [PROCESSOR_V2, fits]
    assert "VLLM_USE_V2_MODEL_RUNNER" not in os.environ
    own = "vllm.v1.sample.logits_processor.builtin:MinPLogitsProcessor"
    with pytest.raises(ConfigError, match=r"generator\.overlap=true.*MinP.*generator\.overlap=false"):
        fit_processors([PROCESSOR, own], ahead=True)
    assert fit_processors([PROCESSOR, own], ahead=False) == [PROCESSOR, own]
    assert os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "0"
    assert fit_processors([PROCESSOR], ahead=False) == [PROCESSOR], "the user's word"


def test_vllm_takes_our_processor_for_its_runner_v2() -> None:
    from vllm.v1.worker.gpu.sample.logits_processor import build_custom_logits_processors_params_validator

    build_custom_logits_processors_params_validator([PROCESSOR_V2])
    with pytest.raises(ValueError, match="not a subclass"):
        build_custom_logits_processors_params_validator([PROCESSOR])


def test_an_engine_says_which_runner_serves_it() -> None:
    of = lambda second: SimpleNamespace(
        llm_engine=SimpleNamespace(vllm_config=SimpleNamespace(use_v2_model_runner=second))
    )
    assert [runner(of(second)) for second in (True, False)] == ["V2", "V1"]
