"""Verifiers: plain functions (response text, prompt) -> Verdict, chosen by name."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from entroray.errors import ConfigError
from entroray.reward import custom, gym, math
from entroray.reward.extract import nearest
from entroray.reward.verdicts import Judge, guarded

_CHOICES: Mapping[str, Callable[..., Judge]] = {"math": math.judge, "gym": gym.judge, "custom": custom.judge}


def build(spec: Mapping[str, Any]) -> Judge:
    """The judge that `spec` ({fn: name, setting: value, ...}) describes; imports whatever it needs now.

    Raises ConfigError for an unknown name, an unknown or missing setting, or one of the wrong type.
    """
    settings = dict(spec)
    name = settings.pop("fn", None)
    if name not in _CHOICES:
        raise ConfigError(f"reward.fn={name!r} is unknown; {nearest(str(name), list(_CHOICES))}")
    make = _CHOICES[name]
    _check(name, settings, inspect.signature(make).parameters)
    return guarded(make(**settings), f"reward.{name}")


def _check(name: str, settings: Mapping[str, Any], known: Mapping[str, inspect.Parameter]) -> None:
    for key, value in settings.items():
        if key not in known:
            raise ConfigError(f"reward.{key} is no setting of fn={name!r}; {nearest(key, list(known))}")
        if not isinstance(value, known[key].annotation):
            kind = known[key].annotation.__name__
            raise ConfigError(f"reward.{key}={value!r} is a {type(value).__name__}, not a {kind}")
    missing = [k for k, p in known.items() if p.default is p.empty and k not in settings]
    if missing:
        raise ConfigError(f"reward.fn={name!r} needs {', '.join(f'reward.{k}' for k in missing)}")
