"""`{fn: name, **settings}` -> a function of a slot, checked before anything starts."""

import importlib
import inspect
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from entroray.errors import ConfigError, nearest

F = TypeVar("F", bound=Callable)
KINDS: dict[Any, tuple[Any, str]] = {
    float: ((float, int), "a number"),
    int: (int, "a whole number"),
    str: (str, "text"),
    bool: (bool, "true or false"),
    types.NoneType: (types.NoneType, "null"),
    dict: (dict, "a mapping"),
}


@dataclass(frozen=True)
class Limit:
    """What a number must also be, beside being one, and the unit it is in."""

    text: str
    holds: Callable[[float], bool]
    unit: str = ""


Positive = Annotated[float, Limit("above 0", lambda x: x > 0)]
NonNegative = Annotated[float, Limit("at least 0", lambda x: x >= 0)]
AboveOne = Annotated[float, Limit("above 1", lambda x: x > 1)]
Count = Annotated[int, Limit("above 0", lambda x: x > 0, "count")]
Fraction = Annotated[float, Limit("a fraction in (0, 1], not a percentage", lambda x: 0 < x <= 1, "fraction")]
Probability = Annotated[float, Limit("a probability in [0, 1]", lambda x: 0 <= x <= 1, "probability")]
Nats = Annotated[float, Limit("in nats, at least 0", lambda x: x >= 0, "nats")]
Deviations = Annotated[float, Limit("in standard deviations, above 0", lambda x: x > 0, "deviations")]
Epsilon = Annotated[float, Limit("a distance of the ratio from 1, above 0", lambda x: x > 0, "epsilon")]
EpsilonBelow = Annotated[
    float, Limit("a distance of the ratio below 1, in (0, 1]", lambda x: 0 < x <= 1, "epsilon")
]
RatioBound = Annotated[float, Limit("a ratio, above 0", lambda x: x > 0, "ratio bound")]
RatioBelowOne = Annotated[float, Limit("a ratio in (0, 1]", lambda x: 0 < x <= 1, "ratio bound")]
RatioAboveOne = Annotated[float, Limit("a ratio above 1", lambda x: x > 1, "ratio bound")]
LogRatioBound = Annotated[float, Limit("a log-ratio in nats, above 0", lambda x: x > 0, "log-ratio bound")]


@dataclass(frozen=True)
class Traits:
    """What a function cannot do without and how it behaves, as `declare` explains; by default nothing."""

    needs: frozenset[str] = frozenset()
    min_group: int = 1
    live: bool = False
    idle_at_one: bool = False
    reads_selected: bool = False
    siblings: bool = False
    uniform_advantage: Callable[..., tuple[float, float]] | None = None
    needs_uniform_groups: bool = False
    before: Mapping[str, Callable] = field(default_factory=dict)


def traits(choice: Callable) -> Traits:
    """Those of a function, bound or not, as it declares them."""
    fn = choice.func if isinstance(choice, partial) else choice
    return vars(fn).get("traits", Traits())


def declare(
    *,
    needs: Iterable[str] = (),
    min_group: int = 1,
    live: bool = False,
    idle_at_one: bool = False,
    reads_selected: bool = False,
    siblings: bool = False,
    uniform_advantage: Callable[..., tuple[float, float]] | None = None,
    needs_uniform_groups: bool = False,
    before: Mapping[str, Callable] = types.MappingProxyType({}),
) -> Callable[[F], F]:
    """Write on a function its `Traits`: what it cannot do without and how it behaves.

    `needs`: `ref_logprobs`, `entropy_grad` (the live entropy's gradient), `whole_step` (statistics over all
    tokens of a step), or a key of `Tokens.extra`; `{setting}` in it stands for that setting's value.
    `min_group`: fewest rollouts per prompt it makes sense for. `live`: a shape of the current policy, applied
    again, detached, inside the update. `idle_at_one`: does nothing while r = 1. `reads_selected`: uses what
    `select` chose. `siblings`: a plan whose responses share tokens. `alike`: its settings -> A in a group of
    answers all wrong, and in one all right (rewards 0 and 1 where nothing else is said); undeclared it gives
    none. `lives_on_alike`: pointless without such groups. `before`: step statistics it reads in
    `Tokens.extra`, each a function of the step's tokens and the same settings, computed before the update.
    """

    declared = Traits(
        needs=frozenset(needs),
        min_group=min_group,
        live=live,
        idle_at_one=idle_at_one,
        reads_selected=reads_selected,
        siblings=siblings,
        uniform_advantage=uniform_advantage,
        needs_uniform_groups=needs_uniform_groups,
        before=before,
    )

    def mark(fn: F) -> F:
        vars(fn)["traits"] = declared
        return fn

    return mark


def function_name(bound: partial) -> str:
    """The name of a bound function."""
    return bound.func.__name__


def effective_settings(bound: partial) -> dict[str, Any]:
    """A bound function's settings, defaults included."""
    return {name: p.default for name, p in keyword_settings(bound.func).items()} | bound.keywords


def bind(slot: types.ModuleType, spec: object, packages: Iterable[str] = ()) -> partial:
    """The slot's function `spec["fn"]`, or a dotted path inside an allowed package, settings applied."""
    place = slot_setting(slot)
    if not isinstance(spec, Mapping) or not isinstance(spec.get("fn"), str):
        raise ConfigError(f"{place} must read {{fn: name, setting: value, ...}}, got {spec!r}")
    name, settings = spec["fn"], {k: v for k, v in spec.items() if k != "fn"}
    fn = _imported(slot, name, packages) if "." in name else _listed(slot, name)
    check_settings(place, fn.__name__, fn, settings)
    return partial(fn, **settings)


def slot_functions(slot: types.ModuleType) -> dict[str, Callable]:
    """The functions a slot's module defines itself."""
    return {
        name: fn
        for name, fn in vars(slot).items()
        if inspect.isfunction(fn) and fn.__module__ == slot.__name__ and not name.startswith("_")
    }


def slot_name(slot: types.ModuleType) -> str:
    return slot.__name__.rpartition(".")[2]


def slot_setting(slot: types.ModuleType) -> str:
    """Where a slot is set: its module's `SETTING`, else `objective.<slot>`."""
    return getattr(slot, "SETTING", f"objective.{slot_name(slot)}")


def _listed(slot: types.ModuleType, name: str) -> Callable:
    functions = slot_functions(slot)
    if name not in functions:
        raise ConfigError(f"{slot_setting(slot)} has no `{name}`: {nearest(name, functions)}")
    return functions[name]


def _imported(slot: types.ModuleType, path: str, packages: Iterable[str]) -> Callable:
    """A function that the module in `path` itself defines, and that takes what the slot's own take."""
    place, (module_name, _, attribute) = slot_setting(slot), path.rpartition(".")
    allowed = ("entroray", *packages)
    if not any(module_name == p or module_name.startswith(f"{p}.") for p in allowed):
        raise ConfigError(f"{place}: `{path}` is outside the allowed packages {', '.join(allowed)}")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(f"{place}: `{path}` cannot be imported: {error}") from error
    fn = vars(module).get(attribute)
    if not inspect.isfunction(fn) or fn.__module__ != module.__name__:
        raise ConfigError(f"{place}: `{module_name}` defines no function `{attribute}`")
    arity = _positional(next(iter(slot_functions(slot).values())))
    if _positional(fn) != arity:
        raise ConfigError(f"{place}: `{path}` must take {arity} positional argument(s); the rest by keyword")
    return fn


def _positional(fn: Callable) -> int:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in kinds for p in inspect.signature(fn).parameters.values())


def check_settings(place: str, name: str, fn: Callable, settings: Mapping[str, Any]) -> None:
    """ConfigError where `fn`, which is chosen as `name`, does not take `settings` or needs others."""
    takes = keyword_settings(fn)
    for key, value in settings.items():
        if key not in takes and _takes_any(fn):
            continue
        if key not in takes:
            raise ConfigError(f"{place}: `{name}` has no setting `{key}`: {nearest(key, takes)}")
        if wanted := _complaint(value, takes[key].annotation):
            raise ConfigError(f"{place}: `{name}.{key}` must be {wanted}, got {value!r}")
    for key, parameter in takes.items():
        if parameter.default is inspect.Parameter.empty and key not in settings:
            raise ConfigError(f"{place}: `{name}` needs `{key}`, which has no default")


def _takes_any(fn: Callable) -> bool:
    """Whether `fn` has `**settings` of its own, which it checks itself."""
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(fn).parameters.values())


def keyword_settings(fn: Callable) -> dict[str, inspect.Parameter]:
    """A function's settings: its keyword-only parameters."""
    parameters = inspect.signature(fn, eval_str=True).parameters.values()
    return {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}


def _complaint(value: object, hint: Any) -> str:
    """What `value` should have been to satisfy `hint`; empty when it does."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        limits = (x for x in inner[1:] if isinstance(x, Limit))
        wrong = _complaint(value, inner[0])
        return wrong or next((x.text for x in limits if not x.holds(value)), "")  # type: ignore[arg-type]
    if origin is Literal:
        return "" if value in inner else f"one of {', '.join(map(str, inner))}"
    if origin in (Union, types.UnionType):
        wrongs = [_complaint(value, option) for option in inner]
        return "" if "" in wrongs else " or ".join(wrongs)
    if hint not in KINDS:
        return ""
    accepted, name = KINDS[hint]
    return "" if isinstance(value, accepted) and isinstance(value, bool) == (hint is bool) else name
