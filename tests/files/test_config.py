"""Every YAML composes; what is misspelt, mistyped or contradictory is refused by name."""

from pathlib import Path

import pytest
from omegaconf import DictConfig

from entroray import rows
from entroray.cli import reference
from entroray.config import Config
from entroray.errors import ConfigError
from entroray.objective import build_objective
from entroray.wiring import compose
from tests.composed import composed

CONF = Path(__file__).parents[2] / "conf"


def names(group: str) -> list[str]:
    return sorted(p.stem for p in (CONF / group).glob("*.yaml"))


@pytest.mark.parametrize("name", names("experiment"))
def test_every_experiment_composes(name: str) -> None:
    config, _ = compose.load_config([f"experiment={name}"])
    assert config.run.name == name
    build_objective(config.objective)


def test_every_objective_builds() -> None:
    """A row alone composes as it stands in its file; the others are composed below."""
    assert all(build_objective(rows.objective_row(name)).describe() for name in names("objective"))


def filled(choice: str) -> DictConfig:
    """As `compose` leaves it, the tiny model's learning rate filled in."""
    tree = composed(choice).copy()
    tree.learner.lr = tree.learner.lr or compose.TINY_LR
    return tree


BEYOND = [name for name in names("objective") if "_global_" in (CONF / f"objective/{name}.yaml").read_text()]
"""Rows that bring other settings with them."""


@pytest.mark.parametrize("name", ["dapo", *BEYOND])
def test_an_objective_composes_with_what_it_brings(name: str) -> None:
    config, tree = compose.load_config([f"objective={name}"])
    assert config.objective == rows.objective_row(name) and tree == filled(f"objective={name}")
    assert config.control or config.learner.reset_after or name == "dapo"


OTHERS = sorted({p.parent.name for p in CONF.glob("*/*.yaml")} - {"experiment", "objective"})


@pytest.mark.parametrize("group", OTHERS)
def test_every_other_choice_composes_and_makes_a_difference(group: str) -> None:
    trees = {name: compose.load_config([f"{group}={name}"], training=False)[1] for name in names(group)}
    assert len({compose.fingerprint(tree) for tree in trees.values()}) == len(trees) > 1
    for name, tree in trees.items():
        assert filled(f"{group}={name}") == tree, "the tests' own way to it"


def test_groups_set_what_their_names_say() -> None:
    config, _ = compose.load_config(["driver=async", "learner=zero3", "model=bf16", "observe=every_token"])
    assert (config.driver.max_lag, config.learner.zero_stage, config.observe.tokens.every) == (1, 3, 1)
    assert config.model.dtype == "bfloat16" and config.driver.probe.tolerance == 0.05
    plain, _ = compose.load_config([])
    assert (plain.driver.max_lag, plain.learner.zero_stage, plain.model.dtype) == (0, 1, "float32")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("run.stepz=3", "Did you mean `run.steps`"),
        ("learner.zero_stge=1", "Did you mean `learner.zero_stage`"),
        ("run.steps=many", "run.steps"),
        ("objective=grpoo", "grpo"),
        ("sampler.temperature=0", "greedy"),
        ("driver.stale=never", "wait or drop"),
        ("learner.updates_per_rollout=64", "groups_per_step"),
        ("learner.zero_stage=4", "0, 1, 2 or 3"),
        ("generator.sleep=true", "cluster=one_gpu"),
        ("+generator.engine.seed=3", "seed says it"),
        ("+generator.engine.max_model_len=64", r"data.max_prompt \+ rollout.max_tokens"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        compose.load_config([override])


def test_a_setting_of_the_objective_can_be_changed_on_the_command_line() -> None:
    config, _ = compose.load_config(["objective=dapo", "objective.surrogate.high=0.4"])
    assert "1.4" in build_objective(config.objective).describe()


def test_sweeps_expand_to_every_combination() -> None:
    assert compose.expand_sweep(["seed=1,2", "objective=grpo,dapo", "run.steps=3"]) == [
        ["seed=1", "objective=grpo", "run.steps=3"],
        ["seed=1", "objective=dapo", "run.steps=3"],
        ["seed=2", "objective=grpo", "run.steps=3"],
        ["seed=2", "objective=dapo", "run.steps=3"],
    ]


def test_a_folder_of_ones_own_adds_choices(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nrun: {name: mine, steps: 7}\n")
    config, _ = compose.load_config(["experiment=mine"], str(tmp_path))
    assert config.run.steps == 7


def test_the_reference_is_what_the_schema_says_and_says_it_of_every_setting() -> None:
    page = (rows.conf_folder() / "README.md").read_text()
    assert page == reference.reference_text(page), "run entroray reference --write"
    assert all(page.count(f"\n{head}\n") == 1 for head in reference.TABLES)
    assert [path for path, _, meaning in reference.settings(Config) if not meaning] == []


def test_variables_of_a_chat_template_are_said_as_any_setting() -> None:
    for told in ("model.template_args={enable_thinking: false}", "model.template_args.enable_thinking=false"):
        config, tree = compose.load_config([told])
        assert config.model.template_args == {"enable_thinking": False} == tree.model.template_args
