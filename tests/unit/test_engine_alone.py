"""One engine and its weights, on stand-ins for vLLM: updates cut short, sleep, caches, and how it starts."""

import asyncio
import queue
import sys
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from entroray.engine import generator, starting
from entroray.engine.generator import Generator
from entroray.engine.overlap import RestlessError
from entroray.engine.starting import OWN_WEIGHTS
from entroray.engine.vllm_request import Request
from entroray.engine.waiting import Waiting
from entroray.errors import ConfigError, InfrastructureError
from entroray.types import Draw, Status
from entroray.wiring import actors
from tests.composed import configured


class Model:
    """vLLM without steps ahead: what it holds, what it was asked, and its own rules of an update."""

    def __init__(self) -> None:
        self.on_card, self.version, self.cached, self.updating = {"weights", "kv_cache"}, "2", True, False
        self.asked: list[str] = []
        self.error: InfrastructureError | None = None
        self.model = nn.Linear(2, 2)
        core = SimpleNamespace(batch_queue=None)
        self.llm_engine = SimpleNamespace(engine_core=SimpleNamespace(engine_core=core))

    def sleep(self, level: int) -> None:
        self.asked.append(f"sleep {level}")
        self.on_card.clear()

    def wake_up(self, tags: list[str]) -> None:
        self.on_card |= set(tags)

    def collective_rpc(self, method: Any) -> list[Any]:
        assert "weights" in self.on_card
        transfer = SimpleNamespace(error=self.error)
        return [method(SimpleNamespace(get_model=lambda: self.model, weight_transfer_engine=transfer))]

    def shutdown_weight_transfer_engine(self) -> None:
        assert not self.updating, "Cannot release a trainer connection during a weight update"
        self.asked.append("leave")

    def init_weight_transfer_engine(self, request: dict[str, Any]) -> None:
        self.asked.append(f"meet {request['init_info']}")
        self.error = None

    def start_weight_update(self) -> None:
        assert "weights" in self.on_card and not self.updating, "already active"
        self.asked.append("start")
        self.updating = True

    def update_weights(self, request: dict[str, Any]) -> None:
        assert self.updating
        if request["update_info"].get("fails"):
            self.error = InfrastructureError("NCCL was left")

    def finish_weight_update(self, weight_version: str = "2") -> None:
        assert self.updating, "without a matching start_weight_update"
        self.asked.append("finish")
        self.version, self.updating = weight_version, False

    def get_weight_version(self) -> str:
        return self.version

    def reset_prefix_cache(self, reset_running_requests: bool) -> None:
        self.cached = False


@pytest.fixture
def engine() -> Any:
    alone: Any = object.__new__(Generator)
    alone.llm = alone.engine = Model()
    alone.options, alone.salt, alone.staged = {}, 0, None
    alone.asleep, alone.paused, alone.updating = 0, False, False
    alone.threads = SimpleNamespace(most=2, take=lambda number: None)
    return alone


@pytest.mark.parametrize("asleep", [True, False])
def test_a_sleeping_engine_has_no_keys_and_values_on_the_card_until_its_weights_are_in(
    engine: Any, asleep: bool
) -> None:
    if asleep:
        engine._sleep()
    engine._open()
    assert engine.paused and ("kv_cache" in engine.llm.on_card) is not asleep
    assert engine._commit(3, keep_kv=not asleep) == (3, None)
    assert engine.llm.on_card == {"weights", "kv_cache"} and engine.llm.cached is not asleep
    assert not engine.asleep and not engine.paused


@pytest.mark.parametrize("own", [None, *OWN_WEIGHTS])
def test_an_engine_asleep_keeps_only_weights_that_no_sync_brings(engine: Any, own: str | None) -> None:
    """Level 1 copies all of them to the host and back, level 2 drops what the next sync brings."""
    engine.options = {own: True} if own else {}
    engine._sleep()
    engine._sleep()
    assert engine.llm.asked == ["sleep 1" if own else "sleep 2"]
    engine._open()
    assert engine.llm.model.weight.isnan().all().item() is not bool(own), "not what lies there by chance"


def test_an_engine_leaves_the_last_group_before_it_meets_the_learner_anew(engine: Any) -> None:
    engine._connect({"rank_offset": 1})
    assert engine.llm.asked == ["leave", "meet {'rank_offset': 1}"]


@pytest.mark.parametrize("fails", [True, False])
def test_an_update_that_was_cut_short_is_closed_before_the_next_and_nobody_draws_between(
    engine: Any, fails: bool
) -> None:
    """It stays open in vLLM, also where it failed, with some layers half loaded."""
    engine._open()
    if fails:
        with pytest.raises(InfrastructureError, match="NCCL was left"):
            engine._load_staged({"fails": True})
    engine._connect({})
    assert engine.paused and not engine.llm.updating
    assert engine.llm.asked == ["start", "finish", "leave", "meet {}"]
    engine._open()
    engine._load_staged({})
    assert engine._commit(5, keep_kv=False) == (5, None) and not engine.paused and not engine.llm.updating


def test_an_engine_with_a_step_that_cannot_be_read_ends_for_it_would_schedule_nothing_more(
    engine: Any,
) -> None:
    def step() -> list[Any]:
        raise RuntimeError("CUDA error")

    engine.llm.llm_engine.engine_core.engine_core.batch_queue = ["a step"]
    engine.llm.sleep, engine.llm.llm_engine.step = lambda **_: None, step
    engine.llm.has_unfinished_requests = lambda: False
    engine.inbox, engine.waiting, engine.failure, engine.ready = queue.SimpleQueue(), {}, None, Future()
    asked: list[Future[None]] = [Future(), Future()]
    answer = lambda future: future.set_result(None)
    engine._load = lambda: [
        *map(engine.inbox.put, [(lambda _: engine._open(), asked[0]), (answer, asked[1])])
    ]
    with pytest.raises(RestlessError, match="CUDA error"):
        engine._serve()
    assert all(future.done() for future in asked) and isinstance(engine.failure, InfrastructureError)
    with pytest.raises(RestlessError, match="came to rest"):
        asked[0].result(timeout=0)


@pytest.mark.parametrize("paused", [False, True])
def test_an_engine_gives_up_every_sample_under_way_also_where_an_update_left_it_paused(
    engine: Any, monkeypatch: pytest.MonkeyPatch, paused: bool
) -> None:
    aborted: list[str] = []
    monkeypatch.setattr(generator, "partial_completion", lambda engine, name: None)
    engine.engine = SimpleNamespace(abort_request=aborted.extend)
    engine.paused, engine.masks, engine.read, engine.failure = paused, False, str, None
    request = Request("q", (1, 2), (5, 6), Draw(1.0, 4), 1.0)
    engine.waiting = {n: Waiting(request, Future(), 0.0, {f"{n}-0", f"{n}-1"}) for n in ("1", "2")}
    engine.owner = {f"{n}-{i}": n for n in ("1", "2") for i in (0, 1)}
    waiting, engine.inbox = [*engine.waiting.values()], queue.SimpleQueue()

    async def give_up() -> None:
        asked = asyncio.ensure_future(engine.abort())
        await asyncio.sleep(0)
        action, future = engine.inbox.get_nowait()
        action(future)
        await asked

    asyncio.run(give_up())
    assert aborted == ["1-0", "1-1", "2-0", "2-1"] and not engine.waiting and not engine.owner
    given = [rollout.status for each in waiting for rollout in each.future.result(timeout=0)]
    assert given == [Status.ABANDONED] * 4


def test_prompts_after_a_sync_find_nothing_that_older_weights_cached(engine: Any) -> None:
    """Where keys and values are kept, it is for samples under way; one read by both is neither's."""
    request = Request("q", (1, 2), (0,), Draw(1.0, 4), 1.0)
    salts = [engine._prompt(request).get("cache_salt")]
    for keep in (True, True):
        engine._open()
        salts.append(engine._prompt(request)["cache_salt"])
        engine._commit(3, keep_kv=keep)
        assert engine._prompt(request)["cache_salt"] == salts[-1], "read by the weights that came"
    assert salts == [None, "1", "2"] and engine.llm.cached
    engine._open()
    engine._commit(4, keep_kv=False)
    assert not engine.llm.cached


def test_without_kept_keys_and_values_prompts_are_as_they_were(engine: Any) -> None:
    engine._open()
    engine._commit(3, keep_kv=False)
    request = Request("q", (1, 2), (0,), Draw(1.0, 4), 1.0, after=(3,))
    assert engine._prompt(request) == {"prompt_token_ids": [1, 2, 3]}


def test_keys_and_values_are_kept_by_default_with_a_lag_on_gpus_alone() -> None:
    def kept(*told: str) -> bool | None:
        return actors.sender_settings(configured(*told)).keep_kv

    assert kept("cluster=gpu", "driver.max_lag=1") is True
    assert kept("cluster=gpu", "driver.max_lag=0") is kept("driver.max_lag=4") is False
    assert kept("cluster=gpu", "driver.max_lag=1", "generator.keep_kv=false") is False
    assert kept("driver.max_lag=0", "generator.keep_kv=true") is True


def test_steps_are_scheduled_ahead_where_told_and_never_on_a_cpu() -> None:
    assert "async_scheduling" not in actors.engine_options(configured("cluster=gpu"))
    ahead = configured("cluster=gpu", "generator.overlap=true")
    assert actors.engine_options(ahead)["async_scheduling"] is True
    with pytest.raises(ConfigError, match=r"generator\.overlap=true.*gpus_per_generator=0.*overlap=false"):
        configured("generator.overlap=true")
    with pytest.raises(ConfigError, match=r"async_scheduling=True: .*generator\.overlap"):
        configured("cluster=gpu", "+generator.engine.async_scheduling=true")


TAKEN = "Free memory on device cuda:0 (3.0/79.0 GiB) on startup is less than desired"
PROCESSES = "WorkerProc initialization failed due to an exception in a background process."


@pytest.mark.parametrize(
    ("errors", "tries"),
    [
        ([], 1),
        ([ValueError(TAKEN)], 2),
        ([ValueError(TAKEN), ValueError(TAKEN)], 2),
        ([Exception(PROCESSES)], 1),
        ([ValueError("no such model")], 1),
    ],
)
def test_an_engine_whose_card_is_still_taken_starts_once_more_after_a_while(
    monkeypatch: pytest.MonkeyPatch, errors: list[Exception], tries: int
) -> None:
    waited: list[float] = []
    clean = lambda: waited.append(0.0)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "vllm.distributed", SimpleNamespace(cleanup_dist_env_and_memory=clean))
    monkeypatch.setattr(starting.time, "sleep", waited.append)
    left, tried = iter(errors), []

    def start() -> str:
        tried.append(1)
        if error := next(left, None):
            raise error
        return "engine"

    if len(errors) == tries:
        with pytest.raises(type(errors[-1]), match=str(errors[-1])[:12]):
            starting.try_twice(start)
    else:
        assert starting.try_twice(start) == "engine"
    assert len(tried) == tries and waited == [0.0, 20.0] * (tries - 1)
