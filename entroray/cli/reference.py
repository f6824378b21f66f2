"""`entroray reference`: the tables of conf/README.md, made from the schema and the YAML files."""

import inspect
import io
import itertools
import re
import tokenize
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from entroray.binding import keyword_settings, slot_functions
from entroray.cli import flags
from entroray.cli.flags import Flag
from entroray.config import Config
from entroray.control import feedback, schedules
from entroray.errors import ConfigError
from entroray.rows import PACKAGE, conf_folder, in_checkout

TABLES = ("| | what it is |", "| `fn` | its settings | what it does |", "| setting | default | meaning |")
"""First lines of the tables of conf/README.md that are made here; its prose stays as it is written there."""
FLAGS = (Flag("write"),)


def main(arguments: list[str]) -> int:
    """`reference [--write]`: print conf/README.md with its tables made again, or write it."""
    given, others = flags.parse_flags("reference", arguments, FLAGS)
    if others:
        raise ConfigError(f"reference takes --write alone, got {others[0]}")
    if "write" in given and not in_checkout():
        raise ConfigError(f"reference --write writes conf/README.md of a checkout, and {PACKAGE} is in none")
    page = conf_folder() / "README.md"
    text = reference_text(page.read_text(encoding="utf-8"))
    page.write_text(text, encoding="utf-8") if "write" in given else print(text, end="")
    return 0


def reference_text(page: str) -> str:
    """`page` with its tables made again from the YAML files, the rules and the schema."""
    for head, rows in zip(TABLES, (_groups(), _rules(), _settings()), strict=True):
        columns = "|---" * (head.count("|") - 1) + "|"
        table = "\n".join([head, columns, *rows, ""])
        old = re.search(rf"^{re.escape(head)}\n(\|.*\n)*", page, re.MULTILINE)
        page = page.replace(old[0], table) if old else page
    return page


def _groups() -> Iterator[str]:
    for file in sorted(conf_folder().glob("*/*.yaml")):
        yield f"| `{file.parent.name}={file.stem}` | {title(file)} |"


def _rules() -> Iterator[str]:
    for name, rule in (slot_functions(schedules) | slot_functions(feedback)).items():
        takes = [
            f"{p.name}={p.default}" if p.default is not p.empty else p.name
            for p in keyword_settings(rule).values()
        ]
        meaning = " ".join(inspect.getdoc(rule).split("\n\n")[0].split())  # type: ignore[union-attr]
        yield f"| `{name}` | {', '.join(takes)} | {meaning} |"


def title(file: Path) -> str:
    """What the comment at the head of a YAML says of it."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), file.read_text().splitlines())
    said = " ".join(line.lstrip("# ") for line in lines if "@package" not in line)
    return said.replace("|", "or")


def _settings() -> Iterator[str]:
    base = yaml.safe_load((conf_folder() / "train.yaml").read_text())
    for path, default, meaning in settings(Config):
        if path not in base:
            yield f"| `{path}` | `{default}` | {meaning.replace('|', 'or')} |"


def settings(schema: type, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """(path, default, meaning) of every setting of a schema; the meaning is the comment behind it."""
    said = _comments(schema)
    for field in fields(schema):
        if is_dataclass(field.default_factory):
            yield from settings(field.default_factory, f"{prefix}{field.name}.")  # type: ignore[arg-type]
        else:
            yield f"{prefix}{field.name}", _default(field), said.get(field.name, "")


def _default(field: Field[Any]) -> str:
    """As it would be written on the command line."""
    value = field.default_factory() if field.default_factory is not MISSING else field.default
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("...\n").strip()


def _comments(schema: type) -> dict[str, str]:
    """The comment behind each field, by name: on its line, or within its parentheses."""
    found, name = dict[str, str](), ""
    for token in tokenize.generate_tokens(io.StringIO(inspect.getsource(schema)).readline):
        if (
            token.type == tokenize.NAME
            and token.start[1] == 4
            and token.line.lstrip().startswith(token.string)
        ):
            name = token.string
        elif token.type == tokenize.COMMENT and name:
            found[name] = " ".join([found.get(name, ""), token.string[1:].strip()]).strip()
    return found
