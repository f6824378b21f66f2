"""`{fn: name, setting: value, ...}` -> a function of a slot, checked before anything starts.

A slot is a module of functions that take the same positional arguments and their settings by keyword. `fn`
names one of them, or by dotted path a function in one of the user's own `packages`: the same in every slot.
"""

import importlib
import inspect
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
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


Condition = bool | Callable[..., bool]
"""True or False, or a function of the settings, by keyword, that says which."""


COLUMNS = frozenset({"logprobs", "old_logprobs", "entropy", "varentropy", "ref_logprobs"})
"""Fields of `Tokens` that are known only once the policy has read the tokens."""


@dataclass(frozen=True)
class Traits:
    """What a function needs and how it behaves: the table of traits is in entroray/objective/README.md.

    `declare` writes them on a function, and every guard reads them; `Condition`s may depend on its settings.
    """

    needs: frozenset[str] = frozenset()
    reads: frozenset[str] | None = None
    min_group: int = 1
    neutral: Condition = False
    caveat: str = ""
    drops_uniform_groups: bool = False
    uniform_advantage: Callable[..., tuple[float, float]] | None = None
    weighs: Callable[..., float] | None = None
    needs_uniform_groups: bool = False
    in_deviations: Condition = False
    compares_siblings: bool = False
    live: bool = False
    by_token: Condition = False
    steers_entropy: Condition = False
    reads_selected: bool = False
    wants_deviations: bool = False
    rollout_tolerance: Callable[..., float] | None = None
    anchor: Literal["old", "sampler"] = "old"
    per_rollout: bool = False
    shares_gradient: bool = False
    idle_at_one: bool = False
    restrains: bool = False
    counts_kept: bool = False
    before: Mapping[str, Callable] | Callable[..., Mapping[str, Callable]] = field(default_factory=dict)
    siblings: bool = False
    misfit: Callable[..., str] | None = None
    ready: Callable[..., None] | None = None


def traits(choice: Callable) -> Traits:
    """Those of a function, bound or not, as it declares them."""
    fn = choice.func if isinstance(choice, partial) else choice
    return vars(fn).get("traits", Traits())


def holds(choice: partial, trait: str) -> bool:
    """Whether a bound function has a trait that may depend on its settings."""
    condition: Condition = getattr(traits(choice), trait)
    return condition if isinstance(condition, bool) else bool(condition(**effective_settings(choice)))


def declare(**given: Any) -> Callable[[F], F]:
    """Write `Traits` on a function; `needs` and `reads` may be any iterable.

    TypeError for a trait that there is not; ValueError for `reads` that names no column.
    """
    sets: dict[str, Any] = {k: frozenset(given[k]) for k in ("needs", "reads") if k in given}
    if unknown := sets.get("reads", COLUMNS) - COLUMNS:
        raise ValueError(f"reads={sorted(unknown)}: choose among {', '.join(sorted(COLUMNS))}")
    declared = replace(Traits(), **given | sets)

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


def bind(
    slot: types.ModuleType | Sequence[types.ModuleType],
    spec: object,
    packages: Iterable[str] = (),
    place: str | None = None,
    beside: Sequence[str] = (),
) -> partial:
    """The function `spec["fn"]` of a slot, one module or several, with its settings applied.

    ConfigError names the setting (`place`, by default the slot's own), the nearest right name, `beside` being
    those that whoever calls takes himself, and the remedy.
    """
    slots = [slot] if isinstance(slot, types.ModuleType) else list(slot)
    place = place or slot_setting(slots[0])
    if not isinstance(spec, Mapping) or not isinstance(spec.get("fn"), str):
        raise ConfigError(f"{place} must read {{fn: name, setting: value, ...}}, got {spec!r}")
    name, settings = spec["fn"], {k: v for k, v in spec.items() if k != "fn"}
    functions = {fn: function for module in slots for fn, function in slot_functions(module).items()}
    if "." in name:
        fn = _import_function(place, name, packages)
        _check_signature(place, name, fn, list(functions.values()))
    elif name in functions:
        fn = functions[name]
    else:
        raise ConfigError(f"{place} has no `{name}`: {nearest(name, functions)}")
    check_settings(place, fn.__name__, fn, settings, beside)
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


def _import_function(place: str, path: str, packages: Iterable[str]) -> Callable:
    """The function that the module in `path`, of an allowed package, itself defines."""
    module_name, _, attribute = path.rpartition(".")
    allowed = ("entroray", *packages)
    if not any(module_name == p or module_name.startswith(f"{p}.") for p in allowed):
        raise ConfigError(
            f"{place}: `{path}` is outside the allowed packages {', '.join(allowed)}: say "
            f"packages=[{path.partition('.')[0]}] if it is yours"
        )
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # boundary: user code; whatever it raises, it cannot be used
        raise ConfigError(
            f"{place}: `{path}` cannot be imported: {error!r}; its folder must be on PYTHONPATH of every node"
        ) from error
    functions = slot_functions(module)
    if attribute not in functions:
        raise ConfigError(
            f"{place}: `{module_name}` defines no function `{attribute}`: {nearest(attribute, functions)}"
        )
    return functions[attribute]


def _check_signature(place: str, path: str, fn: Callable, slot: Sequence[Callable]) -> None:
    """ConfigError if `fn` is not called as the functions of the slot are."""
    alike = [own for own in slot if len(positional_arguments(own)) == len(positional_arguments(fn))]
    if not alike:
        expected = " or ".join(sorted({f"({', '.join(positional_arguments(own))})" for own in slot}, key=len))
        raise ConfigError(
            f"{place}: `{path}` takes ({', '.join(positional_arguments(fn))}) by position and must take "
            f"{expected}, as `{slot[0].__name__}` does; its settings come by keyword, behind a `*`"
        )
    if inspect.iscoroutinefunction(fn) != inspect.iscoroutinefunction(alike[0]):
        kind = "async def" if inspect.iscoroutinefunction(alike[0]) else "a plain def"
        raise ConfigError(f"{place}: `{path}` must be {kind}, as `{alike[0].__name__}` is")


def positional_arguments(fn: Callable) -> list[str]:
    """Names of what a function takes by position."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in inspect.signature(fn).parameters.values() if p.kind in kinds]


def check_settings(
    place: str, name: str, fn: Callable, settings: Mapping[str, Any], beside: Sequence[str] = ()
) -> None:
    """ConfigError if `fn`, which is chosen as `name`, does not take `settings` or needs others."""
    takes = keyword_settings(fn)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(fn).parameters.values())
    for key, value in settings.items():
        if key not in takes and takes_any:
            continue
        if key not in takes:
            raise ConfigError(f"{place}: `{name}` has no setting `{key}`: {nearest(key, [*takes, *beside])}")
        if wanted := complaint(value, takes[key].annotation):
            quotes = ", in double quotes" if wanted.startswith("text") else ""
            raise ConfigError(f"{place}: `{name}.{key}` must be {wanted}{quotes}, got {value!r}")
    for key, parameter in takes.items():
        if parameter.default is inspect.Parameter.empty and key not in settings:
            raise ConfigError(f"{place}: `{name}` needs `{key}`, which has no default")


def keyword_settings(fn: Callable) -> dict[str, inspect.Parameter]:
    """A function's settings: its keyword-only parameters."""
    parameters = inspect.signature(fn, eval_str=True).parameters.values()
    return {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}


def complaint(value: object, hint: Any) -> str:
    """What `value` should have been to satisfy `hint`; empty if it does."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        limits = (x for x in inner[1:] if isinstance(x, Limit))
        wrong = complaint(value, inner[0])
        return wrong or next((x.text for x in limits if not x.holds(value)), "")  # type: ignore[arg-type]
    if origin is Literal:
        return "" if value in inner else f"one of {', '.join(map(str, inner))}"
    if origin in (Union, types.UnionType):
        wrongs = [complaint(value, option) for option in inner]
        return "" if "" in wrongs else " or ".join(wrongs)
    if origin in (Sequence, list):
        if not isinstance(value, list | tuple):
            return "a list"
        return next((f"a list, each {wrong}" for x in value if (wrong := complaint(x, inner[0]))), "")
    if (hint := origin or hint) not in KINDS:
        return ""
    accepted, name = KINDS[hint]
    fits = isinstance(value, accepted) and isinstance(value, bool) == (hint is bool) and value == value
    return "" if fits else name  # NaN, which differs from itself, is no number
