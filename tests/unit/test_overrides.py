"""Words of a command line and files of one's own: what is read, and what each refusal says to write."""

import re
import shlex
import signal
import sys
import threading
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from entroray.cli import multirun
from entroray.cli.multirun import check_apart
from entroray.config import Config, Run
from entroray.errors import ConfigError, PreflightError
from entroray.rows import conf_folder
from entroray.wiring import compose
from entroray.wiring.compose import refuse_sweeps
from entroray.wiring.overrides import parse_overrides, read_line_breaks, refuse_unknown
from tests.composed import configured

# What is put to the model.


def text(word: str, path: str) -> object:
    """What the setting at `path` holds after a command line of one word."""
    tree, (given,) = OmegaConf.structured(Config), parse_overrides([word])
    OmegaConf.update(tree, given.key_or_group, given.value())
    read_line_breaks(tree, [given])
    return (
        OmegaConf.to_container(OmegaConf.select(tree, path))
        if "stop" in path
        else OmegaConf.select(tree, path)
    )


@pytest.mark.parametrize(
    "path",
    [
        *("data.template", "model.system", "sampler.insert"),
        *("rollout.tool.open", "rollout.tool.close", "rollout.tool.answer"),
    ],
)
@pytest.mark.parametrize(
    ("typed", "meant"),
    [(r"a\nb", "a\nb"), (r"a\\nb", r"a\nb"), (r"\boxed{{}}\n\n", "\\boxed{{}}\n\n"), ("a\nb", "a\nb")],
)
def test_a_backslash_and_an_n_are_a_line_break_in_every_text(path: str, typed: str, meant: str) -> None:
    assert text(f'{path}="{typed}"', path) == meant


def test_they_are_in_lists_in_dictionaries_and_in_parts_of_a_mixture() -> None:
    assert text(r'sampler.stop=["\n\n", "\\n", END]', "sampler.stop") == ["\n\n", r"\n", "END"]
    assert text(r'rollout.tool={open: "x\n", close: y}', "rollout.tool.open") == "x\n"
    words = [
        "data=mixture",
        r'data.parts.countdown.template="{question}\n"',
        r"data.parts.countdown.system=a\nb",
    ]
    parts = compose.load_config(words)[0].data.parts
    assert (parts["countdown"].template, parts["countdown"].system) == ("{question}\n", "a\nb")
    assert text(r'reward.path="a\nb"', "reward.path") == r"a\nb", "a path is no text"


def test_the_last_word_holds_and_a_file_is_read_by_the_rules_of_yaml(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    mine = '# @package _global_\nmodel: {system: "a\\nb"}\nsampler: {stop: ["\\\\n", "\n\n"]}\n'
    (tmp_path / "experiment" / "mine.yaml").write_text(mine)
    config, tree = compose.load_config(["experiment=mine"], str(tmp_path))
    assert config.model.system == "a\nb" and config.sampler.stop[0] == r"\n"
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(tree))
    again = compose.override_config(OmegaConf.load(tmp_path / "config.yaml"), [])  # type: ignore[arg-type]
    assert again.sampler.stop == config.sampler.stop, "a run's own settings read once more"
    assert compose.override_config(tree, [r"model.system=c\nd", "model.system=e"]).model.system == "e"


# Words that say nothing, or something else.


@pytest.mark.parametrize(
    ("word", "instead", "value"),
    [
        ("run.dir=/tmp/实验", 'run.dir="/tmp/实验"', "/tmp/实验"),
        ("run.dir=runs/lr=0.1", 'run.dir="runs/lr=0.1"', "runs/lr=0.1"),
        ("run.dir=a(b)", 'run.dir="a(b)"', "a(b)"),
        ("run.dir=don't", 'run.dir="don\'t"', "don't"),
        ('run.dir="a', 'run.dir="a"', "a"),
        ("run.dir=${seed", 'run.dir="${seed"', "${seed"),
        ("data.template={question} Answer.", 'data.template="{question} Answer."', "{question} Answer."),
        ("sampler.stop=</answer>", 'sampler.stop=["</answer>"]', ["</answer>"]),
        ("sampler.stop=[<|a|>,END]", 'sampler.stop=["<|a|>","END"]', ["<|a|>", "END"]),
        ("data.settings.split=a&b", 'data.settings.split="a&b"', "a&b"),
    ],
)
def test_a_word_that_cannot_be_read_is_refused_with_the_word_that_can(
    word: str, instead: str, value: object
) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_overrides([word])
    written = str(refused.value).partition(": write ")[2]
    assert shlex.split(written) == [instead] and "hydra.cc" not in str(refused.value)
    assert parse_overrides(shlex.split(written))[0].value() == value


def test_a_dictionary_may_be_typed_over_several_lines() -> None:
    word = """reward.judge={fn: math,
        extract: last_line}"""
    assert configured(word).reward.judge == {"fn": "math", "extract": "last_line"}
    config = configured('evaluate.sets={\n a: {task: x, template: "1\n{q}"},\n b: {task: y}\n}')
    assert config.evaluate.sets["a"].template == "1\n{q}" and config.evaluate.sets["b"].task == "y"


def test_a_home_that_no_shell_fills_in_is_filled_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    with pytest.raises(ConfigError, match=re.escape("""'model.path="/home/me/q"'""")):
        parse_overrides(["model.path=~/q"])


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("learner.weight_decay=1e-6;", r"learner\.weight_decay is a number"),
        ("control.x={fn: </x>}", r"in double quotes"),
        ("objective.scales=[{fn: selected]", r"bracket"),
        ("seed", r"`seed=VALUE`"),
        ("quickstart", r"`experiment=quickstart`"),
        ("run.résumé=auto", r"`run\.resume=VALUE`"),
        ("=3", r"key=value"),
        ("", r"key=value"),
        ("run.dir=", r"run\.dir=null"),
        ("learner.weight_decay=", r"^learner\.weight_decay= .*give a value$"),
        ("data.template=None", r"data\.template=null"),
        ("hydra.run.dir=x", r"run\.dir .*--config-dir .*--multirun"),
    ],
)
def test_what_is_no_setting_is_refused_by_what_it_may_mean(word: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_overrides([word])


def test_several_values_for_one_run_are_a_sweep_or_a_text_with_commas() -> None:
    words = ["model.system=Be brief, please."]
    with pytest.raises(ConfigError, match=r"--multirun.*'model\.system=\"Be brief, please\.\"'"):
        refuse_sweeps(words, parse_overrides(words))
    refuse_sweeps(["model.system='a, b'"], parse_overrides(["model.system='a, b'"]))


@pytest.mark.parametrize("word", ["+run.stepz=3", "++foo.bar=3", "+experiment=quickstart"])
def test_what_there_is_no_place_for_cannot_be_added(word: str) -> None:
    with pytest.raises(ConfigError, match=rf"^\{word[0]}.*(run\.steps|foo\.bar|: experiment=quickstart$)"):
        refuse_unknown([word], parse_overrides([word]), [])
    refuse_unknown(["+generator.engine.x=3"], parse_overrides(["+generator.engine.x=3"]), [])


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("generator.engine.max_num_seqs=3", r"\+generator\.engine\.max_num_seqs=3"),
        ("sampler.stop=END", r"""'sampler\.stop=\["END"\]'"""),
        ("sampler.stop=null", r"sampler\.stop=\[\]"),
        ("run.steps=1e2", r"run\.steps=100$"),
        ("run.dir=${oc.env:NOT_SET}/r", r"NOT_SET.*run\.dir.*\$\{oc\.env:NAME\}"),
        ("run.name=../x", r"run\.name='\.\./x'.*run\.dir"),
        ("objective=dapoo", r"`dapo`"),
    ],
)
def test_a_value_that_a_setting_cannot_have_is_refused_with_one_that_it_can(word: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        compose.load_config([word])


# Sweeps.


@pytest.mark.parametrize(
    ("word", "values"),
    [
        ("seed=range(1,4)", ["1", "2", "3"]),
        ("seed=1, 2,1", ["1", "2"]),
        ("learner.lr=choice(1e-3,1e-4)", ["0.001", "0.0001"]),
        ("seed=sort(3,1,2)", ["1", "2", "3"]),
        ("objective=glob(d*)", ["dapo", "dcpo", "dppo", "dr_grpo"]),
        ("objective=glob([k*,nsr],exclude=kl*)", ["nsr"]),
        ("model.system='a, b','c'", ["'a, b'", "'c'"]),
        ("experiment=glob(m*)", ["mine"]),
    ],
)
def test_every_sweep_of_hydras_is_a_list_of_words(word: str, values: list[str], tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").touch()
    key = word.partition("=")[0]
    assert compose.expand_sweep([word], str(tmp_path)) == [[f"{key}={value}"] for value in values]


@pytest.mark.parametrize(
    "word",
    [
        *("learner.lr=interval(1e-5,1e-3)", "learner.lr=glob(*)", "objective=glob(zz*)", "seed=range(3,1)"),
        *("seed=range(0,9,0)", "learner.lr=range(0.1,0.3,0)", "seed=range(0,inf)", "seed=range(a,b)"),
    ],
)
def test_what_cannot_be_listed_is_refused_by_its_word(word: str) -> None:
    with pytest.raises(ConfigError, match="^" + re.escape(word)):
        compose.expand_sweep([word])


def test_runs_of_one_sweep_have_a_folder_each(tmp_path: Path) -> None:
    one = [Run(dir=str(tmp_path / "one")) for _ in range(2)]
    with pytest.raises(ConfigError, match=r"^run\.dir=/.*'run\.dir=/.*/one/\$\{seed\}'$"):
        check_apart(one, [["seed=1"], ["seed=2"]])
    check_apart([Run(), Run()], [["seed=1"], ["seed=2"]])
    check_apart([Run(dir=str(tmp_path / name)) for name in "ab"], [["seed=1"], ["seed=2"]])
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "metrics.jsonl").touch()
    with pytest.raises(PreflightError, match=r"run\.dir=/.*/b .*run\.resume=auto"):
        check_apart([Run(dir=str(tmp_path / name)) for name in "ab"], [["seed=1"], ["seed=2"]])


# Files of one's own.

HEAD = "# @package _global_\n"


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("run: {steps: 7}\n", 1, "# @package _global_"),
        ("# mine\n" + HEAD + "run: {steps: 7}\n", 1, "# @package _global_"),
        ("# @package global\nrun: {steps: 7}\n", 1, "# @package _global_"),
        ("\ufeff" + HEAD + "run: {steps: 7}\n", 1, "UTF-8"),
        ("", 1, "run: {steps: 7}"),
        (HEAD, 1, "run: {steps: 7}"),
        (HEAD + "- run\n- steps\n", 1, "run: {steps: 7}"),
        (HEAD + "run:\n\tsteps: 7\n", 3, "spaces"),
        (HEAD + "run: {steps: 7}\nseed: 1\nrun: {name: x}\n", 4, "line 2"),
        (HEAD + "run: {steps: 7\n", 3, "YAML"),
        (HEAD + "run: {steps: 7, name: \xe9}\n", 2, "UTF-8"),
        (HEAD + "run: {steps: 7}\n---\nseed: 1\n", 3, "document"),
        (HEAD + "run:\n  stepz: 7\n", 3, "`run.steps`"),
        (HEAD + "learner:\n  lr: fast\n", 3, "learner.lr"),
        (HEAD + "defaults: [{override /objektive: dapo}]\n", 2, "`objective`"),
    ],
)
def test_a_broken_file_is_named_with_its_line_and_its_mending(
    tmp_path: Path, text: str, line: int, said: str
) -> None:
    file = tmp_path / "lauf ä, =" / "experiment" / "mine.yaml"
    file.parent.mkdir(parents=True)
    file.write_bytes(text.encode("latin-1" if "\xe9" in text else "utf-8"))
    with pytest.raises(ConfigError, match=rf"^{re.escape(str(file))}, line {line}: .*{re.escape(said)}"):
        compose.load_config(["experiment=mine"], str(tmp_path / "lauf ä, ="))


def test_a_file_of_another_suffix_and_one_that_contains_itself_are_named(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "short.yml").write_text(HEAD + "seed: 1\n")
    (tmp_path / "experiment" / "round.yaml").write_text(HEAD + "a: &a [*a]\n")
    for name, said in (("short", r"short\.yml .*short\.yaml"), ("round", r"round\.yaml: .*\*name")):
        with pytest.raises(ConfigError, match=said):
            compose.load_config([f"experiment={name}"], str(tmp_path))


def test_a_section_of_ones_own_needs_no_header(tmp_path: Path) -> None:
    (tmp_path / "learner").mkdir()
    (tmp_path / "learner" / "mine.yaml").write_text("lr: 0.5\n")
    assert compose.load_config(["learner=mine"], str(tmp_path))[0].learner.lr == 0.5
    assert (conf_folder() / "learner").is_dir()


# A dictionary is given whole.


@pytest.mark.parametrize(
    ("words", "path", "value"),
    [
        (["reward.judge={fn: math}"], "reward.judge", {"fn": "math"}),
        (["data.settings={size: 9}"], "data.settings", {"size": 9}),
        (["data.settings={size: 9}", "data.settings.seed=3"], "data.settings", {"size": 9, "seed": 3}),
        (["learner.deepspeed={zero_allow_untested_optimizer: true}"], "learner.deepspeed", None),
        (["generator.engine={max_num_seqs: 8}"], "generator.engine", {"max_num_seqs": 8}),
        (["sampler=by_entropy", "sampler.rule={fn: fixed}"], "sampler.rule", {"fn": "fixed"}),
    ],
)
def test_a_free_dictionary_takes_the_place_of_the_one_there_was(words: list[str], path: str, value) -> None:
    tree = compose.load_config(words)[1]
    assert OmegaConf.to_container(OmegaConf.select(tree, path)) == (
        value or {"zero_allow_untested_optimizer": True}
    )


def test_a_part_of_a_mixture_is_given_whole_and_checked() -> None:
    third = "data.parts.third={task: chain_sum, weight: 2, judge: {fn: gym, task: chain_sum}}"
    parts = compose.load_config(["data=mixture", third])[0].data.parts
    assert parts["third"].weight == 2 and parts["third"].judge == {"fn": "gym", "task": "chain_sum"}
    with pytest.raises(ConfigError, match=r"weigth"):
        compose.load_config(["data=mixture", third.replace("weight", "weigth")])


def test_a_run_of_many_passes_sigterm_on_and_ends_with_a_run_that_a_signal_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saving = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)); "
    saving += "print('ready', flush=True); time.sleep(30)"
    timer = threading.Timer(1.0, lambda: signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM))
    timer.start()
    assert multirun._run([sys.executable, "-c", saving]) == 143
    codes = iter([0, 143, 0])
    monkeypatch.setattr(multirun, "_run", lambda command: next(codes))
    assert multirun.train_each(["seed=1,2,3"], None) == 143 and next(codes) == 0


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("model=null", "Leave"),
        ("++control=none", r"\+\+"),
        ("~run.steps", "default"),
        ("run.dir=${hydra:runtime.cwd}", r"oc\.env:PWD"),
    ],
)
def test_what_hydra_says_comes_with_what_to_write(word: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        compose.load_config([word])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["data=table", "data.settings.subst=main"], r"^data\.source: .*`subst`: did you mean `subset`"),
        (["data=table", "reward.judge.markr=x"], r"^reward\.judge: .*`markr`: did you mean `marker`"),
        (
            ["data=mixture", "data.parts.countdwn.weight=2"],
            r"no `data\.parts\.countdwn`: did you mean `countdown`",
        ),
        (["data=mixture", "data.parts.countdown=x"], r"'data\.parts\.countdown=\{task: x\}'$"),
        (["data=table", "data.settings.subset=2024"], r"must be text or null, in double quotes, got 2024$"),
        (["data=table", "data.settings=main"], r"'data\.settings=\{NAME: main\}'$"),
        (["reward.judge=math"], r"'reward\.judge=\{fn: math\}'$"),
        (["reward.parts.x=my.py:f"], r"""'reward\.parts\.x=\{path: "my\.py:f"\}'$"""),
    ],
)
def test_what_stands_in_a_free_dictionary_is_refused_by_its_name(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        compose.load_config(words)


def test_what_a_source_and_a_judge_take_needs_no_plus() -> None:
    more = ["data.settings.subset=main", "data.settings.revision=v1", "data.settings.marker='=='"]
    config, _ = compose.load_config(["data=table", *more, "reward.judge.marker=A", "data.settings.marker=B"])
    assert {k: config.data.settings[k] for k in ("subset", "revision", "marker")} == {
        **{"subset": "main", "revision": "v1", "marker": "B"}
    }
    assert config.reward.judge and config.reward.judge["marker"] == "A"
    for last in ("data.settings.subset=b", "++data.settings.subset=b"):
        words = ["data=table", "data.settings.subset=a", "++data.settings.subset=c", last]
        assert compose.load_config(words)[0].data.settings["subset"] == "b"
    told = [
        "data=mixture",
        "data.parts.countdown.settings.seed=3",
        "+data.parts.countdown.settings.other=7",
    ]
    settings = compose.load_config(told)[0].data.parts["countdown"].settings
    assert (settings["seed"], settings["other"]) == (3, 7)
