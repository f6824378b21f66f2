"""`entroray completion`: a script that completes commands, flags, choices and settings, for bash or zsh."""

import re
from pathlib import Path

from entroray import __version__, cli
from entroray.binding import keyword_settings, slot_functions, slot_name
from entroray.cli.reference import settings
from entroray.config import PATHS, Config
from entroray.errors import ConfigError
from entroray.objective.objective import ONE
from entroray.rows import conf_folder

HERE = Path(__file__).parent
SHELLS = ("bash", "zsh")
WORDS = {"completion": " ".join(SHELLS), "objectives": "show table", "report": "@files", "watch": "@files"}
"""What a command takes beside flags and settings; `@files` stands for files and folders."""


def main(arguments: list[str]) -> int:
    """`completion bash|zsh`; the script is the same until entroray is another."""
    if len(arguments) != 1 or arguments[0] not in SHELLS:
        raise ConfigError(f"completion takes bash or zsh, got {arguments}: entroray completion bash")
    print(script(arguments[0]), end="")
    return 0


def script(shell: str) -> str:
    """The function that `shell` calls, and as functions of it what there is to choose."""
    said = (HERE / f"completion.{shell}").read_text()
    commands = {"*": " ".join([*cli.COMMANDS, "--help", "--version"])}
    made = {"commands": commands, "words": WORDS, "flags": _flags(), "values": _values()}
    cases = "".join(_function(f"_entroray_{name}", choices) for name, choices in made.items())
    return said.replace("@version@", __version__).replace("@cases@\n", cases)


def _function(name: str, choices: dict[str, str]) -> str:
    lines = [f"    {key}) echo '{words}' ;;" for key, words in choices.items()]
    return "\n".join([f"{name}() {{", "    case $1 in", *lines, "    esac", "}", ""])


def _flags() -> dict[str, str]:
    """Of each command, as the usage has them: `--cfg=job` for a word to give, `--dir=` for a value."""
    found = dict[str, str]()
    for command, block in cli.BLOCKS.items():
        flags = dict[str, str]()
        for flag, takes in re.findall(r"--([a-z-]+)(?: ([A-Za-z]+)\])?", block):
            flags[flag] = flags.get(flag) or (f"={takes if takes.islower() else ''}" if takes else "")
        found[command] = " ".join(f"--{flag}{takes}" for flag, takes in flags.items())
    return found


def _values() -> dict[str, str]:
    """Of each group and setting what it may be; of a setting without choices its default."""
    lines = (HERE.parents[1] / "wiring" / "choices.tsv").read_text().splitlines()
    choices = dict(line.split("\t") for line in lines) | dict.fromkeys(PATHS, "@files")
    switch = dict.fromkeys(("true", "false"), "true false")
    found = {
        path: choices.get(path) or switch.get(default) or "".join(re.findall(r"^[\w.+-]+$", default))
        for path, default, _ in settings(Config)
    }
    for slot in ONE:
        rules, path = slot_functions(slot), f"objective.{slot_name(slot)}"
        found[f"{path}.fn"] = " ".join(sorted(rules))
        found |= {f"{path}.{name}": "" for rule in rules.values() for name in keyword_settings(rule)}
    for folder in sorted(folder for folder in conf_folder().iterdir() if folder.is_dir()):
        found[folder.name] = " ".join(sorted(file.stem for file in folder.glob("*.yaml")))
    return found | {"keys": " ".join(f"{key}=" for key in found)}
