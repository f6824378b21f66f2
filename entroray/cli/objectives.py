"""`entroray objectives`: the rows and slots there are; `show`: the equation some settings amount to."""

import inspect
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, get_args, get_origin

from entroray.binding import Limit, effective_settings, function_name, keyword_settings, slot_functions
from entroray.cli import flags
from entroray.cli.flags import CONFIG_DIR
from entroray.errors import ConfigError
from entroray.objective import Objective, build_objective, check_group_size, why_scored
from entroray.objective.compatibility import Schedule, remarks
from entroray.objective.objective import MANY, SLOTS
from entroray.rows import conf_folder, objective_names, objective_row
from entroray.wiring import compose
from entroray.wiring.objective import objective_schedule, remark_lines
from entroray.wiring.parts import build_parts

BASE = "grpo"
"""The row that the others are told apart from."""
FLAGS = (CONFIG_DIR,)


def main(arguments: list[str]) -> int:
    """`objectives [show overrides | table]`; `show` gives 2 where the combination is refused."""
    if not arguments:
        print("\n".join(_listing()))
        return 0
    if arguments == ["table"]:
        print(table())
        return 0
    if arguments[0] != "show":
        raise ConfigError(f"objectives takes nothing, `table`, or `show objective=NAME ...`, got {arguments}")
    given, overrides = flags.parse_flags("objectives show", arguments[1:], FLAGS)
    config, _ = compose.load_config(overrides, given.get("config-dir"))
    parts = build_parts(config)
    objective = parts.objective
    check_group_size(objective, config.rollout.group_size)
    lines = [*objective.describe().splitlines(), *_numbers(objective), *remark_lines(config, parts)]
    print("\n".join(lines))
    return 2 if any(r.kind == "refused" for r in remarks(objective, objective_schedule(config, parts))) else 0


def _numbers(objective: Objective) -> Iterator[str]:
    """Every number in effect with what it must be."""
    for choice in objective.choices():
        for name, parameter in keyword_settings(choice.func).items():
            value = effective_settings(choice)[name]
            limit = find_limit(parameter.annotation)
            yield f"  {function_name(choice)}.{name} = {value}" + (f" ({limit.text})" if limit else "")


def find_limit(hint: object) -> Limit | None:
    """What a setting's annotation says of its value, beside its type."""
    if get_origin(hint) is Annotated:
        return next((x for x in get_args(hint)[1:] if isinstance(x, Limit)), None)
    return next(filter(None, map(find_limit, get_args(hint))), None)


def _units(objective: Objective) -> str:
    """Setting and unit, for the numbers of a row that have one."""
    found = {
        f"{name}: {limit.unit}": None
        for choice in objective.choices()
        for name, parameter in keyword_settings(choice.func).items()
        if (limit := find_limit(parameter.annotation))
        and limit.unit
        and effective_settings(choice)[name] is not None
    }
    return ", ".join(found)


def _listing() -> Iterator[str]:
    yield "rows (objective=NAME), each a YAML of conf/objective:"
    for name in objective_names():
        yield f"  {name:<28}{head(name)[0]}"
    yield "\nslots, each a file of entroray/objective:"
    for slot, module in SLOTS.items():
        many = " (a list)" if module in MANY else ""
        yield f"  {slot + many}"
        for fn, function in slot_functions(module).items():
            yield f"    {fn:<26}{(inspect.getdoc(function) or '').splitlines()[0]}"


def head(name: str) -> tuple[str, str]:
    """(first sentence, what it does to entropy) of the comment at the head of a row."""
    text = Path(conf_folder(), "objective", f"{name}.yaml").read_text()
    lines = [x.lstrip("# ") for x in itertools.takewhile(lambda x: x.startswith("#"), text.splitlines())]
    lines = [x for x in lines if not x.startswith("@package")]
    summary, _, entropy = " ".join(lines).partition("Entropy: ")
    first = re.split(r"(?<!et al)(?<!Dr)\. ", summary)[0]
    return first.rstrip(". "), entropy


def table() -> str:
    """The rows as a Markdown table: what each chooses otherwise than `grpo`."""
    lines = [
        "| row | what it is | otherwise than `grpo` | units | entropy | without effect | scored for |",
        "|---|---|---|---|---|---|---|",
    ]
    return "\n".join(lines + [_line(name) for name in objective_names()])


def _line(name: str) -> str:
    spec, base = objective_row(name), objective_row(BASE)
    changed = [f"{slot}: {_brief(given)}" for slot, given in spec.items() if given != base[slot]]
    objective = build_objective(spec)
    idle = [r.text for r in remarks(objective, Schedule(1, 0)) if r.kind == "inert"]
    what, entropy = head(name)
    told = f"`{name}`", what, "; ".join(changed), _units(objective), entropy, "; ".join(idle)
    cells = (*told, why_scored(objective))
    return "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"


def _brief(given: object) -> str:
    if isinstance(given, list):
        return ", ".join(map(_brief, given)) or "none"
    assert isinstance(given, dict)
    numbers = [f"{k} {v}" for k, v in given.items() if k != "fn"]
    return f"{given['fn']}" + (f" ({', '.join(numbers)})" if numbers else "")
