"""Parts of pages made from the package itself: its schema, its catalogues, its docstrings, its errors."""

import csv
import inspect
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

import entroray
from docs.equations import markdown_formula
from entroray.binding import effective_settings, function_name, keyword_settings, slot_functions
from entroray.cli import objectives, reference
from entroray.config import Config
from entroray.metrics import catalogue, remedies
from entroray.objective import Objective, build_objective
from entroray.objective.objective import MANY, SLOTS
from entroray.rows import conf_folder, objective_names
from entroray.wiring import constraints
from entroray.wiring.run_directory import resume_rule

ROOT = Path(__file__).parents[1]
RECORDS = ("token_records", "rollout_records")
NEUTRAL = {
    **{"keep if": "every group", "reward R": "verdict", "selected": "all tokens", "scale w": "1"},
    **{"correction c": "1", "penalties P": "0", "share s": "1 per token"},
}
"""Lines of an equation that change nothing, and what stands in them then."""
FORMULA = re.compile(r"^`([^`]+)`$", re.MULTILINE)


def anchor(kind: str, name: str) -> str:
    """Where something is explained on the site."""
    spelt = name.lower().replace("@", " at ").replace("^", " all ")
    return f"{kind}-{re.sub(r'[^a-z0-9]+', '-', spelt).strip('-')}"


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |\n"


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]], classes: str = "") -> str:
    """A Markdown table; of the class "cards" each row is a card on a narrow screen (static/site.css)."""
    marks = f"{{{' '.join(f'.{name}' for name in classes.split())}}}\n" if classes else ""
    return marks + _row(*head) + "|---" * len(head) + "|\n" + "".join(_row(*row) for row in rows)


def _defined(kind: str, name: str) -> str:
    return f"`{name}`{{#{anchor(kind, name)}}}"


# Objectives


def objective_rows() -> str:
    """Every row of conf/objective: what it is, its equation with the numbers in effect, its settings."""
    told = {name.strip("`"): (what, *rest) for name, what, *rest in _cells(objectives.table())}
    return "".join(_objective(name, *told[name]) for name in objective_names())


def objective_overview() -> str:
    """A table of all rows, each with one sentence."""
    link = lambda name: f"[`{name}`](#{anchor('objective', name)})"
    found = [(link(name), *objectives.head(name)) for name in objective_names()]
    return table(("objective", "what it is", "entropy"), found, "cards overview")


def _cells(table: str) -> Iterator[list[str]]:
    for line in table.splitlines()[2:]:
        yield [cell.replace("\\|", "|") for cell in line[2:-2].split(" | ")]  # "|" within a cell is escaped


def _objective(name: str, what: str, _: str, __: str, entropy: str, idle: str, scored: str) -> str:
    file = conf_folder() / "objective" / f"{name}.yaml"
    objective = build_objective(name)
    remarks = [("Entropy", entropy), ("Without effect", idle), ("Scored before the update for", scored)]
    said = "".join(f"- {label}: {text}\n" for label, text in remarks if text)
    return (
        f"({anchor('objective', name)})=\n## {name}\n\n{reference.title(file).partition(' Entropy: ')[0]}\n\n"
        f"{equation(objective)}\n{said}\n{_numbers(objective)}\n"
        f"<details><summary><code>objective={name}</code> as a file: conf/objective/{name}.yaml</summary>\n\n"
        f"```yaml\n{file.read_text()}```\n\n</details>\n\n"
    )


def equation(objective: Objective) -> str:
    """The loss and what its letters stand for, by `Objective.describe`; what changes nothing is left out."""
    lines = [(line[2:15].strip(), line[15:]) for line in objective.describe().splitlines()[1:]]
    used = {label: text for label, text in lines if NEUTRAL.get(label) != text}
    factors = "".join(f"{s} \\, " for label, s in (("correction c", "c"), ("scale w", "w")) if label in used)
    body = f"{factors}S" + (" + P" if "penalties P" in used else "")
    share = "s" if "share s" in used else ""
    inner = f"{share} \\left({body}\\right)" if share and "+" in body else f"{share} \\, {body}"
    loss = f"$$\n\\text{{loss}} = \\frac{{1}}{{D}} \\sum_{{\\text{{response tokens}}}} {inner}\n$$\n\n"
    return loss + table(
        ("", "in effect"), [(_label(label), markdown_formula(text)) for label, text in used.items()]
    )


def _label(label: str) -> str:
    """`ratio r` with its letter as in the equation."""
    if label == "denominator":
        label += " D"
    word, _, letter = label.partition(" ")
    return f"{word} ${letter}$" if len(letter) == 1 else label


def _numbers(objective: Objective) -> str:
    """Every number of a row, its setting, and what it must be."""
    found = [
        (_place(slot, module in MANY, choice, name), f"`{value}`", _must_be(choice, name))
        for slot, module in SLOTS.items()
        for choice in objective.slot(slot)
        for name, value in effective_settings(choice).items()
    ]
    return table(("setting", "value", "must be"), found, "cards") if found else ""


def _place(slot: str, many: bool, choice: partial, name: str) -> str:
    """Where a number of a row is set; in a list, whose function's it is."""
    return (
        f"`{name}` of `{function_name(choice)}` in `objective.{slot}`"
        if many
        else f"`objective.{slot}.{name}`"
    )


def _must_be(choice: partial, name: str) -> str:
    limit = objectives.find_limit(keyword_settings(choice.func)[name].annotation)
    return limit.text if limit else ""


def slot_functions_page() -> str:
    """Every function of every slot: what it does, its formula, its settings."""
    text = ""
    for slot, module in SLOTS.items():
        text += f"## {slot}{' (a list)' if module in MANY else ''}\n\n{inspect.getdoc(module)}\n\n"
        for name, function in slot_functions(module).items():
            text += f"### `{name}`\n\n{_explained(function)}\n\n"
    return text


def _explained(function: object) -> str:
    """A docstring with its formula drawn and its settings listed."""
    said = inspect.getdoc(function) or ""
    takes = keyword_settings(function)  # type: ignore[arg-type]
    drawn = lambda found: f"\n> {markdown_formula(found[1], frozenset(takes))}\n"
    given = [f"`{p.name}" + ("" if p.default is p.empty else f"={p.default}") + "`" for p in takes.values()]
    return FORMULA.sub(drawn, said) + (f"\n\nSettings: {', '.join(given)}" if given else "")


# Settings, metrics, records


def settings_tables() -> str:
    """Every setting of config.py by group, with what it must be and whether a resumption may change it."""
    text = ""
    for group, each in itertools.groupby(reference.settings(Config), lambda row: row[0].partition(".")[0]):
        rows = [
            (
                _defined("setting", path),
                f"`{default}`",
                _plain(f"{meaning} {_must(path, meaning)}".strip()),
                _resume(path),
            )
            for path, default, meaning in each
        ]
        head = ("setting", "default", "meaning", "resume")
        text += f"### {group}\n\n" + table(head, rows, "cards settings") + "\n"
    return text


def _must(path: str, meaning: str) -> str:
    """What a value must be, where its meaning does not say so already."""
    choices = [str(choice) for choice in constraints.NAMES.get(path, ())]
    bound = constraints.NUMBERS.get(path)
    words = bound.words if bound else ", ".join(choices)
    return f"({words})" if words and not (choices and all(choice in meaning for choice in choices)) else ""


def _resume(path: str) -> str:
    return {"free": "may change", "fixed": "must not change", "own": "of the command"}[resume_rule(path)[0]]


def metrics_tables() -> str:
    """The catalogue, a table a family."""
    text = ""
    for title, rows in itertools.groupby(catalogue.read_catalogue(), lambda m: catalogue.FAMILIES[m.family]):
        cells = [
            (
                _defined("metric", m.name),
                _plain(m.definition),
                m.unit,
                f"{m.over}; {m.estimator}",
                m.temperature,
            )
            for m in rows
        ]
        head = ("metric", "definition", "unit", "over; estimator", "temperature")
        text += f"## {title}\n\n" + table(head, cells, "cards metrics") + "\n"
    return text


def _columns(name: str) -> list[Mapping[str, str]]:
    with (ROOT / f"entroray/observe/{name}.tsv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def _plain(text: str) -> str:
    """Text that may hold code, but no other mark: `<` and `$` stand for themselves."""
    return re.sub(r"`[^`]*`|([<$*])", lambda found: f"\\{found[0]}" if found[1] else found[0], text)


# The health of a run


def health_signs() -> str:
    """What explains the health of a run, from remedies.tsv: the sign, from where it counts, what is tried."""
    with (ROOT / "entroray/metrics/remedies.tsv").open(encoding="utf-8", newline="") as file:
        signs = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    return table(
        ("the run is", "if", "from", "setting to try"),
        [
            (
                s["groups"].replace(" ", ", ").replace("_", " "),
                f"`{s['metric']}`",
                s["minimum"],
                _tried(s["remedies"]),
            )
            for s in signs
        ],
    )


def _tried(names: str) -> str:
    """The remedies of a sign in order, as a run that may take them is told."""
    run = {"learner.updates_per_rollout": 2, "driver.max_lag": 1, "model.dtype": "bfloat16"}
    rows = [
        {"surrogate": {"fn": "clip", "high": high}, "penalties": [{"fn": "entropy_bonus"}]}
        for high in (0.2, 0.4)
    ]
    said = (
        next(filter(None, (remedies.REMEDIES[n](run | {"objective": row}) for row in rows)))
        for n in names.split()
    )
    return "; ".join(f"`{each}`" if "=" in each else each for each in said)


# What in backticks becomes a link


def targets() -> dict[str, str]:
    """Names of settings, metrics and objectives -> the anchors where they are explained.

    `seed` and `step` may be anything: `seed=1` is the setting, and the metric `step` is not linked.
    """
    paths = [path for path, _, _ in reference.settings(Config)]
    found = {path if "." in path else f"{path}=": anchor("setting", path) for path in paths}
    for metric in catalogue.read_catalogue():
        names = [metric.name, *catalogue.expand_names(metric, {})]
        found |= {name: anchor("metric", metric.name) for name in names if re.search("[/@^]", name)}
    functions = {name for module in SLOTS.values() for name in slot_functions(module)} | set(dir(entroray))
    for name in objective_names():
        found[f"objective={name}"] = anchor("objective", name)
        if name not in functions:
            found[name] = anchor("objective", name)
    return found


def record_columns() -> dict[str, list[str]]:
    """The columns of both kinds of records."""
    return {name: [row["column"] for row in _columns(name)] for name in RECORDS}


def loop_picture() -> str:
    """The loop as SVG within the page, so that it has the page's colours, light and dark."""
    return f"<figure>\n{(ROOT / 'docs/loop.svg').read_text(encoding='utf-8')}</figure>\n"
