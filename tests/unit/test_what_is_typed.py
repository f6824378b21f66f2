"""What is typed, on a command line and in a file of one's own, is what is taken, or is refused."""

import re
from pathlib import Path

import pytest

from entroray.errors import ConfigError
from entroray.wiring import compose
from tests.composed import configured

HEAD = "# @package _global_\n"

# A text is what was typed.


NUMBERS = ("1e5", "007", "1_000", "0x10", "+5", "1.", ".5", "nan", "inf")


@pytest.mark.parametrize("typed", [*NUMBERS, "true", "False", "yes", "no", "2024-01-01", "None"])
def test_a_text_is_kept_as_it_was_typed(typed: str) -> None:
    told = f"run.name={typed}", f"model.path={typed}", f"sampler.stop=[{typed}, 'a, b', END]"
    config = configured(*told, "learner.lr=1e-6")
    assert (config.run.name, config.model.path) == (typed, typed)
    assert config.sampler.stop == [typed, "a, b", "END"]


def test_a_swept_text_is_kept_and_a_number_is_a_number() -> None:
    assert compose.expand_sweep(["run.name=1e5,007,'a, b'"]) == [
        ['run.name="1e5"'],
        ["run.name=007"],
        ["run.name='a, b'"],
    ]
    for key, *values in (
        ("model.attention", "sdpa", "eager"),
        ("learner.lr", "1e-6", "1e-5"),
        ("reward.path", "/a/b.py:f", "/a/c.py:f"),
        ("run.name", "a b", "007", "true"),
    ):
        each = [compose.expand_sweep([f"{key}={value}"]) for value in values]
        swept = compose.expand_sweep([f"{key}={','.join(values)}"])
        assert [[words] for words in swept] == each, "a cell of a lab is called by its words"
    assert configured("learner.lr=1e-5", "run.dir=null").learner.lr == 1e-5


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("run={name: 1e5}", r"run\.name"),
        ("data.parts.x={task: 1e5}", r"data\.parts\.x\.task"),
        ("run.name=Null", r"""'run\.name="Null"'"""),
        ("run.name='???'", r"run\.name"),
        ("~run", r"~run .*default"),
        ("~seed", r"~seed .*default"),
        ("objective=[grpo,dapo]", r"-m objective=grpo,dapo"),
        ("experiment=[quickstart,countdown]", r"-m experiment=quickstart,countdown"),
    ],
)
def test_a_word_that_would_be_read_otherwise_is_refused(word: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        compose.load_config([word])


def own(folder: Path, **files: str) -> str:
    for name, text in files.items():
        file = folder / f"{name.replace('__', '/')}.yaml"
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    return str(folder)


def test_files_of_a_group_that_set_different_things_may_be_listed(tmp_path: Path) -> None:
    named = {f"sets__{n}": f"{HEAD}data: {{parts: {{{n}: {{task: t-{n}}}}}}}\ndefaults: []\n" for n in "ab"}
    mine = own(tmp_path, **named, sets__c=f"{HEAD}data: {{parts: {{a: {{weight: 2}}}}}}\n")
    for words in (["+sets=[a,b]"], ["+sets=[a,c]"]):
        assert set(compose.load_config(words, mine)[0].data.parts) == {"a", words[0][-2]} - {"c"}
    (tmp_path / "sets" / "c.yaml").write_text(f"{HEAD}data: {{parts: {{a: {{task: t}}}}}}\n")
    with pytest.raises(ConfigError, match=r"a and c both set data\.parts\.a\.task: .*-m sets=a,c"):
        compose.load_config(["+sets=[a,c]"], mine)


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("run:\n  steps: ???\n", 3, "run.steps"),
        ("data: {settings: {size: '???'}}\n", 2, "data.settings.size"),
        ("sampler: {stop: [a, '???']}\n", 2, "sampler.stop"),
        ("run: {name: 1e5}\n", 2, '"1e5"'),
        ("run: {name: 007}\n", 2, '"007"'),
        ("run:\n  name: yes\n", 3, '"yes"'),
        ("sampler: {stop: [END, 0x10]}\n", 2, '"0x10"'),
        ("data: {parts: {a: {task: 1_000}}}\n", 2, '"1_000"'),
    ],
)
def test_a_value_of_a_file_that_would_be_lost_is_named_with_its_line(
    tmp_path: Path, text: str, line: int, said: str
) -> None:
    mine = own(tmp_path, experiment__mine=HEAD + text)
    with pytest.raises(ConfigError, match=rf"mine\.yaml, line {line}: .*{re.escape(said)}"):
        compose.load_config(["experiment=mine"], mine)


@pytest.mark.parametrize("default", ["override /data: own", "base", "override /data: [own]"])
def test_files_that_are_reached_by_the_defaults_of_another_are_looked_at_too(
    tmp_path: Path, default: str
) -> None:
    lost = {"data__own": "task: ???\n", "experiment__base": f"{HEAD}data:\n  task: ???\n"}
    first = f"{HEAD}defaults: [{{{default}}}]\n" if ":" in default else f"{HEAD}defaults: [{default}, mine]\n"
    mine = own(tmp_path, **lost, experiment__mine=first)
    where = r"own\.yaml, line 1" if ":" in default else r"base\.yaml, line 3"
    with pytest.raises(ConfigError, match=rf"{where}: data\.task has no value"):
        compose.load_config(["experiment=mine"], mine)


def test_a_file_that_says_nothing_wrong_is_read(tmp_path: Path) -> None:
    text = 'run: {name: "007", dir: ~, steps: 7}\nmodel: {path: "${run.name}", system: 42}\nseed: 0x10\n'
    text += "learner: {lr: 1.0e-6}\n"
    config = compose.load_config(["experiment=mine"], own(tmp_path, experiment__mine=HEAD + text))[0]
    assert (config.run.name, config.run.dir, config.model.path, config.seed) == ("007", None, "007", 16)
    assert config.model.system == "42"


def test_a_file_of_a_name_that_conf_has_is_refused_and_a_train_yaml_is_not_blamed(tmp_path: Path) -> None:
    mine = own(tmp_path, train="seed: 1\n", data__chain_sum="task: x\n", learner__mine="lr: 0.5\n")
    with pytest.raises(ConfigError, match=r"data/chain_sum\.yaml .*another"):
        compose.load_config(["data=chain_sum"], mine)
    with pytest.raises(ConfigError, match=r"data/mxture") as refused:
        compose.load_config(["data=mxture", "learner=mine"], mine)
    assert "train.yaml" not in str(refused.value)
