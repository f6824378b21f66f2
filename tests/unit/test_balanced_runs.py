"""Runs of the toy world whose samples fail, which are stopped, resumed and made to miscount."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from entroray.data.curriculum import Curriculum, Rule
from entroray.data.prompts import PromptStream
from entroray.errors import LedgerError
from entroray.metrics.catalogue import family_metrics
from entroray.objective import build_objective
from entroray.rollout.ledger import UNITS
from entroray.rollout.replay import Replay
from entroray.rollout.second_draw import SecondDraw
from entroray.rollout.selection import Selection
from entroray.rows import objective_row
from entroray.train.driver import Driver
from entroray.types import Prompt, Rollout, Status, Verdict
from entroray.wiring.driver import train_balanced
from tests.documented import matches
from tests.toy import TARGET, ToyPrompts, ToyWorld, driver, trained


def a_world(seed: int) -> ToyWorld:
    """Samples fail in one of two ways; a third of its prompts has no right answer, a third few of them."""
    world = ToyWorld(build_objective({**objective_row("grpo"), "keep": {"fn": "informative"}}))
    sampled = world.sample

    async def some_fail(prompt: Prompt, seeds: list[int], *given: Any) -> list[Rollout]:
        fate = lambda number: Status.INFRA_FAILED if number % 9 == 0 else Status.OK
        pairs = zip(await sampled(prompt, seeds, *given), seeds, strict=True)
        return [replace(drawn, status=fate(number), text=str(number)) for drawn, number in pairs]

    async def judge(prompt: Prompt, rollouts: list[Rollout]) -> list[Verdict]:
        kind = int(prompt.id.lstrip("q")) % 3
        late = Verdict(0.0, False, status=Status.TIMEOUT, detail="of 8 s")
        right = [float(kind > 0 and int(r.text) % (2, 5)[kind == 1] == 0) for r in rollouts]
        return [
            late if (i + seed) % 7 == 0 and kind == 2 else Verdict(x, bool(x)) for i, x in enumerate(right)
        ]

    world.sample, world.judge = some_fail, judge  # type: ignore[method-assign, assignment]
    return world


def totals(metrics: dict[str, float]) -> None:
    """What a reader of metrics.jsonl can add up."""
    m = metrics
    ended = ("trained", "dropped", "refused", "surplus", "rolled_back", "pending")
    assert m["groups/issued"] == sum(m[f"groups/{end}"] for end in ended)
    assert m["tokens/issued"] == sum(m[f"tokens/{end}"] for end in ("drawn", "rolled_back", "pending"))
    assert m["tokens/drawn"] >= m["tokens/trained"] > 0 and m["samples/issued"] > m["samples/trained"]


@settings(max_examples=4, deadline=None)
@example(seed=0, max_lag=0, wait=True, second="", replays=True, retire=False)  # one is trained on, one is not
@given(
    seed=st.integers(0, 99),
    max_lag=st.integers(0, 2),
    wait=st.booleans(),
    second=st.sampled_from(["", "at_once", "next_time"]),
    replays=st.booleans(),
    retire=st.booleans(),
)
def test_every_run_balances_after_each_step_and_after_a_resume(
    seed: int, max_lag: int, wait: bool, second: str, replays: bool, retire: bool
) -> None:
    def made() -> tuple[Driver, ToyWorld]:
        world, replay = a_world(seed), Replay(40) if replays else None
        again = SecondDraw(1.2 if second else 1.0, second or "at_once", replay)
        prompts = PromptStream([Prompt(f"{i:02d}", "", (0,), str(TARGET)) for i in range(13)], seed=1)
        chosen: Any = Curriculum(prompts, 13, Rule(visits=1, low=0.1, outside=0.3), seed=1)
        observers = {"replay": replay, "curriculum": chosen} if replay else {"curriculum": chosen}
        d = driver(
            world,
            prompts=chosen if retire else prompts,
            selection=Selection(observers, again, [chosen.metrics]),  # type: ignore[arg-type]
            **{"groups_per_step": 3, "refill_limit": 99, "max_lag": max_lag, "wait": wait, "resamples": 3},
        )
        return d, world

    (whole, world), (rest, resumed) = made(), made()
    states = trained(whole, 6)
    resumed.version = 2
    trained(rest, 6, states[2])
    for steps in (world.steps, resumed.steps):
        for metrics in steps:
            totals(metrics)
            told = {name for name in metrics if name.startswith(("groups/", "samples/", "tokens/"))}
            assert all(matches(name, family_metrics("run", "step")) for name in told)
    for d in (whole, rest):
        issued, trained_on = (d.ledger.of(name)[0] for name in ("issued", "trained"))
        assert trained_on == 18 and issued <= d.stream.prompts.position
    if max_lag == 0:
        assert whole.ledger.table() == rest.ledger.table()


def test_a_step_given_up_is_rolled_back_and_passes_over_no_prompt_twice() -> None:
    """The fourth step is interrupted as it samples; the next process draws and passes over anew."""

    def made(stop: int) -> tuple[Driver, ToyWorld, Curriculum]:
        world = a_world(0)
        data = [Prompt(f"{i:02d}", "", (0,), str(TARGET)) for i in range(12)]
        chosen = Curriculum(PromptStream(data, seed=1), 12, Rule(visits=1, low=0.2, outside=0.3), seed=1)
        choice = Selection({"curriculum": chosen}, metrics=(chosen.metrics,))
        d = driver(world, prompts=chosen, selection=choice, groups_per_step=3, refill_limit=99)
        sampling = world.sample

        async def sample(*given: Any, **named: Any) -> list[Rollout]:
            found = await sampling(*given, **named)
            if d.version == stop and chosen.passed > chosen.counted[0] and d.ledger.pending[3]:
                asyncio.get_running_loop().call_later(0.05, d.stop)
                await asyncio.sleep(0.1)
            return found

        world.sample = sample  # type: ignore[method-assign]
        return d, world, chosen

    (whole, unharmed, _), (d, _, chosen), (rest, resumed, _) = made(99), made(3), made(99)
    trained(whole, 5)
    trained(d, 5)
    assert d.version == 3 and chosen.passed > chosen.counted[0] > 0, "the witness: it passed over more"
    trained(rest, 5, d.committed)
    told, first = resumed.steps[-1], unharmed.steps[-1]
    assert told["samples/rolled_back"] > 0 == first["samples/rolled_back"]
    counts = [n for n in told if n.startswith(("groups/", "samples/", "tokens/", "prompts/"))]
    other = {n for n in counts if told[n] != first[n]} - {"tokens/per_second"}
    assert other == {f"{unit}/rolled_back" for unit in UNITS[1:]} | {f"{unit}/issued" for unit in UNITS[1:]}


PLANTED = {
    "a group is lost": lambda d: d.stream._remove(next(iter(d.stream.slots.values()))),
    "all is issued twice": lambda d: d.ledger.lines.update(issued=d.ledger.of("issued") * 2),
    "the prompts go back": lambda d: setattr(d.stream.prompts, "position", 0),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_run_that_miscounts_saves_its_step_says_all_it_knows_and_ends_with_1(
    fault: str, tmp_path: Path
) -> None:
    world = ToyWorld(build_objective("grpo"))
    d, events, saved = driver(world, max_lag=1, prompts=ToyPrompts()), list[dict](), list[int]()
    world.event = lambda kind, **fields: events.append({"kind": kind} | fields)  # type: ignore[method-assign]

    async def after(step: int, metrics: object) -> None:
        if step == 2:  # four groups are in flight
            PLANTED[fault](d)

    async def save() -> Path:
        saved.append(d.committed["version"])
        return tmp_path / "kept"

    said: list[str] = []
    with pytest.raises(
        LedgerError, match=rf"after step 3, saved in {tmp_path}/kept: .*\nledger     issued: "
    ) as error:
        asyncio.run(train_balanced(d, 9, after, save, said.append))
    assert error.value.exit_code == 1 and saved == [3] and d.version == 3
    assert [e["lines"]["issued"]["groups"] > 0 for e in events if e["kind"] == "ledger"] == [True]


@pytest.mark.parametrize("bad", ["", "q2"])
def test_a_run_ends_with_its_ledger_where_something_was_dropped(bad: str, tmp_path: Path) -> None:
    d, said = driver(ToyWorld(build_objective("grpo"), bad=bad)), list[str]()

    async def nothing(*given: object) -> Any:
        return None

    asyncio.run(train_balanced(d, 2, nothing, nothing, said.append))
    assert bool(said) == bool(bad)
    assert (
        not bad or "ledger     dropped: infra_failed: 1 prompts, 1 groups, 24 samples, 48 tokens" in said[0]
    )
