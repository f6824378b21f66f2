"""What becomes of engines that die or do not start, of their requests, replacements and weights."""

import asyncio
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from entroray.config import DriverConfig
from entroray.engine.generator import Generator
from entroray.engine.vllm_request import Request
from entroray.errors import ConfigError, InfrastructureError, LearnerLostError, SyncError
from entroray.types import Draw
from entroray.workers import engine_pool
from entroray.workers.engine_pool import Engine, EnginePool
from entroray.workers.sync import WeightSync
from entroray.workers.weight_sender import Delivery, WeightSender

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
    monkeypatch.setattr(engine_pool, "settle_next", lambda stream, **_: anext(stream))
    monkeypatch.setattr(engine_pool, "kill_actors", lambda handles: None)

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
    pool = make_pool(gang, Handle("a"), Handle("b", check_alive=DEAD), transfer=transfer)
    asyncio.run(pool.update_weights(1))
    assert gang.sent == [(1, "a")] and names(pool) == "a"


def test_plasma_asks_no_engine_beforehand(make_pool: Any) -> None:
    gang, handles = Gang(), [Handle("a"), Handle("b")]
    asyncio.run(make_pool(gang, *handles).update_weights(1))
    assert gang.sent == [(1, "ab")] and not handles[0].asked


def test_what_fails_within_plasma_is_tried_again_without_the_dead(make_pool: Any) -> None:
    gang = Gang(lambda n, names: DEAD if "b" in names else None)
    pool = make_pool(gang, Handle("a"), Handle("b", check_alive=DEAD))
    asyncio.run(pool.update_weights(1))
    assert gang.sent == [(1, "ab"), (1, "a")] and names(pool) == "a"


def test_a_learner_that_fails_alone_ends_the_run(make_pool: Any) -> None:
    pool = make_pool(Gang(lambda n, names: DEAD), Handle("a"), Handle("b"))
    with pytest.raises(InfrastructureError):
        asyncio.run(pool.update_weights(1))


@pytest.mark.parametrize("spare", [Handle("c", start=DEAD), Handle("c", check_alive=DEAD)])
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
    pool.newcomers = [Engine("c", Handle("c", check_alive=DEAD)), Engine("d", Handle("d"))]
    asyncio.run(pool.update_weights(2))
    assert gang.sent == [(2, "acd"), (2, "ad")] and names(pool) == "ad"


def test_a_newcomer_that_dies_in_its_own_first_sync_leaves_no_engine_paused(make_pool: Any) -> None:
    """Its death cuts an update short: the engine that serves is sent the weights once more, alone."""
    gang = Gang(lambda n, names: DEAD if "c" in names else None)
    pool = make_pool(gang, Handle("a"), Handle("b"), spares=[Handle("c", check_alive=DEAD)])

    async def run() -> None:
        pool.drop(pool.live[1], DEAD)
        await replaced(pool)

    asyncio.run(run())
    assert gang.sent == [(None, "ac"), (None, "a")] and names(pool) == "a"


def test_the_last_replacement_that_dies_in_its_first_sync_ends_the_wait_for_it(make_pool: Any) -> None:
    gang = Gang(lambda n, names: DEAD)
    pool = make_pool(gang, Handle("a"), spares=[Handle("c", check_alive=DEAD)])

    async def run() -> None:
        pool.drop(pool.live[0], DEAD)
        await asyncio.wait_for(pool.wait_for_engine(), 5.0)

    with pytest.raises(InfrastructureError, match=r"its process died.*generator\.restarts"):
        asyncio.run(run())


def test_an_engine_that_fails_to_start_is_replaced_and_the_first_weights_go_to_all(make_pool: Any) -> None:
    gang = Gang()
    pool = make_pool(gang, Handle("a"), Handle("b", start=DEAD), spares=[Handle("c")])

    async def run() -> str:
        await pool.start()
        others = names(pool)
        await replaced(pool)
        assert not gang.sent, "the ranks may not have met yet"
        await pool.update_weights(0)
        return others

    assert asyncio.run(run()) == "a" and gang.sent == [(0, "ac")] and names(pool) == "ac"


def test_a_replacement_that_starts_after_the_first_weights_were_sent_is_sent_them_too(make_pool: Any) -> None:
    gang, started = Gang(), asyncio.Event()

    class Late(Handle):
        @property
        def start(self) -> Any:
            return SimpleNamespace(remote=started.wait)

    pool = make_pool(gang, Handle("a"), Handle("b", start=DEAD), spares=[Late("c")])

    async def run() -> None:
        await pool.start()
        await pool.update_weights(0)
        started.set()
        await replaced(pool)

    asyncio.run(run())
    assert gang.sent == [(0, "a"), (None, "ac")] and names(pool) == "ac"


@pytest.mark.parametrize(
    ("first", "second", "error"),
    [(DEAD, DEAD, InfrastructureError), (None, ConfigError("wrong"), ConfigError)],
    ids=["none came", "a setting is wrong"],
)
def test_where_no_engine_starts_or_a_setting_is_wrong_nothing_is_tried_again(
    make_pool: Any, first: Any, second: Any, error: type[Exception]
) -> None:
    handles = [Handle(n, **({"start": e} if e else {})) for n, e in (("a", first), ("b", second))]
    pool = make_pool(Gang(), *handles, spares=[Handle("c")])
    with pytest.raises(error):
        asyncio.run(pool.start())
    assert pool.restarts == 1 and not pool.replacing


def test_a_pool_that_is_closed_kills_the_engines_that_were_still_starting(
    make_pool: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed: list[str] = []
    monkeypatch.setattr(engine_pool, "kill_actors", lambda handles: killed.extend(h.name for h in handles))

    class Endless(Handle):
        @property
        def start(self) -> Any:
            return SimpleNamespace(remote=asyncio.Event().wait)

    pool = make_pool(Gang(), Handle("a"), spares=[Endless("c")])

    async def run() -> None:
        pool.drop(pool.live[0], DEAD)
        await asyncio.sleep(0)
        await pool.close()

    asyncio.run(run())
    assert killed == ["a", "c"]


class Sampling(Handle):
    """An engine that answers each request with its own name, or raises `error` over all of them."""

    def __init__(self, name: str, error: Exception | None = None):
        super().__init__(name)
        self.error = error

    @property
    def sample_all(self) -> Any:
        async def stream(requests: list[Request]) -> Any:
            for index, _ in enumerate(requests):
                if self.error:
                    raise self.error
                yield {index: [self.name]}

        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=stream))


def wanted(prompt: str) -> Request:
    return Request(prompt, (1,), (0, 1), Draw(1.0, 4), deadline=1.0)


@pytest.mark.parametrize("error", [ValueError("no such token"), ConfigError("wrong"), KeyError(7)], ids=repr)
def test_a_refused_request_is_answered_with_why_and_counts_no_longer(make_pool: Any, error: Any) -> None:
    pool = make_pool(Gang(), Sampling("a", error))

    async def run() -> None:
        with pytest.raises(type(error)):
            await asyncio.wait_for(pool.sample(wanted("q")), 5.0)

    asyncio.run(run())
    assert names(pool) == "a" and pool.live[0].in_flight == 0


def test_what_a_dead_engine_was_asked_is_answered_by_another_and_counted_once(make_pool: Any) -> None:
    pool = make_pool(Gang(), Sampling("a", DEAD), Sampling("b"))

    async def run() -> list[Any]:
        return list(await asyncio.gather(*(pool.sample(wanted(f"q{i}")) for i in range(4))))

    assert asyncio.run(run()) == [["b"]] * 4
    assert names(pool) == "b" and pool.live[0].in_flight == 0


def test_an_engine_that_is_given_up_for_its_silence_names_the_setting_for_slow_ones(make_pool: Any) -> None:
    silent = InfrastructureError("generator 0 gave no answer within 31 s")
    silent.__cause__ = TimeoutError()
    for error, named in ((silent, True), (DEAD, False)):
        pool = make_pool(Gang(), Sampling("a", error))
        with pytest.raises(InfrastructureError) as ended:
            asyncio.run(asyncio.wait_for(pool.sample(wanted("q")), 5.0))
        assert ("raise rollout.deadline" in str(ended.value)) is named


class Scoring(Handle):
    """An engine or a learner that scores the probe."""

    @property
    def prompt_logprobs(self) -> Any:
        async def scored(ids: tuple[int, ...]) -> list[float]:
            return [-1.0, -2.0]

        return SimpleNamespace(remote=scored)


def test_a_comparison_that_loses_every_engine_is_made_with_the_next_and_never_reported_as_equal(
    make_pool: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = make_pool(Gang(), Handle("a", prompt_logprobs=DEAD), spares=[Scoring("c")])
    asked = pool.live[0].handle.asked
    learner: Any = SimpleNamespace(all=lambda method, deadline: asyncio.gather(method(0, Scoring("learner"))))
    sync = WeightSync(learner, pool, (1, 2, 3), DriverConfig(), 5.0)

    async def run() -> float:
        return await asyncio.wait_for(sync.compare(), 5.0)

    assert asyncio.run(run()) == 0.0 and asked == ["prompt_logprobs"] and names(pool) == "c"
    pool = make_pool(Gang(), Handle("a", prompt_logprobs=DEAD))
    sync = WeightSync(learner, pool, (1, 2, 3), DriverConfig(), 5.0)
    with pytest.raises(InfrastructureError, match=r"generator\.restarts"):
        asyncio.run(run())


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


def test_engines_outlive_their_learner_and_take_the_weights_of_its_next_attempt(make_pool) -> None:
    gang = Gang(lambda n, names: LearnerLostError("learner rank 0: its process died") if n == 2 else None)
    pool = make_pool(gang, Handle("a"), Handle("b"))

    async def run() -> None:
        await pool.update_weights(7)
        with pytest.raises(LearnerLostError):
            await pool.update_weights(8)
        assert names(pool) == "ab" and pool.learner_lost
        await pool.begin_anew(1.0)
        assert await pool._send_weights(None), "newcomers wait for the first weights of the attempt"
        await pool.update_weights(7)

    asyncio.run(run())
    assert gang.sent == [(7, "ab"), (8, "ab"), (1_000_000_007, "ab")] and not pool.learner_lost
