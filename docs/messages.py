"""The typed errors, and every sentence that is raised as one, read from the package's source."""

import ast
import inspect
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

from docs.generated import table
from entroray import errors

ROOT = Path(__file__).parents[1]
HOLE = re.compile("‹[^›]*›")
"""What is filled in when a message is raised: its name in the source, or …."""
VERBS = """
add allow begin build choose compare copy delete download draw drop entroray export free give go have
install jq leave let lower look make mend move name pip put raise reinstall rename run save
say set start stop swap sweep take train unset update use wait widen write
"""
REMEDY = re.compile(rf"(?:: |; (?:then )?|\. )(?=(?:{'|'.join(VERBS.split())})\b)", re.IGNORECASE)
"""What stands before a remedy, which says what to do."""


def typed() -> list[type[errors.EntrorayError]]:
    """Every typed error, by exit code."""
    kinds = [kind for kind in vars(errors).values() if inspect.isclass(kind)]
    return sorted((kind for kind in kinds if issubclass(kind, errors.EntrorayError)), key=first_code)


def error_classes() -> str:
    """Every typed error with its exit code and what it says of itself."""
    told = [(_exit_codes(kind), f"`{kind.__name__}`", inspect.getdoc(kind) or "") for kind in typed()]
    return table(("exit code", "error", "meaning"), told)


def _exit_codes(kind: type[errors.EntrorayError]) -> str:
    return "130 or 143" if kind is errors.Stopped else str(kind.exit_code)


def first_code(kind: type[errors.EntrorayError]) -> int:
    """The exit code of an error, the lower of two."""
    return 130 if kind is errors.Stopped else kind.exit_code


def error_messages() -> str:
    """Every sentence that the package raises as a typed error, from its source: what is wrong, what to do."""
    text = ""
    for kind in typed():
        found = sorted({said for name, said in messages() if name == kind.__name__}, key=str.lower)
        if found:
            text += f"## {kind.__name__}\n\nExit code {_exit_codes(kind)}. {inspect.getdoc(kind)}\n\n"
            text += table(("what is wrong", "what to do"), map(_remedy, found), "cards messages") + "\n"
    return text


def _remedy(said: str) -> tuple[str, str]:
    """A message cut before its remedy; all of it on the left where none is set off."""
    found = REMEDY.search(said)
    return (_literal(said[: found.start()]), _literal(said[found.end() :])) if found else (_literal(said), "")


def _literal(text: str) -> str:
    """Text as it is, whatever marks it holds; what is filled in when it is raised is ‹named›."""
    return re.sub(r"([\\*_<>$\[\]`{}|#~])", r"\\\1", text)


@cache
def messages() -> tuple[tuple[str, str], ...]:
    """(error, its message) of every `raise` in the package whose message is written there."""
    return tuple(found for file in sorted((ROOT / "entroray").rglob("*.py")) for found in _raised(file))


def _raised(file: Path) -> Iterator[tuple[str, str]]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    names = {kind.__name__ for kind in typed()}
    known = {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name) and isinstance(node.value.value, str)
    }
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id=name), args=[*_, last]) if name in names:
                said = _said(last, known).strip()
                if re.search(r"[a-z]{2,} [a-z]", HOLE.sub("", said)):
                    yield name, said


def _said(node: ast.AST, known: Mapping[str, str]) -> str:
    """The text of an expression; what only a run knows is ‹the name it has there›, or ‹…›."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(_said(part, known) for part in parts)
        case ast.BinOp(left=left, right=right):
            return _said(left, known) + _said(right, known)
        case ast.FormattedValue(value=value):
            return _said(value, known)
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return known.get(name, f"‹{name.lower().replace('_', ' ').strip()}›")
        case _:
            return "‹…›"
