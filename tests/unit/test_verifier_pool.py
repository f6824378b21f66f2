"""What becomes of verdicts whose verifier dies, and of verifiers that cannot start."""

import asyncio
import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from entroray.errors import ConfigError, InfrastructureError
from entroray.workers import verifier_pool
from entroray.workers.verifier_pool import LOSSES, VerifierPool

DEAD = InfrastructureError("its process died")


class Judge:
    """A verifier actor that judges by its own name; it dies as it warms up, or over the items of `deadly`."""

    def __init__(self, name: str, deadly: str = "", warm_up: Exception | None = None):
        self.name, self.deadly, self.unwell = name, deadly, warm_up
        self.asked: list[str] = []
        self.dead = asyncio.Event()

    @property
    def warm_up(self) -> Any:
        async def warm_up() -> None:
            if self.unwell:
                raise self.unwell

        return SimpleNamespace(remote=warm_up)

    @property
    def judge(self) -> Any:
        async def judge(item: str) -> str:
            self.asked.append(item)
            if item in self.deadly:
                self.dead.set()
            await asyncio.sleep(0)
            if self.dead.is_set():
                raise DEAD
            return self.name

        return SimpleNamespace(remote=judge)


Events = list[tuple[str, str]]


@pytest.fixture
def make_pool(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[VerifierPool, Events]]:
    async def settle(ref: Any, **_: Any) -> Any:
        return await ref

    monkeypatch.setattr(verifier_pool, "settle", settle)
    monkeypatch.setattr(verifier_pool, "kill_actors", lambda handles: None)

    def make(*judges: Judge, spares: Any = ()) -> tuple[VerifierPool, Events]:
        waiting, events = itertools.chain(judges, spares), Events()
        report = lambda kind, **fields: events.append((kind, fields["verifier"]))
        return VerifierPool(len(judges), lambda: next(waiting), start_deadline=1.0, report=report), events

    return make


async def verdicts(pool: VerifierPool, items: str) -> list[str]:
    """Who judged each item, all asked at once."""
    call = lambda item: pool.call(lambda h: h.judge.remote(item), deadline=1.0)
    return list(await asyncio.wait_for(asyncio.gather(*map(call, items)), 5.0))


def run(pool: VerifierPool, *waves: str) -> list[list[str]]:
    """Who judged each wave, and then every start is awaited."""

    async def started() -> list[list[str]]:
        await pool.start()
        found = [await verdicts(pool, items) for items in waves]
        await asyncio.gather(*pool.joining)
        return found

    return asyncio.run(started())


def test_items_of_a_dead_verifier_are_judged_by_another_and_each_has_one_verdict(make_pool: Any) -> None:
    a, b, c = Judge("a", deadly="3"), Judge("b"), Judge("c")
    pool, events = make_pool(a, b, spares=[c])
    (found,) = run(pool, "12345678")
    assert len(found) == 8 and "a" not in found
    assert sorted(a.asked) == ["1", "3", "5", "7"] and sorted(b.asked + c.asked) == list("12345678")
    assert events == [("verifier_lost", "verifier 0"), ("verifier_joined", "verifier 2")], "lost once"
    assert [m.busy for m in pool.members] == [0, 0] and pool.handles == [b, c]


def test_where_none_is_left_a_call_waits_for_the_replacement(make_pool: Any) -> None:
    pool, events = make_pool(Judge("a", deadly="1"), spares=[Judge("b")])
    assert run(pool, "12", "3") == [["b", "b"], ["b"]]
    assert events == [("verifier_lost", "verifier 0"), ("verifier_joined", "verifier 1")]


def test_a_replacement_that_cannot_start_is_replaced_in_its_turn(make_pool: Any) -> None:
    spares = [Judge("b", warm_up=DEAD), Judge("c")]
    pool, events = make_pool(Judge("a", deadly="1"), spares=spares)
    assert run(pool, "1") == [["c"]]
    assert [name for kind, name in events if kind == "verifier_lost"] == ["verifier 0", "verifier 1"]


@pytest.mark.parametrize("spare", [{"deadly": "1"}, {"warm_up": DEAD}, {"warm_up": ConfigError("edited")}])
def test_verifiers_that_all_die_end_the_run_after_a_few(make_pool: Any, spare: dict[str, Any]) -> None:
    made: list[Judge] = []

    def spares() -> Any:
        while True:
            made.append(Judge("s", **spare))
            yield made[-1]

    pool, events = make_pool(Judge("a", deadly="1"), spares=())
    endless = spares()
    pool.spawn = lambda: next(endless)
    with pytest.raises(InfrastructureError, match=r"verifier\.slots .*verifier\.memory_mb"):
        run(pool, "1")
    assert len(made) == LOSSES - 1 and len(events) >= LOSSES


def test_an_item_that_kills_whoever_judges_it_ends_the_run_however_well_the_others_fare(
    make_pool: Any,
) -> None:
    class Poisoned(Judge):
        """It dies of x when it has judged everything else that it was asked."""

        @property
        def judge(self) -> Any:
            async def judge(item: str) -> str:
                for _ in range(20 if item == "x" else 1):
                    await asyncio.sleep(0)
                if item == "x":
                    raise DEAD
                return self.name

            return SimpleNamespace(remote=judge)

    pool, _ = make_pool(*(Poisoned(f"p{i}") for i in range(2)), spares=itertools.repeat(Poisoned("spare")))

    async def both() -> None:
        await pool.start()
        dying = asyncio.create_task(verdicts(pool, "x"))
        for _ in range(1000):
            if not dying.done():
                await verdicts(pool, "1")
        assert dying.done()
        await dying

    with pytest.raises(InfrastructureError, match=r"verifier\.slots"):
        asyncio.run(both())


def test_losses_count_only_while_no_call_is_answered(make_pool: Any) -> None:
    items = "abcdefghij"
    spares = [Judge(f"s{i}", deadly=item) for i, item in enumerate(items[1:])]
    pool, events = make_pool(Judge("first", deadly="a"), spares=[*spares, Judge("last")])
    for found in run(pool, *items):
        assert len(found) == 1
    assert len([e for e in events if e[0] == "verifier_lost"]) == len(items) > LOSSES


def test_one_verifier_that_fails_to_start_is_replaced_while_the_others_judge(make_pool: Any) -> None:
    pool, events = make_pool(Judge("a", warm_up=DEAD), Judge("b"), spares=[Judge("c")])
    assert run(pool, "1") == [["b"]]
    assert events == [("verifier_lost", "verifier 0"), ("verifier_joined", "verifier 2")]


@pytest.mark.parametrize(
    ("first", "second", "error"),
    [(DEAD, DEAD, InfrastructureError), (None, ConfigError("no such judge"), ConfigError)],
    ids=["none came", "a setting is wrong"],
)
def test_where_no_verifier_starts_or_the_judge_is_wrong_the_error_is_its_own(
    make_pool: Any, first: Any, second: Any, error: type[Exception]
) -> None:
    pool, events = make_pool(Judge("a", warm_up=first), Judge("b", warm_up=second), spares=[Judge("c")])
    with pytest.raises(error):
        run(pool)
    assert events == []


def test_an_error_that_is_the_items_own_is_told_and_costs_no_verifier(make_pool: Any) -> None:
    a = Judge("a")
    pool, events = make_pool(a)

    async def refuse() -> str:
        raise ConfigError("reward.judge")

    async def call() -> None:
        await pool.start()
        with pytest.raises(ConfigError, match=r"reward\.judge"):
            await pool.call(lambda h: refuse(), deadline=1.0)

    asyncio.run(call())
    assert events == [] and pool.handles == [a] and pool.members[0].busy == 0


def test_a_call_that_is_given_up_leaves_its_verifier_as_idle_as_before(make_pool: Any) -> None:
    pool, _ = make_pool(Judge("a"), Judge("b"))

    async def give_up() -> list[int]:
        await pool.start()
        call = asyncio.create_task(pool.call(lambda h: asyncio.sleep(9.0), deadline=10.0))
        await asyncio.sleep(0)
        busy = sum(m.busy for m in pool.members)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        return [busy, *(m.busy for m in pool.members)]

    assert asyncio.run(give_up()) == [1, 0, 0]
