"""F06, F18, F19, F21 to F23, F33, F44, F45: no numbers, odd batches, late results, dead trackers."""

import asyncio
import random
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from entroray.errors import NumericsError
from entroray.observe.journal import read_metrics
from entroray.policy.microbatches import plan_microbatches
from entroray.train.batching import assemble, group_index, tokens_of
from entroray.types import Draw, Group, Prompt, Rollout, Status, Verdict
from tests.faults.record import Fault
from tests.ray.stack import Stack, lines
from tests.ray.test_learner import a_gang, groups
from tests.ray.test_limits import BASE, LENGTHS, WILD
from tests.toy import ToyWorld, driver
from tests.toy import trained as trained_states
from tests.unit.test_driver import row
from tests.unit.test_observe import write
from tests.unit.test_trackers import Recorder, booked, lost

pytestmark = pytest.mark.faults
BUDGET = 150
"""Of tokens in a micro-batch, as `a_gang` has it."""


def uneven() -> list[Group]:
    """Three groups of long responses, then three of one token each."""

    def one(i: int) -> Group:
        n, rng = (28 if i < 3 else 1), np.random.default_rng(i)
        ids = [rng.integers(0, 250, n).astype(np.int32) for _ in range(4)]
        told = [(x, np.full(n, -5.0, np.float32), np.zeros(n, np.int32)) for x in ids]
        rollouts = [Rollout(f"p{i}", *columns, "", 1.0, 32) for columns in told]
        verdicts = [Verdict(float(j % 2), bool(j % 2)) for j in range(4)]
        return Group(Prompt(f"p{i}", "", (1, 2, 3), ""), tuple(rollouts), tuple(verdicts))

    return [one(i) for i in range(6)]


@pytest.mark.fault("F06", "half of the rows long, half of one token: by halves two ranks have other numbers")
def test_ranks_have_one_number_of_microbatches_whatever_their_rows(fault: Fault, stack: Stack) -> None:
    g = uneven()
    lengths = np.array([3 + r.length for x in g for r in x.rollouts])
    by_halves = [
        len(plan_microbatches(half, ranks=1, token_budget=BUDGET)[0]) for half in np.split(lengths, 2)
    ]
    assert by_halves[0] != by_halves[1]
    fault.fired(f"{by_halves[0]} and {by_halves[1]} micro-batches by halves")

    async def run(ranks: int, stage: int) -> dict[str, float]:
        async with a_gang(stack, ranks, stage) as (learner, objective):
            batch = assemble(g)
            scores = await learner.score(batch, group_index(g), 1)
            tokens = objective.credit(tokens_of(g, [objective.estimate(x) for x in g], scores, 0))
            return await learner.update(batch, tokens, objective, 1)

    alone, both = stack.wait(run(1, 1)), stack.wait(run(2, 2))
    shares = [len(share) for share in plan_microbatches(lengths, ranks=2, token_budget=BUDGET)]
    assert shares[0] == shares[1]
    fault.saw(f"{shares[0]} each are planned before the step")
    for key in ("update/loss", "update/grad_norm"):
        assert both[key] == pytest.approx(alone[key], rel=1e-4, abs=1e-6)
    fault.goes_on("loss and norm of two ranks at stage 2 are those of one")


@pytest.mark.fault("F18", "one token of one rank has a gradient that is NaN ({ranks} ranks, stage {stage})")
@pytest.mark.parametrize(("ranks", "stage"), [(2, 1), (2, 3), (1, 0)])
def test_a_nan_on_one_rank_changes_no_weight_on_any(
    fault: Fault, stack: Stack, ranks: int, stage: int
) -> None:
    async def run() -> tuple[list[dict[str, float]], list[Any]]:
        async with a_gang(stack, ranks, stage) as (learner, objective):
            batch = assemble(g := groups(4, seed=0))
            scores = await learner.score(batch, group_index(g), 1)
            tokens = objective.credit(tokens_of(g, [objective.estimate(x) for x in g], scores, 0))
            poisoned = tokens.advantages.clone()
            poisoned[0] = float("nan")
            seen, metrics = [scores["logprobs"]], []
            for advantages in (poisoned, tokens.advantages):
                given = replace(tokens, advantages=advantages)
                metrics.append(await learner.update(batch, given, objective, 1))
                seen.append((await learner.score(batch, group_index(g), 1))["logprobs"])
            return metrics, seen

    fault.fired("1 advantage of the batch is NaN, so 1 micro-batch of one rank is")
    metrics, (before, poisoned, after) = stack.wait(run())
    assert [m["update/skipped"] for m in metrics] == [1.0, 0.0] and metrics[0]["update/grad_norm"] != 1.0
    fault.saw("update/skipped 1 on all ranks")
    np.testing.assert_array_equal(before, poisoned)
    assert np.isfinite(after).all() and np.abs(after - before).max() > 1e-6
    fault.goes_on("the next update moves the weights", lost="an update")


@pytest.mark.fault("F19", "a learning rate of 1e30 throws the weights out of fp32: no score is finite")
def test_scores_that_are_not_finite_end_the_run_with_6_and_are_kept(
    fault: Fault, stack: Stack, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    fault.fired("the first update of the run is made at 1e30")
    with pytest.raises(NumericsError) as ended:
        stack.wait(stack.drive(folder, *BASE, f"model.path={stack.model}", *WILD, LENGTHS))
    skipped, *_ = [e["fields"] for e in lines(folder / "events.jsonl") if e["kind"] == "update_skipped"]
    kept = torch.load(skipped["kept"], weights_only=False)
    assert ended.value.exit_code == 6 and "learner.lr" in str(ended.value) and kept["batch"].num_rows == 128
    fault.saw("the update is skipped, its batch kept")
    fault.goes_on(
        "ends with 6 after learner.max_skipped in a row, naming learner.lr", lost="the run's updates"
    )


ODD: dict[str, dict[str, Any]] = {
    "F21": {"reward": 1.0},
    "F22": {"shortest": 0},
    "F23": {"cut": True},
}


@pytest.mark.parametrize(
    ("number", "what"),
    [
        pytest.param(number, what, marks=pytest.mark.fault(number, what))
        for number, what in (
            ("F21", "all rewards of all groups are equal"),
            ("F22", "a response of 0 tokens in every group"),
            ("F23", "every response is truncated"),
        )
    ],
)
def test_odd_groups_are_never_an_error(fault: Fault, stack: Stack, number: str, what: str) -> None:
    odd = dict(ODD[number])
    cut = odd.pop("cut", False)
    g = groups(4, seed=0, **odd)
    if cut:
        g = [replace(x, rollouts=tuple(replace(r, status=Status.TRUNCATED) for r in x.rollouts)) for x in g]

    async def run() -> dict[str, float]:
        async with a_gang(stack, 1, 1) as (learner, objective):
            batch = assemble(g)
            scores = await learner.score(batch, group_index(g), 2)
            tokens = objective.credit(tokens_of(g, [objective.estimate(x) for x in g], scores, 0))
            return await learner.update(batch, tokens, objective, 2)

    shortest = min(r.length for x in g for r in x.rollouts)
    rewards = {v.reward for x in g for v in x.verdicts}
    fault.fired(
        f"rewards {sorted(rewards)}, shortest response {shortest}, {'all' if cut else 'none'} truncated"
    )
    metrics = stack.wait(run())
    assert metrics["update/skipped"] == 0 and np.isfinite(metrics["update/loss"])
    assert (metrics["update/grad_norm"] > 0) == (number != "F21")
    fault.saw(f"gradient norm {metrics['update/grad_norm']:.2f}, no NaN")
    fault.goes_on("the update is made", lost="its signal" if number == "F21" else "nothing")


@pytest.mark.fault("F33", "a run with driver.max_lag={max_lag} is gone on with after each of its first steps")
@pytest.mark.parametrize("max_lag", [1, 2])
def test_lag_stays_bounded_after_a_resume(fault: Fault, max_lag: int) -> None:
    states = trained_states(driver(ToyWorld(row("grpo")), max_lag=max_lag), 4)
    seen = []
    for step in (1, 2, 3):
        world = ToyWorld(row("grpo"))
        world.version = step  # what a run that goes on serves first
        trained_states(driver(world, max_lag=max_lag), 8, states[step])
        seen += [s["lag/max"] for s in world.steps]
        assert world.steps[0]["step"] == step + 1
    fault.fired(f"3 resumes, lags up to {max(seen):.0f}")
    assert 0 < max(seen) <= max_lag
    fault.saw("lag/max of every step")
    fault.goes_on("the bound holds in 18 steps")


class Late(ToyWorld):
    """Gives results after random times, by a clock of the wall that jumps."""

    async def sample(self, prompt: Prompt, seeds: Any, draw: Draw, after: Any = ()) -> list[Rollout]:
        drawn = await super().sample(prompt, seeds, draw, after)
        await asyncio.sleep(random.Random(prompt.id).uniform(0.0, 0.02))
        self.came.append(prompt.id)
        return drawn


@pytest.mark.fault(
    "F45", "results come in any order, time.time() jumps by a day to and fro (max_lag={max_lag})"
)
@pytest.mark.parametrize("max_lag", [0, 1])
def test_order_of_results_and_jumps_of_the_clock_train_each_prompt_once(
    fault: Fault, monkeypatch: pytest.MonkeyPatch, max_lag: int
) -> None:
    wall, world, jumps = time.time, Late(row("grpo")), random.Random(0)
    world.came = []  # type: ignore[attr-defined]
    monkeypatch.setattr(time, "time", lambda: wall() + jumps.uniform(-86400, 86400))
    asyncio.run(driver(world, max_lag=max_lag, stall=20.0).train(6))
    issued = [f"q{i}" for i in range(24)]
    came = world.came[:24]  # type: ignore[attr-defined]
    assert came != sorted(came, key=lambda q: int(q[1:]))
    fault.fired(f"results came as {', '.join(came[:4])}, ...")
    assert len(set(world.trained)) == 24 and (max_lag or world.trained == issued)
    fault.saw("they are put in order of issue" if not max_lag else "late ones are trained a step later")
    fault.goes_on("24 prompts, each once; no deadline was missed")


@pytest.mark.fault("F44", "a tracker whose {call} {does}")
@pytest.mark.parametrize("call", ["log", "close"])
@pytest.mark.parametrize("does", ["raises", "hangs"])
def test_a_dead_tracker_is_said_once_and_the_journal_is_whole(
    fault: Fault, tmp_path: Path, call: str, does: str
) -> None:
    ever = threading.Event()
    told = Recorder(**{call: ConnectionError("no route") if does == "raises" else ever})
    book, said = booked(tmp_path, lambda: told, patience=0.3, end=0.3)
    began = time.monotonic()
    fault.fired("it is told the first step")
    for step in (1, 2, 3):
        write(book, step)
        time.sleep(0.2)
    book.close()
    ever.set()
    assert time.monotonic() - began < 4.5 and len(lost(tmp_path)) == len(said) == 1
    fault.saw(f"tracker_lost: {lost(tmp_path)[0]['reason'][:50]}")
    assert [m["step"] for m in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    fault.goes_on("steps 1 to 3 are in metrics.jsonl", lost="the tracker's copy")
