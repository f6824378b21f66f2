"""The words of a command line: what each means, and what is wrong with one, with its mending."""

import difflib
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString, ValueType
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf

from entroray.config import Config
from entroray.errors import ConfigError, first_line, nearest
from entroray.rows import conf_folder
from entroray.wiring.own_files import explain_yaml

PARSER = OverridesParser.create()
KEY = re.compile(r"[+~]{0,2}[A-Za-z_][\w-]*([./][\w-]+)*(@[\w./-]*)?", re.ASCII)
TEXTS = re.compile(
    r"(data|data\.parts\.[^.]+|evaluate\.sets\.[^.]+)\.(template|system)|model\.system|"
    r"sampler\.(stop|insert)|"
    r"rollout\.tool\.(open|close|answer)|.*\.rubric"
)
"""Settings whose text is put to the model or looked for in what it says."""
NAMED = ("data.parts.", "evaluate.sets.")
"""What the sections begin with that the user names."""
TAKEN = ("data.", "evaluate.sets.", "reward.", "rollout.tool.", "model.template_args.")
"""What free dictionaries begin with that need no + : whoever takes them knows what there is."""
BREAK = re.compile(r"""("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')|\s*\n\s*""", re.DOTALL)
TEXT_TYPES = (str, str | None)
NUMBERS = (list[int], list[float])
PIECE = re.compile(r"""\s*(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|[^,])+""")
"""What stands between two commas."""


# Words.


def parse_overrides(words: Sequence[str]) -> list[Override]:
    """Each `key=value`; ConfigError, with the word as it should be, for one that cannot be meant."""
    return [_parse(word) for word in words]


def read_words(words: Sequence[str]) -> tuple[list[str], list[Override]]:
    """As `parse_overrides`, each text as it was typed: Hydra reads 1e5 as 100000.0 and true as True."""
    words = [_in_one_line(word) for word in words]
    kept = [_as_typed(word, override) for word, override in zip(words, parse_overrides(words), strict=True)]
    return kept, parse_overrides(kept)


def _in_one_line(word: str) -> str:
    """A list or dictionary that is typed over several lines; a line break within quotes stays."""
    plain = word.partition("=")[2][:1] not in ("{", "[")
    return word if plain else BREAK.sub(lambda found: found[1] or " ", word)


def _as_typed(word: str, override: Override) -> str:
    """The word with numbers, true and false in quotes where its setting is a text, or a list of texts."""
    key, _, value = word.partition("=")
    kind, listed = setting_type(key.lstrip("+~")), value.startswith("[") and value.endswith("]")
    _refuse_numbers(override.key_or_group, override.value())
    if kind in TEXT_TYPES and override.value_type is ValueType.SIMPLE_CHOICE_SWEEP:
        items: list[Any] = override.value().list  # type: ignore[union-attr]
        pairs = zip(_pieces(value), items, strict=False)
        return f"{key}={','.join(_quoted(p) if isinstance(v, int | float) else p for p, v in pairs)}"
    if kind in TEXT_TYPES and isinstance(override.value(), int | float):
        return f"{key}={_quoted(value)}"
    if kind in NUMBERS and isinstance(override.value(), int | float):
        return f"{key}=[{value}]"
    if kind == list[str] and listed and isinstance(override.value(), list):
        return f"{key}=[{','.join(_quoted(each) for each in _pieces(value[1:-1]))}]"
    return word


def values_as_typed(word: str, override: Override, found: Sequence[str]) -> list[str]:
    """The values `found` that a word sweeps over, none twice, as they were typed where none has a comma."""
    typed = _pieces(word.partition("=")[2])
    simple = override.value_type is ValueType.SIMPLE_CHOICE_SWEEP and len(typed) == len(found)
    simple = simple and not re.match(r"\w+\(", typed[0])  # as sort(3,1,2)
    return [*dict(zip(found, typed if simple else found, strict=True)).values()]


def _pieces(value: str) -> list[str]:
    return [piece.strip() for piece in PIECE.findall(value)]


def _quoted(piece: str) -> str:
    bare = re.fullmatch(r"[\w.+-]+", piece, re.ASCII) and piece.lower() != "null"
    return quote(piece) if bare else piece


def _refuse_numbers(path: str, value: Any) -> None:
    """ConfigError for a text within a dictionary that Hydra has read as a number: what was typed is lost."""
    if isinstance(value, dict):
        for name, inner in value.items():
            _refuse_numbers(f"{path}.{name}", inner)
            if isinstance(inner, int | float) and setting_type(f"{path}.{name}") in TEXT_TYPES:
                raise ConfigError(f"{path}.{name} is a text and {inner!r} none: put it in double quotes")


def _parse(word: str) -> Override:
    key, _, value = word.partition("=")
    try:
        (override,) = PARSER.parse_overrides([word])
    except HydraException as error:
        raise ConfigError(_unreadable(word)) from error
    if not KEY.fullmatch(key):
        raise ConfigError(_unreadable(word))
    if override.is_hydra_override():
        raise ConfigError(
            f"{word}: Hydra's own settings have no effect here: run.dir says where a run is written, "
            "--config-dir adds a folder of settings, --multirun sweeps"
        )
    if not override.is_delete() and not value:
        null = f", or {key}=null" if setting_type(key) is None or _may_be_null(key) else ""
        raise ConfigError(f"{word} is empty, as a shell's unset variable is: give a value{null}")
    if value.strip("'\"") == "???":
        raise ConfigError(f"{word} gives no value: give one, or leave {key} out for its default")
    if value.lower() == "null" and setting_type(key) is str:
        raise ConfigError(f"{word}: {key} is a text: leave it out, or write '{key}=\"{value}\"'")
    if setting_type(key) == list[dict[str, Any]] and not override.is_sweep_override():
        _refuse_unlisted(word, override.value())
    if not override.is_delete() and not override.is_sweep_override():
        _refuse_bare(word, override.key_or_group, override.value())
    if value == "None" and _may_be_null(key):
        raise ConfigError(f"{word} sets the text `None`; for no value write {key}=null")
    return override


def _refuse_unlisted(word: str, value: Any) -> None:
    """ConfigError, with the list of functions that was meant, for a value that is none."""
    given = value if isinstance(value, list) else [] if value in (None, "none", "None") else [value]
    if given is value and all(isinstance(each, dict) for each in given):
        return
    shown = [each if isinstance(each, dict) else {"fn": each} for each in given]
    listed = ", ".join("{" + ", ".join(f"{k}: {v}" for k, v in each.items()) + "}" for each in shown)
    key = word.partition("=")[0]
    raise ConfigError(f"{word}: {key} is a list of {{fn: NAME, settings}}: write '{key}=[{listed}]'")


def _refuse_bare(word: str, key: str, value: Any) -> None:
    """ConfigError, with a dictionary to paste, for something else where one is wanted."""
    kind, above = setting_type(key), key.rpartition(".")[0]
    named, within = is_dataclass(kind) and key.startswith(NAMED), mapping_type(kind)
    wanted = above and (named or within or above == "reward.parts")
    if not wanted or isinstance(value, dict) or (value is None and _may_be_null(key)):
        return
    text = value if isinstance(value, str) else ""
    if "${" in text:  # of a file of settings, resolved later
        return
    held = text if re.fullmatch(r"[\w./-]+", text) else quote(text) if text else "..."
    chooses = key.startswith("reward.parts") or key.rpartition(".")[2] in ("judge", "rule", "plan")
    first = (
        "task" if named or f"{key}." in NAMED else "path" if ".py" in text else "fn" if chooses else "NAME"
    )
    form = f"{{{first}: {held}}}"
    form = f"{{NAME: {form}}}" if f"{key}." in (*NAMED, "reward.parts.") else form
    raise ConfigError(f"{word}: {key} is a dictionary of settings: write '{key}={form}'")


def _unreadable(word: str) -> str:
    """Why Hydra's grammar does not take a word, in the user's terms, and what to write."""
    key, equals, value = word.partition("=")
    name = key.lstrip("+~")
    if not equals or not KEY.fullmatch(key):
        return (
            f"`{word}` is no setting, which is key=value without spaces around `=`. {_guess(name)}".rstrip()
        )
    kind = setting_type(name)
    if kind in (int, float, bool):
        return f"{word}: {key} is {'true or false' if kind is bool else 'a number'}, and {value!r} is none"
    if spelt := spell(key, value):
        return f"{word} has characters that must stand in quotes: write {spelt}"
    return (
        f"{word} cannot be read: look for a bracket or quote without its partner, and put each text of other "
        """characters than letters, digits and _ - . / in double quotes, as in '{fn: math, text: "a, b"}'"""
    )


def _guess(name: str) -> str:
    """The setting, or the choice of a group, that a word without a value may mean."""
    chosen = next(conf_folder().glob(f"*/{name}.yaml"), None) if name.isidentifier() else None
    if chosen:
        return f"Did you mean `{chosen.parent.name}={name}`?"
    near = difflib.get_close_matches(name.partition("=")[0], setting_names(), n=1)
    return f"Did you mean `{near[0]}=VALUE`?" if near else ""


def spell(key: str, value: str) -> str:
    """The word, quoted for a shell, that gives `key` the text `value`; empty where `key` takes no text."""
    kind, text = setting_type(key.lstrip("+~")), _bare(value)
    if kind == list[str]:
        inner = value[1:-1] if value.startswith("[") and value.endswith("]") else value
        quoted = f"[{','.join(quote(_bare(each.strip())) for each in inner.split(','))}]"
    elif kind in (str, str | None) or (kind is Any and not text.startswith(("{", "["))):
        # a shell expands ~ at the start of a word only
        quoted = quote(os.path.expanduser(text) if text.startswith("~") else text)
    else:
        return ""
    return shlex.quote(f"{key}={quoted}")


def quote(text: str) -> str:
    return QuotedString(text, Quote.double).with_quotes()


def _bare(text: str) -> str:
    """Without quotes around it, one of which a shell may have taken."""
    return text[1:].removesuffix(text[0]) if text[:1] in ("'", '"') else text


def setting_type(path: str) -> Any:
    """What the schema declares at `path`, Any within a free dictionary; None if there is no such setting."""
    node: Any = Config
    for part in path.split("."):
        if is_dataclass(node):
            node = next((f.type for f in fields(node) if f.name == part), None)
        elif mapping := mapping_type(node):
            node = get_args(mapping)[1]
        elif node is not Any and get_origin(node) is not list:
            return None
        else:
            return Any
    return node


def mapping_type(kind: Any) -> Any:
    """The type of a dictionary that a setting is, or may be beside null; None where it is none."""
    kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    return next((one for one in kinds if get_origin(one) is dict), None)


def _may_be_null(key: str) -> bool:
    kind = setting_type(key.lstrip("+~"))
    return isinstance(kind, UnionType) and type(None) in get_args(kind)


def setting_names(schema: Any = Config, prefix: str = "") -> Iterator[str]:
    """Every setting and section by its dotted path."""
    for f in fields(schema):
        yield prefix + f.name
        if is_dataclass(f.default_factory):
            yield from setting_names(f.default_factory, f"{prefix}{f.name}.")


# What a word means.


def refuse_unknown(words: Sequence[str], given: Sequence[Override], own: Sequence[Path]) -> None:
    """ConfigError for a word that adds what there is no place for, or takes away what is always there.

    Hydra says nothing of either.
    """
    for word, override in zip(words, given, strict=True):
        path = override.key_or_group
        group = any((folder / path).is_dir() for folder in (conf_folder(), *own))
        if override.is_delete() and path in Config.__dataclass_fields__ and not group:
            raise ConfigError(f"{word} has no effect: leave {path} out to have its default")
        if not (override.is_add() or override.is_force_add()) or any((f / path).is_dir() for f in own):
            continue
        if (conf_folder() / path).is_dir():
            raise ConfigError(f"{word}: {path} has a choice already, so leave out the +: {word.lstrip('+')}")
        if setting_type(path) is None:
            raise ConfigError(f"{word}: there is no setting `{path}`. {_guess(path)}".rstrip())


def read_line_breaks(tree: DictConfig, given: Sequence[Override]) -> None:
    r"""Have `\n` mean a line break, and `\\n` a backslash and an n, in each of `TEXTS` that a word gives.

    Hydra leaves both as they are typed. A YAML file has its own rules, which were applied as it was read.
    """
    for override in given:
        if not override.is_delete():
            for path, text in _texts(override.key_or_group, override.value()):
                OmegaConf.update(tree, path, text)


def _texts(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _texts(f"{path}.{name}", inner)
    elif TEXTS.fullmatch(path) and isinstance(value, str):
        yield path, _line_breaks(value)
    elif TEXTS.fullmatch(path) and isinstance(value, list):
        yield path, [_line_breaks(each) if isinstance(each, str) else each for each in value]


def _line_breaks(text: str) -> str:
    return re.sub(r"(\\+)n", lambda m: "\n" if len(m[1]) == 1 else m[0][1:], text)


# What Hydra, OmegaConf and YAML say.

_SAID = re.compile(r"full_key:|reference_type=|object_type=|To append to|Search path:|provider=|$")
"""The beginning of a line that helps nobody here."""


def explain(error: Exception, words: Sequence[str], folders: Sequence[Path] = ()) -> str:
    """What they say of a setting or of a file in one of `folders`, in a sentence, and what to write."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        file = Path(error.problem_mark.name)
        return explain_yaml(file, file.read_text(errors="replace") if file.is_file() else "", error)
    whole = "\n".join(str(e) for e in (error, error.__cause__) if e)
    lines = [line.strip() for line in whole.splitlines()]
    said = ": ".join(dict.fromkeys(line.rstrip(":.") for line in lines if not _SAID.match(line)))
    found = re.search(r"full_key: (\S+)", whole) or re.search(r"Could not override '([^']+)'", whole)
    key = found[1] if found else ""
    if isinstance(error, MissingConfigException) and "/" in (error.missing_cfg_file or ""):
        group, _, wanted = str(error.missing_cfg_file).rpartition("/")  # of a list, Hydra gives no options
        there = [f.stem for folder in (conf_folder(), *folders) for f in (folder / group).glob("*.yaml")]
        choices = nearest(wanted, there) if there else "write `override /data: countdown`"
        return f"{_place(whole, key, folders)}{first_line(error).rstrip('.')}: {choices}"
    named = "" if key in said else f" ({key})"
    return f"{_place(whole, key, folders)}{said or repr(error)}{named}. {_remedy(key, said, words)}".rstrip()


def _place(said: str, key: str, folders: Sequence[Path]) -> str:
    """The own file that an error is about, and the line of the key in it where that can be seen."""
    named = re.search(r"In '([^']+/[^']+)'", said)  # of a group: train.yaml is ours
    file = next((f for folder in folders if named and (f := folder / f"{named[1]}.yaml").is_file()), None)
    if file is None:
        return ""
    name = re.escape(key.rpartition(".")[2])
    lines = enumerate(file.read_text(errors="replace").splitlines(), 1)
    line = next((f", line {n}" for n, text in lines if key and re.search(rf"\b{name}\s*:", text)), "")
    return f"{file}{line}: "


_KNOWN = {
    "No match in the defaults list": "A group of yours is +GROUP=NAME; a file says `override /data: NAME`",
    "Multiple values for": "Leave out the +; a file says `override /data: NAME`, with the slash",
    "force-add of config groups": "Leave out the ++, or write one + for a group of yours",
    "Config group override must be": "Leave {key} out to keep its choice; a number is quoted, 'GROUP=\"3\"'",
    "does not support deletion": "Leave {key} out to have its default",
    "HydraConfig was not set": "`hydra:` is not there: ${{oc.env:PWD}} is the working directory",
    "maximum recursion depth": "The defaults of a file lead back to itself: leave one out",
    "not a subclass of Part": "Give the part whole, 'data.parts.NAME={{task: ...}}'",
    "not a subclass of EvaluationSet": "Give the set whole, 'evaluate.sets.NAME={{task: ...}}'",
}
"""What Hydra says -> what to write."""


def _beside(key: str) -> list[str]:
    """The settings of the part or set that `key` is of, which `setting_names` cannot know."""
    section = key.rpartition(".")[0]
    kind = setting_type(section) if key.startswith(NAMED) else None
    return [f"{section}.{f.name}" for f in fields(kind)] if is_dataclass(kind) else []


def _remedy(key: str, said: str, words: Sequence[str]) -> str:
    """What to write in place of what was said of `key`; empty if nobody knows."""
    given = [w for w in words if f"{key}.".startswith(w.partition("=")[0].lstrip("+~") + ".")]
    word = max(given, key=lambda w: len(w.partition("=")[0]), default="")
    value, kind = word.partition("=")[2], setting_type(key)
    near = difflib.get_close_matches(key, [*_beside(key), *setting_names()], n=1, cutoff=0.6)
    known = next((remedy for said_so, remedy in _KNOWN.items() if said_so in said), "")
    if ("nterpolation" in said or "${" in said) and not known:
        return "${oc.env:NAME} is a variable of the environment, ${run.name} another setting"
    if key.startswith(NAMED) and "not in struct" in said and kind is not Any:
        return f"Give it whole first, '{'.'.join(key.split('.')[:3])}={{task: ...}}'"
    if kind is None and near and not key.startswith(near[0]):
        return f"Did you mean `{near[0]}`?"
    if known:
        return known.format(key=key or "KEY")
    if kind is Any and "not in" in said:
        return f"To add it write +{word.lstrip('+') or key}"
    if kind is int and re.fullmatch(r"[0-9.]+(e[0-9]+)?", value) and float(value).is_integer():
        return f"Write {key}={int(float(value))}"
    if kind == list[str] and word:
        return f"It is a list: {f'{key}=[]' if value in ('', 'null') else spell(key, value)}"
    return ""
