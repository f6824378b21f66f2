"""A function chosen by name and given its settings, or an error that names the nearest right one."""

from collections.abc import Callable, Mapping
from typing import Any

from entroray.binding import check_settings
from entroray.errors import ConfigError, nearest


def build_choice(spec: Mapping[str, Any], choices: Mapping[str, Callable[..., Any]], where: str) -> Any:
    """What the one of `choices` called `fn` in `spec` makes of the other settings there.

    Raises ConfigError for an unknown name, an unknown or missing setting, or one of the wrong type.
    """
    settings = dict(spec)
    name = settings.pop("fn", None)
    if name not in choices:
        raise ConfigError(f"{where}.fn={name!r} is unknown; {nearest(name, choices)}")
    check_settings(where, name, choices[name], settings)
    return choices[name](**settings)
