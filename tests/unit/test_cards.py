"""What engines and ranks do on GPUs, as far as options and the order of calls show it without any."""

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ray.exceptions import RayTaskError

from entroray.errors import ConfigError, InfrastructureError, PreflightError
from entroray.policy.head import CARD_TILE_ELEMENTS, TILE_ELEMENTS, _tile_on
from entroray.wiring import actors
from entroray.workers import cluster
from entroray.workers.cluster import Share
from entroray.workers.generator import Generator
from entroray.workers.learner_rank import LearnerRank, deepspeed_config
from entroray.workers.sync import SyncProbe, WeightSync
from tests.composed import configured


class Calls(list[str]):
    """Writes down what is called on it, with what."""

    def __getattr__(self, name: str) -> Callable[..., str]:
        return lambda *_, **told: self.append(f"{name}{told or ''}") or name  # type: ignore[func-returns-value]


def test_logits_of_bf16_engines_are_those_the_learner_scores_with() -> None:
    assert "hf_overrides" not in actors.engine_options(configured())
    options = actors.engine_options(configured("model=bf16"))
    assert options["hf_overrides"] == {"head_dtype": "float32"}
    told = configured("model=bf16", "generator.engine={hf_overrides: {rope_theta: 1}}")
    assert actors.engine_options(told)["hf_overrides"] == {"head_dtype": "float32", "rope_theta": 1}
    own = configured("model=bf16", "generator.engine={hf_overrides: {head_dtype: model}}")
    assert actors.engine_options(own)["hf_overrides"] == {"head_dtype": "model"}


def test_threads_are_of_the_cores_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {3, 5, 7})
    threads = {role: share.threads for role, (_, share) in actors.resource_shares(configured()).items()}
    assert threads == {"generators": 3, "learner ranks": 3, "verifiers": 1}


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["cluster=one_gpu", "generator.replicas=2"],
            r"transfer=ipc puts one engine .* generator.replicas=2",
        ),
        (
            ["cluster=one_gpu", "generator.transfer=plasma", "learner.ranks=2"],
            r"sleep=true .* learner.ranks=2",
        ),
        (
            ["cluster=one_gpu", "generator.tensor_parallel=2"],
            r"generator.tensor_parallel=2: set all three to 1",
        ),
        (["generator.transfer=nccl"], r"nccl needs a whole GPU .* cluster.gpus_per_generator=0 "),
        (["cluster=gpu", "cluster.gpus_per_learner=0.5"], r"nccl needs a whole GPU"),
        (
            ["cluster.gpus_per_generator=0.5", "generator.tensor_parallel=2"],
            r"generator.tensor_parallel=2 needs whole GPUs, not cluster.gpus_per_generator=0.5",
        ),
    ],
)
def test_cards_that_cannot_be_held_so_are_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        configured(*overrides)


def test_cards_that_can_be_held_so_are_not() -> None:
    configured("cluster=one_gpu")
    configured("cluster=gpu", "generator.replicas=4", "generator.tensor_parallel=2", "learner.ranks=8")
    configured("generator.replicas=2", "generator.tensor_parallel=2", "learner.ranks=2")  # on CPU as ever


def test_an_actor_larger_than_every_node_is_refused_by_name() -> None:
    shares = {"generators": (1, Share(1, 4, 1)), "learner ranks": (2, Share(1, 1, 1))}
    nodes = [{"CPU": 8.0}, {"CPU": 8.0, "GPU": 2.0}, {"CPU": 8.0, "GPU": 4.0}]
    assert "6 of 6" in cluster.check_resources(shares, nodes)
    with pytest.raises(
        PreflightError,
        match=r"one actor of generators: 1 CPU, 4 GPU each\. There are .*generator\.tensor_parallel",
    ):
        cluster.check_resources(shares, [*nodes[:2], nodes[1], nodes[1]])
    with pytest.raises(PreflightError, match=r"too small: GPU: 1 generators x 4 \+ 2 .* = 6 of 4"):
        cluster.check_resources(shares, [nodes[2]])


def engine_alone(llm: Any) -> Generator:
    """A Generator whose engine never started."""
    alone = object.__new__(Generator)
    alone.llm, alone.engine, alone.staged, alone.asleep, alone.paused = llm, llm, None, False, False
    return alone


def test_an_engine_wakes_its_weights_before_an_update_and_its_keys_after_it() -> None:
    llm = Calls()
    alone = engine_alone(llm)
    alone.llm.get_weight_version = lambda: "3"
    alone._sleep()
    alone._open()
    alone._commit(3, keep_kv=False)
    assert llm == [
        "sleep{'level': 1}",
        "wake_up{'tags': ['weights']}",
        "start_weight_update",
        "finish_weight_update{'weight_version': '3'}",
        "wake_up{'tags': ['kv_cache']}",
        "reset_prefix_cache{'reset_running_requests': True}",
    ]
    assert not alone.asleep and not alone.paused
    del llm[:]
    alone._open()
    alone._commit(3, keep_kv=True)
    assert llm == ["start_weight_update", "finish_weight_update{'weight_version': '3'}"]


def rank_alone(device: str, *told: str) -> LearnerRank:
    """A rank in no gang."""
    config = configured(*told)
    alone = LearnerRank(0, actors.learner_settings(config, "/nowhere", 1), SimpleNamespace())  # type: ignore[arg-type]
    alone.device, alone.client = torch.device(device), SimpleNamespace()
    return alone


@pytest.mark.parametrize(
    ("device", "calls"), [("cpu", ["send"]), ("cuda", ["synchronize", "empty", "send", "empty"])]
)
def test_a_sync_waits_for_the_optimizer_and_leaves_the_card_room(
    monkeypatch: pytest.MonkeyPatch, device: str, calls: list[str]
) -> None:
    done: list[str] = []
    monkeypatch.setattr("torch.cuda.synchronize", lambda: done.append("synchronize"))
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: done.append("empty"))
    alone = rank_alone(device)
    alone.transfer = SimpleNamespace(send_weights=lambda: done.append("send"))
    alone.sync(1)
    assert done == calls


def test_a_rank_that_begins_anew_holds_nothing_of_what_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Any] = []
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: done.append("empty"))
    alone = rank_alone("cuda")
    alone.engine = SimpleNamespace(destroy=lambda: done.append("destroy"))
    alone.transfer = SimpleNamespace(shutdown=lambda: done.append("shutdown"))
    alone.reference = alone.engine
    held = lambda: done.append((alone.engine, alone.reference, alone.transfer))
    monkeypatch.setattr(alone, "_build", held)
    alone.reset(alone.settings, alone.objective)
    assert done == ["destroy", "shutdown", "empty", (None, None, None)]


def test_a_new_connection_closes_the_old_one(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    alone = rank_alone("cpu")
    alone.engine = SimpleNamespace(module=SimpleNamespace(model=None))
    monkeypatch.setattr(alone, "address", lambda: ("here", 1))
    opened = lambda *_, **__: SimpleNamespace(shutdown=lambda: done.append("shutdown"))
    stand_in = SimpleNamespace(connect=opened)  # the module itself imports vLLM
    monkeypatch.setattr("entroray.workers.transfer", stand_in, raising=False)
    alone.connect(SimpleNamespace())
    assert not done
    alone.connect(SimpleNamespace())
    assert done == ["shutdown"]


def test_gradients_of_bf16_weights_are_summed_in_fp32_where_deepspeed_can() -> None:
    def sums(*told: str) -> Any:
        settings = actors.learner_settings(configured(*told), "/nowhere", 1)
        return deepspeed_config(settings).get("data_types")

    wide = {"grad_accum_dtype": "fp32"}
    assert [sums("model=bf16", f"learner.zero_stage={n}") for n in range(4)] == [None, wide, wide, wide]
    assert [sums(f"learner.zero_stage={n}") for n in range(4)] == [None] * 4
    own = "learner.deepspeed={data_types: {grad_accum_dtype: bf16}}"
    assert sums("model=bf16", own) == {"grad_accum_dtype": "bf16"}


def test_tiles_are_larger_on_a_card() -> None:
    assert _tile_on(torch.device("cpu")) == TILE_ELEMENTS == 1 << 23
    assert _tile_on(torch.device("cuda", 0)) == CARD_TILE_ELEMENTS == 1 << 27


class Remote:
    """An actor's handle: `method.remote()` is a coroutine of what `answer` says to the method's name."""

    def __init__(self, answer: Callable[[str], Any]):
        self.answer = answer

    def __getattr__(self, name: str) -> Any:
        async def ask(*_: Any) -> Any:
            return self.answer(name)

        return SimpleNamespace(remote=ask)


class Ranks:
    """A gang of one."""

    def __init__(self, name: str, handles: list[Remote]):
        self.handles = handles

    async def all(self, method: Callable[..., Any], *, deadline: float) -> list[Any]:
        return [await method(i, h) for i, h in enumerate(self.handles)]


@pytest.mark.parametrize(
    ("cards", "order"),
    [
        ("one_gpu", ["engine", "engine up", "rank", "rank up"]),
        ("gpu", ["rank", "engine", "rank up", "engine up"]),
    ],
)
def test_a_rank_waits_for_the_engine_it_shares_a_card_with(
    monkeypatch: pytest.MonkeyPatch, cards: str, order: list[str]
) -> None:
    done: list[str] = []
    ready: set[str] = set()

    class Actor:
        def __init__(self, name: str):
            self.name = name
            self.address = SimpleNamespace(remote=lambda: None)
            self.start = SimpleNamespace(remote=self._start)

        async def _start(self, *_: Any) -> dict[str, Any]:
            if self.name not in ready:
                done.append(self.name)
                await asyncio.sleep(0)
                ready.add(self.name)
                done.append(f"{self.name} up")
            return {}

    async def there(*_: Any, **__: Any) -> tuple[str, int]:
        return "here", 1

    async def warm(*_: Any, **__: Any) -> list[Any]:
        return []

    monkeypatch.setattr(actors, "Gang", Ranks)
    monkeypatch.setattr(actors.cluster, "settle", there)

    async def served(version: int) -> dict[str, float]:
        return {}

    monkeypatch.setattr(actors, "_weight_sync", lambda *_: served)
    ranks, engines = Ranks("learner", [Actor("rank")]), SimpleNamespace(handles=[Actor("engine")])  # type: ignore[list-item]
    judges = SimpleNamespace(all=warm)
    config = configured(f"cluster={cards}")
    roles: dict[str, Any] = {"engines": engines, "learner": ranks, "verifiers": judges}
    asyncio.run(actors._introduce(config, **roles, probe=(1,), resume=None))
    assert done == order


class Fleet:
    """Engines by name, of which some do not answer."""

    def __init__(self, *dead: str):
        self.handles, self.dead, self.asked, self.mend = ["a", "b"], dead, 0, None

    def there(self) -> list[str]:
        return list(self.handles)

    async def all(self, method: Any, *, deadline: float, what: str) -> list[Any]:
        self.asked += 1
        self.handles = [h for h in self.handles if h not in self.dead]
        return []

    async def arrived(self) -> None:
        assert self.handles

    def admit(self, handles: list[str]) -> None:
        pass


def syncing(transfer: str, fleet: Fleet, failure: Exception | None = None) -> tuple[WeightSync, list[str]]:
    """A sync whose gang fails with `failure`, or serves every engine; and what the gang was asked."""
    asked: list[str] = []

    def answer(name: str) -> Any:
        asked.append(f"{name} {''.join(fleet.handles)}")
        if failure is not None and name == "sync":
            raise failure
        return "x", [(1, "x")] * len(fleet.handles)

    gang = Ranks("learner", [Remote(answer)])
    probe = SyncProbe((1,), 0, 1.0)
    sync = WeightSync(gang, fleet, lambda handles: None, probe=probe, deadline=1.0, transfer=transfer)  # type: ignore
    sync.compared = True
    return sync, asked


@pytest.mark.parametrize("transfer", ["nccl", "ipc"])
def test_ranks_are_not_sent_into_a_collective_with_a_dead_engine(transfer: str) -> None:
    sync, asked = syncing(transfer, Fleet("b"))
    asyncio.run(sync(1))
    assert asked == ["connect a", "sync a"]


def test_plasma_asks_nobody_beforehand() -> None:
    fleet = Fleet()
    sync, asked = syncing("plasma", fleet)
    asyncio.run(sync(1))
    assert asked == ["connect ab", "sync ab"] and fleet.asked == 0


@pytest.mark.parametrize(
    "failure",
    [InfrastructureError("learner rank 0: its process died"), RayTaskError("sync", "NCCL", ValueError())],
)
def test_what_fails_within_nccl_ends_the_run_at_once(failure: Exception) -> None:
    fleet = Fleet()
    sync, asked = syncing("nccl", fleet, failure)
    with pytest.raises(
        InfrastructureError, match=r"version 1 did not get through .*run\.resume=auto"
    ) as caught:
        asyncio.run(sync(1))
    assert caught.value.exit_code == 4 and asked == ["connect ab", "sync ab"]
    assert fleet.asked == 1, "before it, and never again"


def test_what_fails_within_plasma_is_tried_again_without_the_dead() -> None:
    fleet = Fleet("b")
    sync, asked = syncing("plasma", fleet)

    async def lost_once(version: int) -> None:
        gang = sync.learner
        first = SimpleNamespace(handles=gang.handles, all=_fails)
        sync.learner = first  # type: ignore[assignment]
        served = await sync._served(version)
        sync.learner = gang
        assert not served
        await sync(version)

    async def _fails(*_: Any, **__: Any) -> None:
        raise InfrastructureError("an engine died")

    asyncio.run(lost_once(1))
    assert asked == ["connect a", "sync a"] and fleet.asked == 1
