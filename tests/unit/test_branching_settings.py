"""What a plan that branches is refused, what a header says of it, what is asked of the engine."""

import pytest

from entroray.cli import objectives
from entroray.errors import ConfigError
from entroray.types import Prompt
from entroray.wiring import actors, rollout_plan, sampler
from entroray.wiring.parts import build_parts
from tests.composed import configured

LONG = 12
PROMPT = Prompt("q0", "q0", (0,), "3")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["rollout=branching", "rollout.group_size=4"],
            r"rollout\.group_size=4: .*roots=4 .*rollout=plain",
        ),
        (["rollout=tree", "rollout.group_size=16"], r"rollout\.group_size=16: roots=.*depth=.* 8 "),
        (["rollout=first_token_forks", "rollout.group_size=32"], r"\+generator\.engine\.max_logprobs=32"),
        (["rollout=branching", "sampler=quadrants", "sampler.insert=w"], r"plan .*insert='w'.*rollout=plain"),
        (["rollout=branching", "sampler.temperature=0"], r"^sampler\.temperature .* 0 "),
        (["rollout=first_token_forks", "sampler.stop=['7']"], r"rollout\.plan .*sampler\.stop=\['7'\]"),
        (["rollout=branching", "rollout.plan.places=2"], r"places=2: .* 1 .* 1, "),
        (["rollout=branching", "rollout.plan.roots=3", "rollout.plan.places=3"], r"places=3: .* 2 .* 2, "),
        (["rollout=tree", "rollout.plan.places=2"], r"places=2: .* 1 .* 1, "),
        (["rollout=branching", "+rollout.plan.rots=3"], "`branching` .*`rots`.*`roots`"),
        (
            ["rollout=branching", "+generator.engine.speculative_config={a: 1}"],
            r"rollout\.plan .*generator\.engine\.speculative_config.*rollout=plain",
        ),
    ],
)
def test_what_cannot_branch_is_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        configured(*overrides)


@pytest.mark.parametrize(
    ("name", "objective"),
    [("branching", "nsr"), ("branching", "reinforce_pp"), ("tree", "qae"), ("first_token_forks", "opo")],
)
def test_a_plan_leaves_the_estimator_of_every_row_as_it_is(name: str, objective: str) -> None:
    chosen = configured(f"rollout={name}", f"objective={objective}")
    assert chosen.objective == configured(f"objective={objective}").objective


def test_a_header_says_how_siblings_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ["rollout=branching", "objective=grpo"]
    assert objectives.main(["show", *chosen]) == 0
    assert "'objective.estimator={fn: subtree}'" in capsys.readouterr().out
    assert objectives.main(["show", *chosen, "objective.estimator={fn: subtree}"]) == 0
    said = capsys.readouterr().out
    assert "subtree.eps = 1e-06" in said and "beware" not in said
    left = ["rollout=tree", "objective=qae", "objective.estimator={fn: subtree}", "~objective.estimator.k"]
    assert objectives.main(["show", *left]) == 0


def test_a_group_has_as_many_places_as_a_response_has_branches() -> None:
    plan = ["rollout.plan.roots=3", "rollout.plan.places=2"]
    assert configured("rollout=branching", *plan).rollout.plan["places"] == 2
    assert configured("rollout=tree", "rollout.plan.width=3", "rollout.plan.depth=1", "rollout.plan.places=3")
    assert configured("rollout=first_token_forks").sampler.stop == []


def test_a_plan_that_reads_entropies_has_them_noted_and_changes_nothing_else() -> None:
    config = configured("rollout=branching", "objective=dapo")
    asked = sampler.training_draw(config.sampler, config.rollout, build_parts(config), None)
    assert asked.rule == {"fn": "fixed"} and asked.factor == 1.0
    assert actors.logits_processors(config, build_parts(config))
    assert "4 from the prompt; the rest from 1 position(s) of each" in rollout_plan.describe_plan(
        build_parts(config).plan
    )
    assert config.objective["estimator"]["fn"] == "zscore" and config.objective["correction"]["fn"] == "none"
    config.rollout.plan = {"fn": "first_token_forks"}
    assert not sampler.training_draw(config.sampler, config.rollout, build_parts(config), None).notes
    assert not actors.logits_processors(config, build_parts(config))
