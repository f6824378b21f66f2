"""A function chosen by name and given its settings, or an error that names the nearest right one."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from entroray.errors import ConfigError
from entroray.reward.extract import nearest


def made(spec: Mapping[str, Any], choices: Mapping[str, Callable[..., Any]], where: str) -> Any:
    """What the one of `choices` called `fn` in `spec` makes of the other settings there.

    Raises ConfigError for an unknown name, an unknown or missing setting, or one of the wrong type.
    """
    settings = dict(spec)
    name = settings.pop("fn", None)
    if name not in choices:
        raise ConfigError(f"{where}.fn={name!r} is unknown; {nearest(str(name), list(choices))}")
    make = choices[name]
    _check(f"{where}.", name, settings, inspect.signature(make).parameters)
    return make(**settings)


def _check(
    where: str, name: str, settings: Mapping[str, Any], known: Mapping[str, inspect.Parameter]
) -> None:
    for key, value in settings.items():
        if key not in known:
            raise ConfigError(f"{where}{key} is no setting of fn={name!r}; {nearest(key, list(known))}")
        if not isinstance(value, known[key].annotation):
            kind = known[key].annotation.__name__
            raise ConfigError(f"{where}{key}={value!r} is a {type(value).__name__}, not a {kind}")
    missing = [k for k, p in known.items() if p.default is p.empty and k not in settings]
    if missing:
        raise ConfigError(f"{where}fn={name!r} needs {', '.join(f'{where}{k}' for k in missing)}")
