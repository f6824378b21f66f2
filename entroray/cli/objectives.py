"""`entroray objectives`: the rows and functions there are, and what a combination of them would do."""

import inspect
from collections.abc import Iterator

from entroray.cli import settings
from entroray.cli.reference import title
from entroray.objective import build, combinations
from entroray.objective.bind import menu
from entroray.objective.equation import MANY, SLOTS, Objective


def main(arguments: list[str]) -> int:
    """`objectives` lists rows and slots; `objectives show overrides` prints the equation in effect."""
    if arguments[:1] == ["show"]:
        config, _ = settings.load(arguments[1:])
        print("\n".join(shown(build(config.objective), config.learner.updates_per_rollout)))
        return 0
    settings.load(arguments)
    print("\n".join([*_rows(), "", *_slots()]))
    return 0


def shown(objective: Objective, updates: int) -> list[str]:
    """The equation with its numbers, then what is refused, inert or doubtful about it."""
    return [*objective.describe().splitlines(), *notes(objective, updates)]


def notes(objective: Objective, updates: int) -> list[str]:
    """A line for each thing about a row that its reader should know; none for most."""
    kinds = {
        "refused": combinations.refused(objective),
        "inert": combinations.inert(objective, updates),
        "doubtful": combinations.doubtful(objective),
    }
    return [f"{kind + ':':10}{sentence}" for kind, sentences in kinds.items() for sentence in sentences]


def _rows() -> Iterator[str]:
    yield "rows (objective=<name>)"
    for file in sorted((settings.CONF / "objective").glob("*.yaml")):
        yield f"  {file.stem:22}{title(file).partition('. ')[0].partition(': ')[0]}"


def _slots() -> Iterator[str]:
    yield "slots (objective.<slot>={fn: <name>, ...}, or a list of them)"
    for slot, module in SLOTS.items():
        yield f"  {slot}{' (several)' if module in MANY else ''}"
        for name, function in menu(module).items():
            yield f"    {name:20}{(inspect.getdoc(function) or '').splitlines()[0]}"
