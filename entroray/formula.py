"""A bound function -> its formula with the numbers in effect, read from its docstring.

The formula is what stands in backticks on lines of its own in the docstring. Setting names in it are
replaced by their values, a clause (after `; `) that names a null setting is left out, and `1 - 0.2` is
worked out.
"""

import inspect
import re
from functools import partial

from entroray.binding import effective_settings, function_name


def describe_formula(bound: partial) -> str:
    """One line for one choice; `name(setting=value)` where its docstring has no formula."""
    settings = effective_settings(bound)
    found = re.search(r"^`([^`]+)`$", inspect.getdoc(bound.func) or "", re.MULTILINE)
    if not found:
        return f"{function_name(bound)}({', '.join(f'{k}={v}' for k, v in settings.items())})"
    off = [name for name, value in settings.items() if value is None]
    clauses = [
        c for c in " ".join(found[1].split()).split("; ") if not any(re.search(rf"\b{n}\b", c) for n in off)
    ]
    text = re.sub(r"\w+", lambda word: _shown(settings.get(word[0], word[0])), "; ".join(clauses))
    return re.sub(r"\b1 ([+-]) (\d[\d.]*(?:e[+-]?\d+)?)", _worked_out, text)


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def _worked_out(match: re.Match) -> str:
    distance = float(match[2])
    return f"{1 + distance if match[1] == '+' else 1 - distance:g}"
