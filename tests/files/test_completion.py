"""The script of `entroray completion bash`, asked as readline asks it; that of zsh where there is one."""

import shutil
import subprocess
from importlib import import_module
from pathlib import Path

import pytest

from entroray import cli
from entroray.cli import completion
from entroray.errors import ConfigError
from entroray.rows import objective_names
from entroray.wiring.constraints import NAMES

ASK = r"""
offer() { # LINE, cut into words as readline does
    COMP_LINE=$1 COMP_POINT=${#1} COMPREPLY=()
    local cut=$1
    [[ $COMP_WORDBREAKS != *=* ]] || cut=${1//=/ = }
    read -ra COMP_WORDS <<<"$cut"
    [[ $1 != *[\ =] ]] || COMP_WORDS+=("")
    COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
    _entroray
    printf '%s\n' "${COMPREPLY[*]}"
}
while IFS= read -r line; do
    (
        [[ $line != noequals* ]] || COMP_WORDBREAKS=" "
        offer "${line#noequals }"
    )
done
"""
OFFERED = {  # line: what is offered, in order
    "entroray tra": "train",
    "entroray v": "verify-resume",
    "entroray --v": "--version",
    "entroray completion ": "bash zsh",
    "entroray objectives sh": "show",
    "entroray reference --": "--write",
    "entroray train --c": "--cfg=job --config-dir=",
    "entroray train --cfg=": "job",
    "entroray train learner.zero": "learner.zero_stage=",
    "entroray train learner.zero_stage=": "0 1 2 3",
    "entroray train objective=dap": "dapo",
    "entroray objectives show objective=dap": "dapo",
    "entroray lab objective=grpo,dap": "grpo,dapo",
    "entroray train +control=entropy_p": "entropy_pi",
    "entroray train run.trace=": "true false",
    "entroray train run.resume=a": "auto",
    "entroray train run.st": "run.steps=",
    "entroray train run.steps=": "100",
    "entroray train seed=1 experiment=quick": "quickstart",
    "entroray train model.path=my": "my_model",
    "entroray train --config-dir=my": "my_model",
    "entroray train --config-dir my": "my_model",
    "entroray report my": "my_model",
    "entroray report seed": "",
    "entroray watch my": "my_model",
    "entroray train objective.surrogate.hi": "objective.surrogate.high=",
    "entroray train objective.surrogate.fn=ci": "cispo",
    "entroray eval --ht": "--html=",
    "entroray train no_such": "",
    "entroray train no_such=": "",
    "entroray unknown s": "",
    "noequals entroray lab objective=grpo,dap": "objective=grpo,dapo",
    "noequals entroray train learner.zero": "learner.zero_stage=",
}


def test_bash_is_offered_commands_flags_choices_and_settings(tmp_path: Path) -> None:
    (tmp_path / "my_model").mkdir()
    done = subprocess.run(
        ["bash", "--norc", "-c", completion.script("bash") + ASK],
        **{"input": "\n".join([*OFFERED, ""]), "cwd": tmp_path, "timeout": 60},
        **{"capture_output": True, "text": True, "check": True},
    )
    assert dict(zip(OFFERED, done.stdout.splitlines(), strict=True)) == OFFERED
    assert "syntax" not in done.stderr and "command not found" not in done.stderr


def test_every_command_flag_row_and_choice_is_in_the_script() -> None:
    values, flags = completion._values(), completion._flags()
    assert flags.keys() == cli.COMMANDS.keys() and values["objective"].split() == objective_names()
    for path, choices in NAMES.items():
        assert values[path].split() == [*map(str, choices)]
    for command, module in cli.COMMANDS.items():
        there = {word.partition("=")[0] for word in flags[command].split()}
        told = {f"--{flag.name}" for flag in getattr(import_module(module), "FLAGS", ())}
        assert there == told | ({"--compare"} if command == "eval" else set())


def test_a_shell_that_is_not_known_is_refused() -> None:
    for told in ([], ["fish"], ["bash", "zsh"]):
        with pytest.raises(ConfigError, match="completion bash"):
            completion.main(told)


@pytest.mark.skipif(not shutil.which("zsh"), reason="NOT TESTED: zsh is not installed")
def test_zsh_reads_its_script(tmp_path: Path) -> None:
    script = tmp_path / "_entroray"
    script.write_text(completion.script("zsh"))
    subprocess.run(["zsh", "-n", script], check=True, timeout=60)
