"""An evaluation as JSON, on the terminal, and against another one."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from entroray.errors import ConfigError
from entroray.metrics.confidence_interval import Difference, paired_difference
from entroray.observe.console import Terminal, plain_table, wide_terminal

Found = Mapping[str, Any]
"""The JSON that `entroray eval` writes (entroray/evaluation/summary.py)."""
TEXTS = yaml.safe_load(Path(__file__).with_name("evaluation.yaml").read_text(encoding="utf-8"))
SCORES = ("ece", "brier", "auroc")
SAMPLING = ("samples", "temperature", "top_p", "top_k", "max_tokens")
"""The settings that an evaluation drew its answers with."""
APART = (
    "the two share no prompt: give both one data.task, data.settings and data.heldout, or one set of "
    "evaluate.sets by one name and template"
)


def evaluation_json(found: Found) -> str:
    """JSON, one line for each part."""
    lines = [f"{json.dumps(name)}: {json.dumps(value, allow_nan=False)}" for name, value in found.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def load_evaluation(path: Path) -> Found:
    """An evaluation that was kept; ConfigError if the file is none."""
    try:
        found: Found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is no evaluation: {error}") from error
    if not isinstance(found, dict) or not found.keys() & {"each", "sets"}:
        raise ConfigError(f"{path} is no evaluation: make one with entroray eval --out={path}")
    return found


def ks(found: Found, curve: str) -> list[int]:
    """The k of `curve` (pass@, pass^, maj@), rising; none where it was not measured."""
    return sorted(int(name.removeprefix(curve)) for name in found["each"] if name.startswith(curve))


def number(found: Found, name: str) -> str:
    """`mean [low high]`, or a dash."""
    if name not in found:
        return "-"
    low, high = found["intervals"][name]
    return f"{found[name]:.3f} [{low:.3f} {high:.3f}]"


def head(found: Found) -> str:
    """The prompts, samples and temperature, in one line."""
    drawn = f"{found['samples']} samples, temperature {found['temperature']:g}"
    prompts = "prompts" if "task" in found else "held-out prompts"
    left = f"; LEFT OUT: {found['left_out']}" if found.get("left_out") else ""
    return f"{found['prompts']} {prompts} x {drawn}; 95 % over prompts{left}"


def named_parts(found: Found) -> dict[str, Found]:
    """What was evaluated: the held-out prompts, called "", where there are any, and each set by name."""
    return ({"": found} if "each" in found else {}) | found.get("sets", {})


def accuracy(found: Found) -> list[list[str]]:
    """Rows of pass@k, pass^k and maj@k, under a head of their k."""
    columns = ks(found, "pass@")
    rows = [[f"{curve}k", *(number(found, f"{curve}{k}") for k in columns)] for curve in TEXTS["curves"]]
    return [["", *(f"k={k}" for k in columns)], *(row for row in rows if set(row[1:]) != {"-"})]


def calibration(found: Found) -> list[list[str]]:
    """Rows of ECE, Brier score and AUROC of each confidence, under their head."""
    value = lambda kind, name: found["metrics"].get(f"calibration/{kind}_{name}")
    form = lambda x: "-" if x is None else f"{x:.3f}"
    rows = [[name, *(form(value(kind, name)) for kind in SCORES)] for name in found["calibration"]]
    return [["confidence", "ECE", "Brier", "AUROC"], *rows]


def lines(found: Found) -> list[str]:
    """A line each: greedy, parts, CoT-decoding, entropy, diversity, failures."""
    mean = next(name for name in found["each"] if name.startswith("avg@"))
    greedy = f"greedy {number(found, 'greedy')}, " if "greedy" in found else ""
    text = [f"{greedy}{mean} {number(found, mean)}"]
    for name, part in found.get("domains", {}).items():
        text.append(f"{name}: greedy {part['greedy']:.3f}, {mean} {part[mean]:.3f}")
    if cot := found.get("cot"):
        chosen = ", ".join(f"{name} {number(found, key)}" for key, name in TEXTS["decoded"].items())
        lost = ", ".join(f"{n} {why}" for why, n in cot["lost"].items())
        counted = f"{cot['located']} of {cot['paths']} paths have a gap"
        text.append(f"CoT-decoding {chosen}; {counted}" + (f" ({lost})" if lost else ""))
    if entropy := found.get("entropy"):
        text.append(
            f"entropy {entropy['entropy/mean']:.4f} nats a token (p50 {entropy['entropy/p50']:.4f}, "
            f"p95 {entropy['entropy/p95']:.4f}), varentropy {entropy['varentropy/mean']:.4f} nats²"
        )
    m = found["metrics"]
    names = {"distinct/2": "distinct-2", "answers/distinct": "answers a prompt", "length/mean": "tokens"}
    text.append(", ".join(f"{title} {m[key]:.3f}" for key, title in names.items() if key in m))
    if found["failed"]:
        reasons = ", ".join(f"{n} {why}" for why, n in found["failed"].items())
        text.append(f"FAILED, counted as wrong: {reasons}")
    return [line for line in text if line]


def show_evaluation(found: Found) -> None:
    """The evaluation on the terminal."""
    terminal = wide_terminal()
    terminal.print(found["model"], highlight=False, markup=False, soft_wrap=True)
    for name, part in named_parts(found).items():
        title = f"\n{name}: {part['task']}, {head(part)}" if name else head(part)
        terminal.print(title, highlight=False, markup=False, soft_wrap=True)
        terminal.print(plain_table(accuracy(part)))
        for line in lines(part):
            terminal.print(line, markup=False, soft_wrap=True)
        if part["calibration"]:
            terminal.print(plain_table(calibration(part)))


def compare(first: Found, second: Found) -> dict[str, Difference]:
    """Every accuracy that both have, on the prompts that both answered; ConfigError where there is none."""
    a, b = first["each"], second["each"]
    at = {prompt: i for i, prompt in enumerate(b["id"])}
    pairs = [(i, at[prompt]) for i, prompt in enumerate(a["id"]) if prompt in at]
    if not pairs:
        raise ConfigError(APART)
    one, other = np.array(pairs).T
    column = lambda each, name, rows: np.array(each[name], np.float64)[rows]
    return {n: paired_difference(column(a, n, one), column(b, n, other)) for n in a if n in b and n != "id"}


def differing_settings(first: Found, second: Found) -> list[str]:
    """The settings of sampling in which two evaluations differ, with both values."""
    form = lambda x: f"{x:g}" if isinstance(x, int | float) else str(x)
    pairs = ((name, first[name], second[name]) for name in SAMPLING)
    return [f"{name} {form(a)} and {form(b)}" for name, a, b in pairs if a != b]


def show_comparison(first: Found, second: Found) -> None:
    """The second against the first on the terminal: held-out prompts, and the sets that both have.

    ConfigError where the two share no prompt of any.
    """
    parts, others = named_parts(first), named_parts(second)
    both = [name for name in parts if name in others and share_prompts(parts[name], others[name])]
    if not both:
        raise ConfigError(APART)
    terminal = wide_terminal()
    terminal.print(f"first      {first['model']}\nsecond     {second['model']}", markup=False, soft_wrap=True)
    for name in both:
        _show_difference(terminal, name, parts[name], others[name])
    for name in sorted({*parts, *others} - {*both}):
        said = f"evaluate.sets.{name}" if name else "held-out prompts"
        terminal.print(f"{said}: not compared, no prompt is in both", markup=False, soft_wrap=True)


def share_prompts(first: Found, second: Found) -> set[str]:
    """Ids of the prompts that both answered."""
    return {*first["each"]["id"]} & {*second["each"]["id"]}


def _show_difference(terminal: Terminal, name: str, first: Found, second: Found) -> None:
    rows = [
        [metric, f"{d.first:.3f}", f"{d.second:.3f}", f"{d.mean:+.3f} [{d.low:+.3f} {d.high:+.3f}]", d.sign]
        for metric, d in compare(first, second).items()
    ]
    terminal.print(plain_table([[name, "first", "second", "difference", ""], *rows]))
    shared = len(share_prompts(first, second))
    terminal.print(f"{shared} prompts; {TEXTS['compared']}", markup=False, soft_wrap=True)
    if different := differing_settings(first, second):
        terminal.print(f"settings differ: {', '.join(different)}", markup=False, soft_wrap=True)
