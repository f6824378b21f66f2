"""A function from a user's own file: a judge, or a tool."""

import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from entroray.errors import ConfigError
from entroray.types import Prompt


def load_function(path: str, setting: str) -> Callable[[str, Prompt], Any]:
    """The function at `file.py:function`; raises ConfigError saying which part of `setting` is wrong."""
    file, _, name = path.rpartition(":")
    if not file or not name.isidentifier():
        raise ConfigError(f"{setting}={path!r} is not of the form my_file.py:my_function")
    source = Path(file).expanduser().resolve()
    if not source.is_file():
        raise ConfigError(f"{setting}={path!r}: there is no file {source}")
    function = getattr(_module(source, setting), name, None)
    if not callable(function):
        raise ConfigError(f"{setting}={path!r}: {source} defines no function {name!r}")
    if inspect.iscoroutinefunction(function):
        raise ConfigError(f"{setting}={path!r}: {name} is async; it must be a plain function")
    try:
        inspect.signature(function).bind("response", "prompt")
    except TypeError as error:
        raise ConfigError(f"{setting}={path!r}: {name} must take (text, prompt): {error}") from error
    return function


def _module(source: Path, setting: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"entroray_user_{source.stem}", source)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{setting}: {source} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # boundary: user code; the file is what is wrong
        raise ConfigError(f"{setting}: {source} cannot be loaded: {error!r}") from error
    return module
