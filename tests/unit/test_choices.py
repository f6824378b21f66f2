"""How prompts and groups are chosen: literal orders, what is remembered, what is refused."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from entroray import rows
from entroray.data.curriculum import Curriculum, Rule
from entroray.data.prompts import PromptStream
from entroray.errors import ConfigError
from entroray.objective import build_objective
from entroray.rollout.second_draw import SecondDraw
from entroray.rollout.selection import Selection
from entroray.types import Group, Prompt, Rollout, Verdict
from entroray.wiring import selection
from tests.cases import ROWS
from tests.composed import configured
from tests.documented import CHOSEN, matches
from tests.toy import TARGET, ToyWorld, driver, trained

PROMPTS = [Prompt(f"p{i}", f"p{i}", (0,), str(TARGET)) for i in range(6)]


class InOrder:
    """p0 .. p5 and again, in that order."""

    position = 0

    def __next__(self) -> Prompt:
        self.position += 1
        return self.at(self.position - 1)

    def at(self, position: int) -> Prompt:
        return PROMPTS[position % 6]


def rollout(name: str = "p0", length: int = 2, version: int = 0, **changes: Any) -> Rollout:
    ids, ones = np.arange(length, dtype=np.int32), np.full(length, -0.1, np.float32)
    return Rollout(name, ids, ones, np.full(length, version, np.int32), "t", 1.0, 9, **changes)


def group(name: str, *correct: float, **changes: Any) -> Group:
    prompt = Prompt(name, name, (0,), "")
    rollouts = tuple(rollout(name, **changes) for _ in correct)
    return Group(prompt, rollouts, tuple(Verdict(c, bool(c)) for c in correct))


def taken(prompts: Any, count: int) -> str:
    return " ".join(next(prompts).id for _ in range(count))


# The order of prompts.


def test_without_a_rule_nothing_is_passed_over() -> None:
    chosen = Curriculum(InOrder(), 6, Rule(), seed=0)
    chosen.observe(group("p1", 1, 1))
    chosen.observe(group("p2", 0, 0))
    assert taken(chosen, 8) == "p0 p1 p2 p3 p4 p5 p0 p1" and chosen.passed == 0


def test_a_mastered_prompt_is_passed_over_and_positions_stay_those_of_the_data() -> None:
    chosen = Curriculum(InOrder(), 6, Rule(visits=2, retire=0.75), seed=0)
    assert taken(chosen, 3) == "p0 p1 p2"
    chosen.observe(group("p1", 1, 1, 1, 0))  # 0.75
    chosen.observe(group("p2", 1, 1, 0, 0))
    chosen.observe(group("p2", 1, 1, 1, 1))  # mean of the last two 0.75
    assert taken(chosen, 7) == "p3 p4 p5 p0 p3 p4 p5"
    assert chosen.position == 12 and chosen.passed == 2
    assert chosen.at(1).id == "p1", "a slot in flight finds its prompt whatever was learnt of it"
    chosen.observe(group("p2", 0, 0, 0, 0))  # of 1 and 0: 0.5
    assert chosen.pass_rate("p2") == 0.5
    assert taken(chosen, 2) == "p0 p2"


def test_a_band_passes_over_what_is_outside_but_for_a_share_of_its_turns() -> None:
    chosen = Curriculum(InOrder(), 6, Rule(low=0.25, high=0.75, outside=0.3), seed=0)
    for name, right in (("p0", 0), ("p1", 1), ("p2", 3), ("p3", 4)):
        chosen.observe(group(name, *[1] * right, *[0] * (4 - right)))
    seen = [next(chosen).id for _ in range(2000)]
    counts = {name: seen.count(name) / seen.count("p5") for name in ("p0", "p1", "p2", "p3", "p4")}
    assert counts["p1"] == counts["p2"] == pytest.approx(1.0, abs=0.01) == counts["p4"]
    assert counts["p0"] == pytest.approx(0.3, abs=0.06) and counts["p3"] == pytest.approx(0.3, abs=0.06)
    assert chosen.metrics([], [], 1)["prompts/inside"] == 0.5


def test_nothing_starves_where_every_prompt_is_passed_over() -> None:
    chosen = Curriculum(InOrder(), 6, Rule(retire=0.9, low=0.4, high=0.6, outside=1e-9), seed=0)
    for i in range(6):
        chosen.observe(group(f"p{i}", float(i != 2), float(i != 2)))
    assert taken(chosen, 3) == "p2 p2 p2" and chosen.forced == 3, "the one that is not mastered"
    chosen.observe(group("p2", 1, 1))
    chosen.observe(group("p2", 1, 1))
    assert taken(chosen, 3) == "p3 p4 p5" and chosen.forced == 6


def test_a_hotter_second_draw_says_nothing_of_the_pass_rate() -> None:
    chosen = Curriculum(InOrder(), 6, Rule(), seed=0)
    chosen.observe(replace(group("p1", 1, 1), earlier=(group("p1", 0, 0),)))
    assert chosen.rates["p1"] == [0.0]


def a_run(steps: int, state: dict | None = None, **changes: Any) -> tuple[ToyWorld, dict[int, dict]]:
    """Four of twelve prompts a step; each group right as its prompt says, some always, some never."""
    world = ToyWorld(build_objective(ROWS["grpo"]))
    data = [Prompt(f"{i:02d}", f"{i}", (0,), str(TARGET)) for i in range(12)]

    async def judge(prompt: Prompt, rollouts: list) -> list[Verdict]:
        kind = int(prompt.id) % 3
        return [Verdict(x, bool(x)) for x in (float(kind == 0 or (kind == 1 and i % 2)) for i in range(8))]

    world.judge = judge  # type: ignore[method-assign]
    rule = Rule(visits=1, low=0.2, high=0.8, outside=0.3)
    chosen = Curriculum(PromptStream(data, seed=1), 12, rule, seed=1)
    choice = Selection({"curriculum": chosen}, metrics=(chosen.metrics,))
    d = driver(world, prompts=chosen, selection=choice, **changes)
    return world, trained(d, steps, state)


@pytest.mark.parametrize("max_lag", [0, 1])
def test_the_driver_draws_the_same_prompts_after_a_resume(max_lag: int) -> None:
    world, states = a_run(12, max_lag=max_lag)
    resumed, _ = a_run(12, states[6], max_lag=max_lag)
    if max_lag == 0:
        assert resumed.trained == world.trained[24:]
        assert resumed.steps[-1]["prompts/passed_over"] == world.steps[-1]["prompts/passed_over"] > 0
    else:  # what was in flight comes first, its prompts found again by position
        assert resumed.trained[:4] == world.trained[24:28]
    late = world.trained[24:]
    counts = [sum(int(p) % 3 == kind for p in late) for kind in range(3)]
    assert counts[1] > counts[0] > 0 and counts[1] > counts[2] > 0, "the band comes first, nothing starves"
    assert all(matches(name, CHOSEN) for name in world.steps[-1] if name.startswith("prompts/"))


# The configuration.

FILES = sorted((rows.conf_folder() / "rollout").glob("*.yaml"))
NAMES = [file.stem for file in FILES if "plan:" not in file.read_text()]  # plans have tests of their own
UNCORRECTED = r"rollout\.second .*objective\.correction=.*rollout\.second\.factor=1"
SPECULATIVE = r"rollout\.second .*generator\.engine\.speculative_config.*second\.factor=1"


@pytest.mark.parametrize("name", NAMES)
def test_every_row_is_described_and_only_the_plain_one_chooses_nothing(name: str) -> None:
    said = selection.describe_selection(configured(f"rollout={name}").rollout)
    assert (said == "every prompt in its turn, every group as it was drawn") == (name == "plain")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["rollout=mastered", "rollout.prompts.retire=1.5"], r"rollout\.prompts\.retire=1\.5 .* 0 .* 1$"),
        (["rollout=band", "rollout.prompts.band=[0.8,0.2]"], r"rollout\.prompts\.band=\[0\.8, 0\.2\] "),
        (["rollout=band", "rollout.prompts.outside=0"], r"rollout\.prompts\.outside=0: .* 0\.1$"),
        (
            ["rollout=replay", "objective.correction.fn=none"],
            r"rollout\.replay .*objective\.correction=.*rollout\.replay\.tokens=0",
        ),
        (["rollout=hotter_again", "objective.correction.fn=none"], UNCORRECTED),
        (["rollout=hotter_again", "+generator.engine.speculative_config={method: ngram}"], SPECULATIVE),
        (["rollout=hotter_next_time", "objective.correction.fn=none"], UNCORRECTED),
        (["rollout=hotter_next_time", "+generator.engine.speculative_config={method: ngram}"], SPECULATIVE),
        (["rollout.second.factor=0.9"], r"rollout\.second\.factor=0\.9 .* 1$"),
        (["rollout.second.when=later"], r"rollout\.second\.when=later: .*at_once.*next_time"),
        (["rollout.early.extra=-1"], r"rollout\.early\.extra=-1 .* 0$"),
        (["rollout.repetition.count=1"], r"rollout\.repetition\.count=1 .* 0 .* 2$"),
        (["rollout=stop_loops", "rollout.repetition.count=1"], r"rollout\.repetition\.count=1 .* 0 .* 2$"),
        (["rollout=stop_loops", "rollout.max_tokens=7"], r"repetition\.count=8 .*rollout\.max_tokens=7"),
        (["rollout.surplus=keep"], r"surplus=keep .*driver\.max_lag=0 .*driver=async.*surplus=drop"),
        (["rollout.surplus=lose"], r"rollout\.surplus=lose: .*by_lag.*keep.*drop"),
        (["rollout=replay", "rollout.replay.tokens=10"], r"replay\.tokens=10 .*rollout\.max_tokens="),
        (["rollout=replay", "rollout.group_size=1"], r"rollout\.group_size=1 .*replay\.tokens=0"),
    ],
)
def test_a_choice_that_makes_no_sense_is_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        configured(*overrides)


def test_the_plain_choice_leaves_the_prompts_as_they_are() -> None:
    stream = PromptStream(PROMPTS, seed=0)
    assert selection.build_selection(configured().rollout, stream, 6, 0) == (
        stream,
        Selection({}, SecondDraw(), []),
    )
