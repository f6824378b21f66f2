"""Which engine is asked, and what becomes of engines that die, of their replacements and of their weights."""

import asyncio
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayTaskError

from entroray.errors import InfrastructureError, SyncError
from entroray.workers import engine_pool
from entroray.workers.engine_pool import Engine, EnginePool, PrefixAffinity
from entroray.workers.generator import Generator
from entroray.workers.weight_sender import Delivery, WeightSender


def engines(*samples: int) -> list[Engine]:
    return [Engine(f"generator {i}", None, in_flight) for i, in_flight in enumerate(samples)]


def ask(affinity: PrefixAffinity, live: list[Engine], prompt: str, samples: int = 1) -> int:
    """The place of the engine asked, which has the samples in flight from then on."""
    engine = affinity.choose(prompt, live)
    engine.in_flight += samples
    return live.index(engine)


def test_a_wave_of_new_prompts_is_dealt_evenly() -> None:
    affinity, live = PrefixAffinity(), engines(0, 0)
    assert [ask(affinity, live, f"q{i}", 8) for i in range(6)] == [0, 1, 0, 1, 0, 1]


def test_later_turns_and_branches_go_where_their_prompt_was_read() -> None:
    affinity, live = PrefixAffinity(), engines(0, 0)
    first = [ask(affinity, live, f"q{i}", 4) for i in range(4)]
    for engine in live:
        engine.in_flight = 0
    later = [ask(affinity, live, f"q{i}") for i in (3, 3, 1, 0, 2, 1)]
    assert first == [0, 1, 0, 1] and later == [1, 1, 1, 0, 0, 1]


def test_an_engine_with_many_more_in_flight_gives_its_prompt_away_for_good() -> None:
    affinity, live = PrefixAffinity(slack=16), engines(0, 0)
    assert ask(affinity, live, "q", 16) == 0
    assert ask(affinity, live, "q") == 0, "16 more than the other"
    assert ask(affinity, live, "q") == 1, "17 more"
    live[0].in_flight = 0
    assert ask(affinity, live, "q") == 1, "which knows it from now on"


def test_an_engine_that_was_lost_is_no_home() -> None:
    affinity, live = PrefixAffinity(), engines(0, 5)
    assert ask(affinity, live, "q") == 0
    assert ask(affinity, live[1:], "q") == 0


def test_the_prompts_remembered_are_the_last_few() -> None:
    affinity, live = PrefixAffinity(capacity=2), engines(0, 0)
    for prompt in ("a", "b", "a", "c"):
        ask(affinity, live, prompt)
    assert list(affinity.engines) == ["a", "c"]


DEAD = InfrastructureError("its process died")


class Handle:
    """An actor whose methods answer, or raise what `failures` has for them."""

    def __init__(self, name: str, **failures: Exception):
        self.name, self.failures, self.asked = name, failures, list[str]()

    def __getattr__(self, method: str) -> Any:
        async def call(*_: Any) -> Any:
            self.asked.append(method)
            if method in self.failures:
                raise self.failures[method]

        return SimpleNamespace(remote=call)


class Gang:
    """A learner that sends to the engines of its client; `fails` gives what the n-th send raises, or None."""

    def __init__(self, fails: Callable[[int, list[str]], Exception | None] = lambda n, names: None):
        self.fails, self.client = fails, None
        self.sent: list[tuple[int | None, str]] = []

    async def all(self, method: Callable[[int, Any], Any], *, deadline: float) -> list[Any]:
        return [await method(0, self)]

    @property
    def connect(self) -> Any:
        async def connect(client: Any) -> None:
            self.client = client

        return SimpleNamespace(remote=connect)

    @property
    def sync(self) -> Any:
        async def sync(version: int | None) -> Delivery:
            names = [handle.name for handle in self.client.handles]  # type: ignore[attr-defined]
            self.sent.append((version, "".join(names)))
            if error := self.fails(len(self.sent), names):
                raise error
            return Delivery(version or 0, "x", ((version or 0, "x"),) * len(names))

        return SimpleNamespace(remote=sync)


@pytest.fixture
def make_pool(monkeypatch: pytest.MonkeyPatch) -> Callable[..., EnginePool]:
    async def settle(ref: Any, **_: Any) -> Any:
        return await ref

    monkeypatch.setattr(engine_pool, "settle", settle)
    monkeypatch.setattr(engine_pool.ray, "kill", lambda handle: None)

    def make(gang: Gang, *handles: Handle, spares: list[Handle] = [], transfer: str = "plasma") -> EnginePool:  # noqa: B006
        generator: Any = SimpleNamespace(tensor_parallel=1, keep_kv=False, transfer=transfer)
        sender, spawn = WeightSender(gang, generator, 1.0), iter(spares)  # type: ignore[arg-type]
        return EnginePool(
            handles,
            lambda: next(spawn),
            sender,
            restarts=len(spares),
            start_deadline=1.0,
            report=lambda kind, **fields: None,
        )

    return make


def names(pool: EnginePool) -> str:
    """Of the engines that serve, once replacements have come or failed."""
    return "".join(handle.name for handle in pool.handles)


async def replaced(pool: EnginePool) -> None:
    while pool.replacing:
        await asyncio.wait(pool.replacing, timeout=5.0)


@pytest.mark.parametrize("transfer", ["nccl", "ipc"])
def test_ranks_are_not_sent_into_a_collective_with_a_dead_engine(make_pool: Any, transfer: str) -> None:
    gang = Gang()
    pool = make_pool(gang, Handle("a"), Handle("b", check_weights=DEAD), transfer=transfer)
    asyncio.run(pool.update_weights(1))
    assert gang.sent == [(1, "a")] and names(pool) == "a"


def test_plasma_asks_no_engine_beforehand(make_pool: Any) -> None:
    gang, handles = Gang(), [Handle("a"), Handle("b")]
    asyncio.run(make_pool(gang, *handles).update_weights(1))
    assert gang.sent == [(1, "ab")] and not handles[0].asked


@pytest.mark.parametrize("failure", [DEAD, RayTaskError("sync", "NCCL", ValueError())])
def test_what_fails_within_nccl_ends_the_run_at_once(make_pool: Any, failure: Exception) -> None:
    gang = Gang(lambda n, names: failure)
    pool = make_pool(gang, Handle("a"), spares=[Handle("c")], transfer="nccl")
    with pytest.raises(InfrastructureError, match=r"(?s)transfer=nccl.*run\.resume=auto") as caught:
        asyncio.run(pool.update_weights(1))
    assert caught.value.exit_code == 4 and gang.sent == [(1, "a")]


def test_what_fails_within_plasma_is_tried_again_without_the_dead(make_pool: Any) -> None:
    gang = Gang(lambda n, names: DEAD if "b" in names else None)
    pool = make_pool(gang, Handle("a"), Handle("b", check_weights=DEAD))
    asyncio.run(pool.update_weights(1))
    assert gang.sent == [(1, "ab"), (1, "a")] and names(pool) == "a"


def test_a_learner_that_fails_alone_ends_the_run(make_pool: Any) -> None:
    pool = make_pool(Gang(lambda n, names: DEAD), Handle("a"), Handle("b"))
    with pytest.raises(InfrastructureError):
        asyncio.run(pool.update_weights(1))


@pytest.mark.parametrize("spare", [Handle("c", start=DEAD), Handle("c", check_weights=DEAD)])
def test_a_replacement_that_fails_is_replaced_while_restarts_last(make_pool: Any, spare: Handle) -> None:
    """It fails as it starts, or as it gets its first weights; the engines that are well go on."""
    gang = Gang(lambda n, names: DEAD if "c" in names else None)
    pool = make_pool(gang, Handle("a"), Handle("b"), spares=[spare, Handle("d")])

    async def run() -> None:
        pool.drop(pool.live[0], DEAD)
        await replaced(pool)

    asyncio.run(run())
    assert names(pool) == "bd" and pool.restarts == 0


def test_a_newcomer_that_dies_in_a_sync_does_not_end_it(make_pool: Any) -> None:
    gang = Gang(lambda n, names: DEAD if "c" in names else None)
    pool = make_pool(gang, Handle("a"))
    pool.newcomers = [Engine("c", Handle("c", check_weights=DEAD)), Engine("d", Handle("d"))]
    asyncio.run(pool.update_weights(2))
    assert gang.sent == [(2, "acd"), (2, "ad")] and names(pool) == "ad"


def test_without_engine_and_restarts_the_run_ends(make_pool: Any) -> None:
    pool = make_pool(Gang(), Handle("a"))

    async def run() -> None:
        pool.drop(pool.live[0], DEAD)
        await pool.update_weights(1)

    with pytest.raises(InfrastructureError, match=r"its process died.*generator\.restarts"):
        asyncio.run(run())


@pytest.mark.parametrize(
    "acknowledged", [((2, "y"), (2, "x")), ((1, "x"), (2, "x")), ((2, "x"),)], ids=["hash", "version", "one"]
)
def test_a_delivery_that_not_every_engine_took_is_refused(acknowledged: Any) -> None:
    Delivery(2, "x", ((2, "x"), (2, "x"))).verify(2)
    with pytest.raises(SyncError):
        Delivery(2, "x", acknowledged).verify(2)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_what_an_engine_has_not_read_as_its_thread_dies_is_answered() -> None:
    asked = threading.Event()

    class Dying(Generator):
        def _load(self) -> None:
            asked.wait(5.0)
            raise RuntimeError("no memory")

    async def ask() -> None:
        dying = Dying("m", dtype="float32", max_length=8, seed=0, engine={})
        waiting = asyncio.create_task(dying.prompt_logprobs([1, 2]))
        await asyncio.sleep(0)
        asked.set()
        with pytest.raises(InfrastructureError, match="no memory"):
            await asyncio.wait_for(waiting, 5.0)
        dying.thread.join(5.0)
        with pytest.raises(InfrastructureError, match="no memory"):
            await asyncio.wait_for(dying.prompt_logprobs([1, 2]), 5.0)

    asyncio.run(ask())
