"""Rules that find the answer inside a response; each returns None where there is none."""

from collections.abc import Callable

from entroray.errors import ConfigError, nearest

Rule = Callable[[str], str | None]


def response(text: str) -> str | None:
    """The response itself, stripped."""
    return text.strip() or None


def last_line(text: str) -> str | None:
    """The last line that is not blank, stripped."""
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else None


def after(text: str, *, marker: str) -> str | None:
    """Everything behind the last `marker`, stripped; text after the answer makes it another answer."""
    _, found, rest = text.rpartition(marker)
    return (rest.strip() or None) if found else None


def boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}`, with its nested braces; an unclosed box holds nothing."""
    opening = r"\boxed{"
    start = text.rfind(opening)
    if start < 0:
        return None
    start += len(opening)
    end = _closing_brace(text, start)
    return (text[start:end].strip() or None) if end is not None else None


def _closing_brace(text: str, start: int) -> int | None:
    depth, escaped = 1, False
    for index in range(start, len(text)):
        if escaped:
            escaped = False
            continue
        char = text[index]
        escaped = char == "\\"
        depth += (char == "{") - (char == "}")
        if depth == 0:
            return index
    return None


def rule(name: str, marker: str) -> Rule:
    """The rule called `name`; raises ConfigError naming the nearest one, or when `after` has no marker."""
    if name == "after":
        if not marker:
            raise ConfigError("reward.extract=after needs reward.marker, for example '####'")
        return lambda text: after(text, marker=marker)
    rules: dict[str, Rule] = {"response": response, "last_line": last_line, "boxed": boxed}
    if name not in rules:
        raise ConfigError(f"reward.extract={name!r} is unknown; {nearest(name, [*rules, 'after'])}")
    return rules[name]
