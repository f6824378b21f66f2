"""Settings files of the user's own: what Hydra would misread is said with file, line and mending."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.types import Override
from omegaconf import OmegaConf

from entroray.config import Config
from entroray.errors import ConfigError, first_line
from entroray.rows import conf_folder

HEADER = re.compile(r"#\s*@package\s+([\w.]+)\s*")


def check_own_files(given: Sequence[Override], folder: Path, kind: Callable[[str], Any]) -> None:
    """ConfigError, with file, line and mending, for a chosen file of `folder` that Hydra would misread.

    `kind` is the type of a setting, by its path.
    """
    left = [(folder / each.key_or_group, name) for each in given for name in _names(each)]
    seen = set[tuple[Path, str]]()
    while left:
        group, name = left.pop(0)
        if group.is_dir() and (group, name) not in seen:
            root = _check_choice(group, name, kind)
            left += _defaults(folder, group, root) if root else []
        seen.add((group, name))


def _defaults(folder: Path, group: Path, root: yaml.Node) -> list[tuple[Path, str]]:
    """The files that a file takes as its defaults: their folder and name."""
    found = list[tuple[Path, str]]()
    given = yaml.safe_load(yaml.serialize(root)).get("defaults")
    for each in given if isinstance(given, list) else ():
        for key, value in each.items() if isinstance(each, dict) else [("", each)]:
            path = str(key).rpartition(" ")[2].partition("@")[0]
            place = folder / path[1:] if path.startswith("/") else group / path
            names = value if isinstance(value, list) else [value]
            found += [(place, str(name).removesuffix(".yaml")) for name in names if name != "_self_"]
    return found


def _names(override: Override) -> list[str]:
    """The files of a group that a word chooses."""
    value = override.value()
    chosen = value if isinstance(value, list) else [value]
    return [] if override.is_delete() else [str(name).removesuffix(".yaml") for name in chosen]


def refuse_overlaps(given: Sequence[Override], folders: Sequence[Path]) -> None:
    """ConfigError for a list of files of a group of which two set one setting: the last would win, unsaid."""
    for override in given:
        group = override.key_or_group
        if isinstance(override.value(), list) and any((folder / group).is_dir() for folder in folders):
            _refuse_overlap(override.key_or_group, _names(override), folders)


def _refuse_overlap(group: str, names: Sequence[str], folders: Sequence[Path]) -> None:
    seen: dict[str, str] = {}
    for name in names:
        file = next((f for folder in folders if (f := folder / group / f"{name}.yaml").is_file()), None)
        for path in _paths(file):
            if path in seen:
                raise ConfigError(
                    f"{group}=[{','.join(names)}]: {seen[path]} and {name} both set {path}: train them one "
                    f"by one with -m {group}={','.join(names)}, or compare them in entroray lab"
                )
        seen |= dict.fromkeys(_paths(file), name)


def _paths(file: Path | None) -> list[str]:
    """The settings of a file by their paths in it, without its `defaults`."""
    root = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader) if file else None
    return [path for path, _ in _leaves(root, "") if path and path.split(".")[0] != "defaults"]


def _leaves(node: yaml.Node | None, path: str) -> Iterator[tuple[str, yaml.Node | None]]:
    """What a file sets, by path, each item of a list by that of the list."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield from _leaves(value, f"{path}.{key.value}".lstrip("."))
    elif isinstance(node, yaml.SequenceNode) and node.value:
        yield from ((path, each) for item in node.value for _, each in _leaves(item, path))
    else:
        yield path, node


def _check_choice(group: Path, name: str, kind: Callable[[str], Any]) -> yaml.Node | None:
    """What the file holds; None where the folder has none of that name."""
    file = group / f"{name}.yaml"
    if not file.is_file() and file.with_suffix(".yml").is_file():
        raise ConfigError(f"{file.with_suffix('.yml')} is not looked for: call it {file.name}")
    if not file.is_file():
        return None  # of conf/, or of nobody, which is told with the choices there are
    if (ours := conf_folder() / group.name / file.name).is_file() and not ours.samefile(file):
        raise ConfigError(f"{file} is not looked for, conf/ has one of that name: give it another")
    text = _text(file)
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        _refuse_repeated(file, root)
        yaml.safe_load(text)  # which makes no object of a tag
    except yaml.YAMLError as error:
        raise ConfigError(explain_yaml(file, text, error)) from error
    except RecursionError as error:
        raise ConfigError(f"{file}: a value of it contains itself (&name, *name): leave one out") from error
    if not isinstance(root, yaml.MappingNode):
        found = "a list" if isinstance(root, yaml.SequenceNode) else "nothing" if root is None else "a text"
        raise ConfigError(f"{file}, line 1: it holds {found}: write settings, as in `run: {{steps: 7}}`")
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
    package = header[1] if header else group.name
    for path, node in _leaves(root, package.removeprefix("_global_").lstrip(".")):
        _refuse_lost(file, path, node, kind(path))
    return root


def _refuse_lost(file: Path, path: str, node: yaml.Node | None, kind: Any) -> None:
    """ConfigError for a value that would be passed over, or a text that YAML reads as something else."""
    if not isinstance(node, yaml.ScalarNode):
        return
    where = f"{file}, line {node.start_mark.line + 1}: {path}"
    if node.value == "???":
        raise ConfigError(f"{where} has no value (???): give it one, or leave it out to have its default")
    if node.style is None and kind in (str, str | None, list[str]):
        plain: Any = OmegaConf.to_container(OmegaConf.create(f"x: {node.value}"))
        if plain["x"] is not None and str(plain["x"]) != node.value:
            raise ConfigError(
                f"{where} is a text, and {node.value} is read as {plain['x']}: write it in quotes, "
                f'"{node.value}"'
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
