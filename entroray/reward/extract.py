"""Rules that find the answer inside a response; each returns None where there is none."""

import re
from collections.abc import Callable
from typing import Literal

from entroray.errors import ConfigError, nearest

Rule = Callable[[str], str | None]
Extract = Literal["boxed", "after", "answer_tag", "last_line", "response"]


def response(text: str) -> str | None:
    """The response itself, stripped."""
    return text.strip() or None


_CLOSING = re.compile(r"(?:\\[\])]|\$\$|```|~~~|</[A-Za-z]\w*>)+")


def last_line(text: str) -> str | None:
    """The last line that says something, stripped: what closes a formula, a fence or a tag does not."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = [line for line in lines if not _CLOSING.fullmatch(line)]
    return next(reversed(said or lines), None)


def after(text: str, *, marker: str) -> str | None:
    """Everything behind the last `marker`, stripped; text after the answer makes it another answer."""
    _, found, rest = text.rpartition(marker)
    return (rest.strip() or None) if found else None


def answer_tag(text: str) -> str | None:
    """What stands between the last `<answer>` and its `</answer>`, stripped; an open tag holds nothing."""
    before, closed, _ = text.rpartition("</answer>")
    inside = before.rpartition("<answer>")[2] if closed and "<answer>" in before else ""
    return inside.strip() or None


_TOKENS = re.compile(r"(\\+(?:boxed|fbox)\s*\{)|(\{)|(\})|(\\+(?:boxed|fbox)(?![A-Za-z]))|\\.", re.DOTALL)
_UNBRACED = re.compile(r"\s*([-+]?(?:\d|\\[A-Za-z])(?:[^\s${}]|\{[^{}]*\})*)")


def boxed(text: str) -> str | None:
    r"""What the last `\boxed{...}` holds, with its nested braces; an unclosed box holds nothing.

    A box in a box is a part of it. `\boxed {4}`, `\boxed 4` and `\fbox{4}` are boxes too.
    """
    opened, last, found = list[int](), -1, None
    boxes: set[int] = set()
    for token in _TOKENS.finditer(text):
        box, brace, closing, bare = token.groups()
        if box or brace:
            opened.append(token.end())
        if box:
            last = token.end()
            boxes.add(last)
        elif closing and opened and (start := opened.pop()) in boxes:
            found = (start, token.start())
        elif bare and (inside := _UNBRACED.match(text, token.end())):
            last, found = inside.start(1), inside.span(1)
    if found is None or not found[0] <= last <= found[1]:
        return None
    return text[slice(*found)].strip() or None


def rule(name: str, marker: str) -> Rule:
    """The rule called `name`; raises ConfigError naming the nearest one, or when `after` has no marker."""
    if name == "after":
        if not marker:
            raise ConfigError("a judge's extract: after needs its marker, for example '####'")
        return lambda text: after(text, marker=marker)
    rules: dict[str, Rule] = {
        "response": response,
        "last_line": last_line,
        "boxed": boxed,
        "answer_tag": answer_tag,
    }
    if name not in rules:
        raise ConfigError(f"a judge's extract={name!r} is unknown; {nearest(name, [*rules, 'after'])}")
    return rules[name]
