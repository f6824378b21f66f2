"""Settings files of the user's own: what Hydra would misread is said with file, line and mending."""

import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import yaml
from hydra.core.override_parser.types import Override

from entroray.config import Config
from entroray.errors import ConfigError, first_line

HEADER = re.compile(r"#\s*@package\s+([\w.]+)\s*")


def check_own_files(given: Sequence[Override], folder: Path) -> None:
    """ConfigError, with file, line and mending, for a chosen file of `folder` that Hydra would misread."""
    for override in given:
        group, value = folder / override.key_or_group, override.value()
        names = value if isinstance(value, list) else [value]
        if group.is_dir() and not override.is_delete():
            for name in names:
                _check_choice(group, str(name).removesuffix(".yaml"))


def _check_choice(group: Path, name: str) -> None:
    file = group / f"{name}.yaml"
    if not file.is_file() and file.with_suffix(".yml").is_file():
        raise ConfigError(f"{file.with_suffix('.yml')} is not looked for: call it {file.name}")
    if not file.is_file():
        return  # of conf/, or of nobody, which is told with the choices there are
    text = _text(file)
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        _refuse_repeated(file, root)
    except yaml.YAMLError as error:
        raise ConfigError(explain_yaml(file, text, error)) from error
    except RecursionError as error:
        raise ConfigError(f"{file}: a value of it contains itself (&name, *name): leave one out") from error
    if not isinstance(root, yaml.MappingNode):
        kind = "a list" if isinstance(root, yaml.SequenceNode) else "nothing" if root is None else "a text"
        raise ConfigError(f"{file}, line 1: it holds {kind}: write settings, as in `run: {{steps: 7}}`")
    for key, _ in root.value:
        if isinstance(key, yaml.ScalarNode) and key.value == "hydra":
            line = key.start_mark.line + 1
            raise ConfigError(f"{file}, line {line}: `hydra` has no effect here: run.dir says where a run is")
    sections = {f.name for f in fields(Config)}
    header = HEADER.fullmatch(text.lstrip().partition("\n")[0])
    if group.name not in sections and not (header and header[1].split(".")[0] in {"_global_", *sections}):
        raise ConfigError(
            f"{file}, line 1: write `# @package _global_` there, before anything else: without it the file's "
            f"settings are looked for under `{group.name}`"
        )


def _text(file: Path) -> str:
    raw = file.read_bytes()
    if raw.startswith(b"\xef\xbb\xbf"):
        raise ConfigError(f"{file}, line 1: it begins with a byte-order mark: save it as UTF-8 without one")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ConfigError(f"{file}, line {line}: it is not UTF-8 text: save it as UTF-8") from error


def explain_yaml(file: Path, text: str, error: yaml.YAMLError) -> str:
    """Where a YAML file is broken and, for what is often met, why."""
    mark = getattr(error, "problem_mark", None)
    line = mark.line if mark else text[: getattr(error, "position", 0)].count("\n")
    broken = text.splitlines()[line : line + 1]
    why = getattr(error, "problem", None) or first_line(error)
    tabs = ": indent with spaces, not with a tab" if broken and "\t" in broken[0] else ""
    return f"{file}, line {line + 1}: it is no YAML, {why}{tabs}"


def _refuse_repeated(file: Path, node: yaml.Node | None) -> None:
    """ConfigError for a key that a mapping has twice, of which only one could count."""
    if isinstance(node, yaml.SequenceNode):
        for each in node.value:
            _refuse_repeated(file, each)
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if isinstance(key, yaml.ScalarNode) and key.value in seen:
            raise ConfigError(
                f"{file}, line {line}: `{key.value}` stands in line {seen[key.value]} too: leave one"
            )
        seen[str(key.value)] = line
        _refuse_repeated(file, value)
