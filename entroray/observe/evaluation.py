"""An evaluation as JSON, on the terminal, and against another one."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from entroray.errors import ConfigError
from entroray.metrics.confidence_interval import Difference, paired_difference
from entroray.observe.console import plain_table, wide_terminal

Found = Mapping[str, Any]
"""The JSON that `entroray eval` writes (entroray/evaluation/summary.py)."""
TEXTS = yaml.safe_load(Path(__file__).with_name("evaluation.yaml").read_text(encoding="utf-8"))
SCORES = ("ece", "brier", "auroc")
SAMPLING = ("samples", "temperature", "top_p", "top_k", "max_tokens")
"""The settings that an evaluation drew its answers with."""


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
    if not isinstance(found, dict) or "each" not in found:
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
    return f"{found['prompts']} held-out prompts x {drawn}; 95 % over prompts"


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
    text = [f"greedy {number(found, 'greedy')}, {mean} {number(found, mean)}"]
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
    terminal.print(f"{found['model']}\n{head(found)}", highlight=False, markup=False, soft_wrap=True)
    terminal.print(plain_table(accuracy(found)))
    for line in lines(found):
        terminal.print(line, markup=False, soft_wrap=True)
    if found["calibration"]:
        terminal.print(plain_table(calibration(found)))


def compare(first: Found, second: Found) -> dict[str, Difference]:
    """Every accuracy that both have, on the prompts that both answered; ConfigError where there is none."""
    a, b = first["each"], second["each"]
    at = {prompt: i for i, prompt in enumerate(b["id"])}
    pairs = [(i, at[prompt]) for i, prompt in enumerate(a["id"]) if prompt in at]
    if not pairs:
        raise ConfigError("the two share no prompt: give both one data.task, data.settings and data.heldout")
    one, other = np.array(pairs).T
    column = lambda each, name, rows: np.array(each[name], np.float64)[rows]
    return {n: paired_difference(column(a, n, one), column(b, n, other)) for n in a if n in b and n != "id"}


def differing_settings(first: Found, second: Found) -> list[str]:
    """The settings of sampling in which two evaluations differ, with both values."""
    form = lambda x: f"{x:g}" if isinstance(x, int | float) else str(x)
    pairs = ((name, first[name], second[name]) for name in SAMPLING)
    return [f"{name} {form(a)} and {form(b)}" for name, a, b in pairs if a != b]


def show_comparison(first: Found, second: Found) -> None:
    """The second against the first on the terminal."""
    found = compare(first, second)
    shared = len({*first["each"]["id"]} & {*second["each"]["id"]})
    rows = [
        [name, f"{d.first:.3f}", f"{d.second:.3f}", f"{d.mean:+.3f} [{d.low:+.3f} {d.high:+.3f}]", d.sign]
        for name, d in found.items()
    ]
    terminal = wide_terminal()
    terminal.print(f"first      {first['model']}\nsecond     {second['model']}", markup=False, soft_wrap=True)
    terminal.print(plain_table([["", "first", "second", "difference", ""], *rows]))
    terminal.print(f"{shared} prompts; {TEXTS['compared']}", markup=False, soft_wrap=True)
    if different := differing_settings(first, second):
        terminal.print(f"settings differ: {', '.join(different)}", markup=False, soft_wrap=True)
