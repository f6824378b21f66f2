"""A function from a user's own file: a judge, or a tool."""

import importlib
import importlib.util
import inspect
import itertools
import os
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from entroray.errors import ConfigError
from entroray.types import Prompt


def absolute(path: str) -> str:
    """`file.py:function` wherever it is read from."""
    file, _, name = path.rpartition(":")
    return f"{Path(os.path.expanduser(file)).resolve()}:{name}" if file else path


def load_function(path: str, setting: str) -> Callable[[str, Prompt], Any]:
    """The function at `file.py:function`; raises ConfigError saying which part of `setting` is wrong."""
    file, _, name = path.rpartition(":")
    if not file or not name.isidentifier():
        raise ConfigError(f"{setting}={path!r} is not of the form my_file.py:my_function")
    source = Path(os.path.expanduser(file)).resolve()
    if not source.is_file():
        raise ConfigError(f"{setting}={path!r}: there is no file {source}")
    if source.suffix != ".py":
        raise ConfigError(f"{setting}={path!r}: its name must end in .py to be loaded")
    function = getattr(_module(source, setting), name, None)
    if not callable(function):
        raise ConfigError(f"{setting}={path!r}: {source} defines no function {name!r}")
    if inspect.iscoroutinefunction(function):
        raise ConfigError(f"{setting}={path!r}: {name} is async; it must be a plain function")
    try:
        signature = inspect.signature(function)
        signature.bind("response", "prompt")
    except (TypeError, ValueError) as error:
        takes = f"{name}{inspect.signature(function)}" if isinstance(error, TypeError) else name
        raise ConfigError(
            f"{setting}={path!r}: {name} must take (text, prompt), and is {takes}: {error}; give what "
            "else it takes a default, or call it from a function of these two"
        ) from error
    if [*signature.parameters][:1] == ["prompt"]:
        raise ConfigError(
            f"{setting}={path!r}: {name} is called with (text, prompt), in this order: swap them"
        )
    return function


def _module(source: Path, setting: str) -> ModuleType:
    """The file as a module that finds what lies beside it, as a script does, and what its package has.

    Its folders stay on `sys.path`, for what its functions import later.
    """
    packages = list(itertools.takewhile(lambda folder: (folder / "__init__.py").is_file(), source.parents))
    for folder in (source.parent, packages[-1].parent if packages else source.parent):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    try:
        if not packages:
            return _loaded(source)
        top = _loaded(packages[-1] / "__init__.py", [str(packages[-1])])
        inner = source.relative_to(packages[-1]).with_suffix("").parts
        return importlib.import_module(".".join([top.__name__, *inner]))
    except SyntaxError as error:
        place = f"{error.filename or source}:{error.lineno}"
        raise ConfigError(
            f"{setting}: {source} cannot be loaded: {place}: SyntaxError: {error.msg}"
        ) from error
    except BaseException as error:  # boundary: user code, loaded where no Ctrl-C comes; the file is wrong
        raise ConfigError(f"{setting}: {source} cannot be loaded: {error!r}") from error


def _loaded(source: Path, folders: list[str] | None = None) -> ModuleType:
    """A file, or a package's, under a name that no other module has: it may be called `math.py`."""
    name = f"entroray_user_{source.stem}_{zlib.crc32(bytes(source)):08x}"
    spec = importlib.util.spec_from_file_location(name, source, submodule_search_locations=folders)
    if spec is None or spec.loader is None:
        raise ImportError(f"{source} is not a Python file")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # where dataclasses look for it
    try:
        spec.loader.exec_module(module)
    except BaseException:  # boundary: raised again; what is half loaded is not left to others
        del sys.modules[name]
        raise
    return module
