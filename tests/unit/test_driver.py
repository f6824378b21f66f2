"""The true driver and stream over the toy world: learning, bounded lag, failures as values."""

import asyncio
import json
import re
from pathlib import Path

import pytest
import yaml

from entroray.errors import ConfigError, DataError, InfrastructureError, NumericsError
from entroray.metrics.catalogue import family_metrics
from entroray.objective import build_objective
from entroray.rollout.selection import Selection
from entroray.rollout.stream import Dropped, Stream, wave
from entroray.seeds import seeds
from entroray.train.driver import Driver
from entroray.types import Group, Prompt, Status, Verdict
from entroray.wiring.selection import build_selection
from tests.composed import configured
from tests.documented import matches
from tests.toy import ToyPrompts, ToyWorld, driver, trained

ROWS = Path(__file__).parents[2] / "conf" / "objective"


def row(name: str, **changes: object) -> object:
    return build_objective({**yaml.safe_load((ROWS / f"{name}.yaml").read_text()), **changes})


@pytest.mark.parametrize("name", ["grpo", "rloo", "reinforce", "dapo", "cispo"])
def test_every_reinforcing_row_learns_the_toy(name: str) -> None:
    world = ToyWorld(row(name), lr=0.5)
    asyncio.run(driver(world, groups_per_step=8).train(25))
    first, last = world.steps[0], world.steps[-1]
    assert last["correct/mean"] > first["correct/mean"] + 0.15
    assert last["entropy/mean"] < first["entropy/mean"]


def test_a_rule_that_never_touches_a_token_is_counted_and_named() -> None:
    never = {"select": {"fn": "covariance_band", "low": 50.0, "high": 60.0}}
    world = ToyWorld(row("clip_cov", **never, keep={"fn": "always"}))
    asyncio.run(driver(world).train(21))
    assert {s["objective/covariance_band_tokens"] for s in world.steps} == {0.0}
    assert world.events.count("rule_untouched") == 2, "the draw, and the scale that drops what it draws"


def test_the_seed_of_the_run_decides_what_is_selected_by_chance() -> None:
    class Noting(ToyWorld):
        def step(self, step, metrics, groups, tokens):
            self.chosen = tokens.uid[tokens.selected].tolist()

    def chosen(seed: int) -> list[int]:
        world = Noting(row("random_positive_clip", keep={"fn": "always"}))
        d = driver(world, groups_per_step=8)
        d.seed = seed
        asyncio.run(d.train(1))
        return world.chosen

    assert chosen(0) == chosen(0) and len({tuple(chosen(seed)) for seed in range(6)}) > 2


CHOSEN = {
    "rollout.prompts.retire=0.9": "rollout.prompts",
    "rollout.prompts.band=[0.1,0.9]": "rollout.prompts",
    "rollout=replay": "rollout.replay.tokens",
    "rollout=hotter_next_time": "rollout.second.when",
}


@pytest.mark.parametrize(("override", "setting"), CHOSEN.items())
def test_a_run_that_remembers_what_its_checkpoint_does_not_is_refused_by_its_setting(
    override: str, setting: str
) -> None:
    plain = driver(ToyWorld(row("grpo"))).state()
    prompts, selection = build_selection(configured(override, training=False).rollout, ToyPrompts(), 4, 0)
    begun = driver(ToyWorld(row("grpo")), prompts=prompts, selection=selection)
    with pytest.raises(ConfigError, match=rf"{re.escape(setting)}: .*config\.yaml .*run\.dir"):
        begun.restore(json.loads(json.dumps(plain)))
    driver(ToyWorld(row("grpo"))).restore(begun.state())  # to remember less is no fault


@pytest.mark.parametrize("max_lag", [0, 1, 2])
def test_lag_is_bounded_and_nothing_is_refused_when_nothing_straggles(max_lag: int) -> None:
    world = ToyWorld(row("grpo"))
    d = driver(world, max_lag=max_lag)
    asyncio.run(d.train(8))
    assert max(s["lag/max"] for s in world.steps) <= max_lag
    assert world.steps[-1]["groups/refused"] == 0
    assert (world.steps[-1]["lag/max"] > 0) == (max_lag > 0)


def test_every_prompt_is_trained_once_in_order_of_issue() -> None:
    world = ToyWorld(row("grpo"))
    asyncio.run(driver(world, max_lag=1).train(6))
    assert world.trained == [f"q{i}" for i in range(24)]


def test_wait_trains_a_straggler_before_it_grows_too_old() -> None:
    world = ToyWorld(row("grpo"), slow="q1")
    d = driver(world, max_lag=1)

    async def run() -> None:
        world.gate = asyncio.Event()

        async def after(step: int, metrics: object) -> None:
            if step == 1:  # the next step would leave q1 two versions behind: it must wait
                asyncio.get_running_loop().call_later(0.2, world.gate.set)

        await d.train(4, after)

    asyncio.run(run())
    assert "q1" in world.trained[:8] and "q1" not in world.trained[:4]
    assert max(s["lag/max"] for s in world.steps) <= 1
    assert world.steps[-1]["groups/refused"] == 0


def test_drop_refuses_a_straggler_and_issues_its_prompt_again() -> None:
    world = ToyWorld(row("grpo"), slow="q1")
    d = driver(world, max_lag=1, wait=False)

    async def run() -> None:
        world.gate = asyncio.Event()

        async def after(step: int, metrics: object) -> None:
            if step == 3:
                world.gate.set()
                await asyncio.sleep(0.01)

        await d.train(6, after)

    asyncio.run(run())
    assert world.steps[-1]["groups/refused"] == 1
    assert max(s["lag/max"] for s in world.steps) <= 1
    assert world.trained.count("q1") == 1


def test_a_prompt_whose_samples_fail_is_resampled_twice_then_dropped() -> None:
    world = ToyWorld(row("grpo"), bad="q2")
    asyncio.run(driver(world).train(2))
    assert world.events.count("resample") == 3
    assert "q2" not in world.trained
    assert world.steps[-1]["groups/dropped"] == 1


def test_no_signal_at_all_ends_the_run_instead_of_sampling_for_ever() -> None:
    world = ToyWorld(row("grpo", keep={"fn": "informative"}))
    world.judge = all_wrong  # type: ignore[method-assign]
    refused = r"driver\.refill_limit x rollout\.groups_per_step.*objective\.keep\.fn=always"
    with pytest.raises(DataError, match=refused) as error:
        asyncio.run(driver(world, refill_limit=2).train(1))
    assert "resample" not in str(error.value)


def test_too_many_dropped_groups_are_those_of_the_step_and_the_error_says_what_to_do() -> None:
    async def failing(prompt: Prompt, serial: int) -> Dropped:
        return Dropped("timeout: slow")

    async def drop_beyond(limit: int) -> None:
        stream = Stream(ToyPrompts(), failing, per_step=5, max_lag=0, keeps=False)
        stream.dropped.update({"timeout: slow": 14})  # of an earlier step
        try:
            await stream.take(lambda group: True, wait=True, limit=limit)
        finally:
            await stream.close()

    refused = r"^15 .* 10 .*driver\.refill_limit x rollout\.groups_per_step.*: 15 x timeout: slow\. "
    with pytest.raises(DataError, match=refused) as error:
        asyncio.run(drop_beyond(10))
    assert "`resample`" in str(error.value) and "objective.keep" not in str(error.value)


def test_reward_counts_groups_the_filter_sent_back() -> None:
    """Two of three groups are all wrong: the filter trains on the third only, the reward is of all."""
    world = ToyWorld(row("grpo", keep={"fn": "informative"}))
    world.judge = one_in_three  # type: ignore[method-assign]
    asyncio.run(driver(world, groups_per_step=3).train(2))
    for metrics in world.steps:
        assert metrics["correct/trained_mean"] == 0.5
        assert metrics["correct/mean"] == pytest.approx(1 / 6, abs=0.06)
        assert metrics["groups/all_wrong"] == pytest.approx(2 / 3, abs=0.1)


def test_parts_of_verdicts_are_journalled_as_means_over_those_that_have_them() -> None:
    async def in_parts(prompt: object, rollouts: list) -> list:
        whole = {"form": 0.0, "odd": float("nan")}, {"form": 1.0, "brief": 3.0}
        return [Verdict(1.0, bool(i % 2), parts=whole[i % 2]) for i in range(len(rollouts))]

    world = ToyWorld(row("grpo"))
    world.judge = in_parts  # type: ignore[method-assign]
    asyncio.run(driver(world).train(1))
    found = {name: value for name, value in world.steps[0].items() if name.startswith("reward/part_")}
    assert found == {"reward/part_form": 0.5, "reward/part_brief": 3.0}
    assert all(matches(name, family_metrics("parts")) for name in found)


def test_a_wave_holds_what_is_missing_and_one_deviation_more() -> None:
    assert [wave(64, 1.0), wave(64, 0.5), wave(1, 0.25), wave(0, 0.5)] == [64, 140, 8, 0]


@pytest.mark.parametrize("late", ["q0", "q4", "q7"])
def test_who_finishes_late_has_no_say_in_what_is_trained_on(late: str) -> None:
    """Half of the groups are kept and a wave is cut to size, in order of issue whatever the timing."""
    trained = []
    for slow in ("", late):
        world = ToyWorld(row("grpo", keep={"fn": "informative"}), slow=slow)
        world.judge = one_in_three  # type: ignore[method-assign]

        async def run(world: ToyWorld = world) -> None:
            world.gate = asyncio.Event()
            asyncio.get_running_loop().call_later(0.05, world.gate.set)
            await driver(world, groups_per_step=3).train(4)

        asyncio.run(run())
        trained.append(world.trained)
        assert world.steps[-1]["groups/surplus"] > 0
    assert trained[0] == trained[1] == sorted(trained[0], key=lambda q: int(q[1:]))


def test_a_run_that_always_skips_its_update_ends_however_often_it_is_resumed() -> None:
    """max_skipped is 3, and each process does one step."""
    world, state = ToyWorld(row("grpo")), None

    async def skips(*given: object) -> dict[str, float]:
        return {"update/skipped": 1.0}

    world.update = skips  # type: ignore[method-assign]
    for step in (1, 2):
        state = trained(driver(world), step, state)[step]
    with pytest.raises(NumericsError, match=r" 3 .*learner\.lr.*learner\.max_grad_norm.*skipped/"):
        trained(driver(world), 3, state)


def test_limits_count_on_after_a_resume() -> None:
    d = driver(ToyWorld(row("grpo")))
    d.failures.observe([Verdict(0.0, False, status=Status.TIMEOUT, detail="slow"), Verdict(0.0, False)], 2)
    d.idle.observe({"objective/cap_tokens": 0.0})

    async def restored(state: dict) -> Driver:
        rest = driver(ToyWorld(row("grpo")))
        rest.restore(json.loads(json.dumps(state)))
        await rest.stream.close()
        return rest

    rest = asyncio.run(restored(d.state()))
    assert list(rest.failures.recent) == ["timeout: slow", ""]
    assert rest.idle.idle == {"objective/cap_tokens": 1}


class Observed:
    """Remembers the prompts it observed."""

    def __init__(self) -> None:
        self.prompts: list[str] = []

    def observe(self, group: Group) -> None:
        self.prompts.append(group.prompt.id)

    def state(self) -> list[str]:
        return list(self.prompts)

    def restore(self, state: list[str]) -> None:
        self.prompts = list(state)


@pytest.mark.parametrize("late", ["", "q1", "q3"])
def test_observers_take_in_all_groups_in_order_of_issue_whoever_finishes_late(late: str) -> None:
    """q0, q3, q6, ... are trained on, the others sent back; each is observed once."""
    world, observed = ToyWorld(row("grpo", keep={"fn": "informative"}), slow=late), Observed()
    world.judge = one_in_three  # type: ignore[method-assign]

    async def run() -> None:
        world.gate = asyncio.Event()
        asyncio.get_running_loop().call_later(0.05, world.gate.set)
        await driver(world, groups_per_step=3, selection=Selection({"observed": observed})).train(3)

    asyncio.run(run())
    assert observed.prompts == [f"q{i}" for i in range(len(observed.prompts))]


@pytest.mark.parametrize("max_lag", [0, 1])
def test_a_restored_driver_draws_the_prompts_it_would_have_had(max_lag: int) -> None:
    def world() -> ToyWorld:
        made = ToyWorld(row("grpo", keep={"fn": "informative"}))
        made.judge = one_in_three  # type: ignore[method-assign]
        return made

    def run(world: ToyWorld, state: dict | None = None) -> dict:
        return trained(driver(world, groups_per_step=3, max_lag=max_lag), 6, state)

    whole, resumed = world(), world()
    states = run(whole)
    run(resumed, states[3])
    assert [s["step"] for s in resumed.steps] == [4, 5, 6]
    assert whole.trained[-len(resumed.trained) :] == resumed.trained


async def one_in_three(prompt: object, rollouts: list) -> list:
    signal = int(prompt.id[1:]) % 3 == 0  # type: ignore[attr-defined]
    return [Verdict(float(signal and i % 2), bool(signal and i % 2)) for i, _ in enumerate(rollouts)]


async def all_wrong(prompt: object, rollouts: list) -> list:
    return [Verdict(0.0, False) for _ in rollouts]


def test_a_stall_ends_the_run_and_names_phase_and_prompt() -> None:
    world = ToyWorld(row("grpo"), slow="q0")

    async def run() -> None:
        world.gate = asyncio.Event()
        await driver(world, stall=0.2).train(1)

    with pytest.raises(InfrastructureError, match=r"driver\.stall.*`sample`.*'q0'"):
        asyncio.run(run())


def test_an_error_in_sampling_reaches_the_caller() -> None:
    world = ToyWorld(row("grpo"))

    async def broken(prompt: object, seeds: object, draw: object) -> list:
        raise InfrastructureError("engine gone")

    world.sample = broken  # type: ignore[method-assign]
    with pytest.raises(InfrastructureError, match="engine gone"):
        asyncio.run(driver(world).train(1))


def test_seeds_are_stable_and_differ_between_draws() -> None:
    assert seeds(1, 2, 0, 3) == seeds(1, 2, 0, 3)
    assert len({*seeds(1, 2, 0, 8), *seeds(1, 2, 1, 8), *seeds(1, 3, 0, 8), *seeds(2, 2, 0, 8)}) == 32
    assert all(0 <= s < 2**31 for s in seeds(0, 0, 0, 100))


def test_a_run_of_so_many_tokens_ends_with_the_step_that_drew_the_last_and_resumes_there() -> None:
    """4 groups of 8 rollouts of 2 tokens a step: 64, so that 150 are drawn in the third step."""
    world = ToyWorld(row("grpo"))
    d = driver(world, tokens=150)
    asyncio.run(d.train(9))
    assert [s["tokens/drawn"] for s in world.steps] == [64.0, 128.0, 192.0]

    async def resumed() -> None:
        rest = driver(world, tokens=200)
        rest.restore(json.loads(json.dumps(d.committed)))
        await rest.train(9)

    asyncio.run(resumed())
    assert world.steps[-1]["tokens/drawn"] == 256.0 and len(world.steps) == 4


def test_tokens_of_members_that_failed_of_dropped_groups_and_of_refusals_are_drawn_too() -> None:
    """Rollouts have 2 tokens. q0 fails whole, 3 times 8; of q1 one member is judged late, once."""
    world = ToyWorld(row("grpo"), bad="q0")
    late = {"q1"}

    async def judge(prompt: Prompt, rollouts: list) -> list[Verdict]:
        status = Status.TIMEOUT if prompt.id in late else Status.OK
        late.discard(prompt.id)
        return [Verdict(0.0, False, status=status), *[Verdict(1.0, True)] * (len(rollouts) - 1)]

    world.judge = judge  # type: ignore[method-assign]
    d = driver(world)
    asyncio.run(d.train(1))
    assert world.trained == ["q1", "q2", "q3", "q4"] and world.steps[0]["groups/dropped"] == 1
    assert world.steps[0]["tokens/drawn"] == 4 * 16 + 3 * 16 + 2
    assert {name: n.tolist() for name, n in d.ledger.dropped.items()} == {
        "infra_failed": [1, 1, 24, 48],
        "timeout": [0, 0, 1, 2],
    }
    assert d.ledger.of("trained").tolist() == [4, 4, 32, 64]
    assert d.ledger.of("drawn_anew").tolist() == [0, 0, 16 + 1, 32 + 2]


def test_a_refused_group_was_drawn_all_the_same() -> None:
    """q1 outlives the lag and is drawn again: its first 16 tokens count, and are in the checkpoint."""
    world = ToyWorld(row("grpo"), slow="q1")
    d = driver(world, max_lag=1, wait=False)

    async def run() -> None:
        world.gate = asyncio.Event()

        async def after(step: int, metrics: object) -> None:
            if step == 3 and world.gate:
                world.gate.set()

        await d.train(6, after)

    asyncio.run(run())
    told = world.steps[-1]
    assert told["groups/refused"] == 1
    assert told["tokens/drawn"] == 6 * 4 * 16 + 16
    assert d.ledger.of("dropped: refused").tolist() == [0, 1, 8, 16], "its prompt goes on"
    assert d.state()["stream"]["ledger"]["lines"]["dropped: refused"] == [0, 1, 8, 16]
