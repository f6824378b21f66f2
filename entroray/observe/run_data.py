"""What report.html says of a run, as JSON: in words, its curves, events and settings."""

import fcntl
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml

from entroray.config import Config
from entroray.errors import DataError, EntrorayError
from entroray.metrics import health
from entroray.objective import build_objective
from entroray.observe.health_tracker import TOO_EARLY, health_lines
from entroray.observe.journal import plain
from entroray.observe.run_files import read_metrics
from entroray.rows import objective_names, objective_row

PLOTS = yaml.safe_load(Path(__file__).with_name("plots.yaml").read_text(encoding="utf-8"))
EVENTS, FIELDS = 500, 400
"""Newest events that are shown, and characters of the fields of each."""
NUMBERS = 100_000
"""Most values of metrics on a page: a longer run is drawn in means of several steps."""
LARGEST = 1e300
"""A number of JSON beyond it is no measurement; one of 400 digits is no float."""
Found = dict[str, Any]


def run_data(run_dir: Path) -> Found:
    """The page's data but for tokens. What is missing or damaged in the folder is a line of `notes`."""
    notes: list[str] = []
    events = _read(run_dir / "events.jsonl", read_metrics, notes, "nothing is known of faults and restarts")
    steps = _read(run_dir / "metrics.jsonl", read_metrics, notes, "there are no curves")
    config = _read(run_dir / "config.yaml", _yaml, notes, "its settings are unknown")
    manifest = _read(run_dir / "manifest.json", _yaml, notes, "its machine and versions are unknown")
    metrics = [
        {k: v for k, v in m.items() if isinstance(v, int | float) and abs(v) < LARGEST} for m in steps or []
    ]
    events, config, manifest = events or [], config or {}, manifest or {}
    running = is_held(run_dir)
    if starting := running and not metrics:
        notes[:] = [note for note in notes if "is damaged" in note]  # nothing is missing yet
    objective = _section(config, "objective")
    advised = _flat(config) | {"objective": objective, "control": _moved(config)}
    found = _said(lambda: health.read_health(metrics, advised))
    _, prediction, law = _said(lambda: health_lines(metrics, advised)) or ("", "", "")
    return {
        "name": "/".join(str(n) for n in (_section(config, "run").get("name"), run_dir.resolve().name) if n),
        "running": running,
        "starting": starting,
        "heldout": {name: _heldout(run_dir / f"eval-{name}.json", events) for name in ("before", "after")},
        "health": asdict(found) if found else {"kind": "too early", "words": TOO_EARLY},
        "prediction": prediction,
        "law": law,
        "objective": _objective_name(objective),
        "equation": _said(lambda: build_objective(objective).describe()) or _text(objective),
        "metrics": columns([*evaluated_before(events), *metrics]),
        "events": [_event(e) for e in events[-EVENTS:]],
        "settings": _settings(config),
        "manifest": manifest,
        "plots": PLOTS,
        "notes": notes,
    }


def _read(path: Path, read: Callable[[Path], Any], notes: list[str], consequence: str) -> Any:
    """What `read` makes of a file; None, and why in `notes`, where it is missing or damaged."""
    try:
        if path.exists():
            return read(path)
        notes.append(f"Nothing from {path.name}: {consequence}.")
    except (OSError, ValueError, DataError, yaml.YAMLError) as error:
        notes.append(f"{path.name} is damaged, so {consequence}: {error}")
    return None


def _yaml(path: Path) -> Found:
    """A mapping of YAML, and so of JSON; ValueError if the file holds anything else."""
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError("it holds no mapping")
    return found


def _heldout(path: Path, events: Sequence[Found]) -> Found:
    """Shares and prompts of an evaluation at the end; empty without one, or where the run went on since."""
    kinds = [e for e in events if e.get("kind") in ("start", "trained")]
    try:
        ended = datetime.fromisoformat(kinds[-1]["time"]).timestamp()
        found = json.loads(path.read_bytes()) if kinds[-1]["kind"] == "trained" else {}
        if path.stat().st_mtime < ended - 1 or not isinstance(found.get("prompts"), int):
            return {}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}
    shares = {n: v for n, v in found.items() if n in ("greedy", "prompts") or str(n).startswith("pass@")}
    return {n: v for n, v in shares.items() if type(v) in (int, float) and abs(v) < LARGEST}


def _said(make: Callable[[], Any]) -> Any:
    """What `make` makes; None of settings that another program or another version wrote."""
    try:
        return make()
    except (EntrorayError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError):
        return None


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Found:
    """Settings by dotted name; lists are whole."""
    found: Found = {}
    for name, value in settings.items():
        nested = isinstance(value, dict) and value
        found |= _flat(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return found


def _moved(config: Mapping[str, Any]) -> list[str]:
    given = _section(config, "control").values()
    return [c["knob"] for c in given if isinstance(c, dict) and c.get("knob")]


def _section(config: Mapping[str, Any], name: str) -> Found:
    found = config.get(name)
    return found if isinstance(found, dict) else {}


def _text(value: Any) -> str:
    return json.dumps(plain(value), ensure_ascii=False, sort_keys=True)


def _settings(config: Mapping[str, Any]) -> list[list[str]]:
    """Name, value and default of each, in an objective that of its nearest row; empty where there is none."""
    default = _texts(asdict(Config()))
    if row := _nearest_row(_section(config, "objective")):
        default |= {f"objective.{name}": text for name, text in _rows()[row].items()}
    return [[name, _text(value), default.get(name, "")] for name, value in _flat(config).items()]


def _nearest_row(objective: Mapping[str, Any]) -> str:
    """The row of conf/objective that differs least from `objective`; empty without one."""
    given, rows = _texts(objective).items(), _rows()
    return min(rows, key=lambda name: len(given ^ rows[name].items())) if given else ""


@cache
def _rows() -> dict[str, dict[str, str]]:
    return {name: _texts(objective_row(name)) for name in objective_names()}


def _texts(settings: Mapping[str, Any]) -> dict[str, str]:
    return {name: _text(value) for name, value in _flat(settings).items()}


def _objective_name(objective: Mapping[str, Any]) -> str:
    """The nearest row, and what is not as in it."""
    if not (name := _nearest_row(objective)):
        return "an unknown objective"
    given, row = _texts(objective), _rows()[name]
    others = [f"{k}={given.get(k, 'none')}" for k in sorted({k for k, _ in given.items() ^ row.items()})]
    return name if not others else f"{name} but for {', '.join(others)}"


def is_held(run_dir: Path) -> bool:
    """Whether a run holds the lock of its folder."""
    try:
        with (run_dir / ".lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _words(value: Any) -> str:
    if isinstance(value, dict) and value:
        return f"({', '.join(f'{name} {_words(each)}' for name, each in value.items())})"
    return f"{value:.5g}" if isinstance(value, float) else value if isinstance(value, str) else _text(value)


def _event(event: Found) -> Found:
    fields = _section(event, "fields")
    text = " · ".join(f"{name} {_words(value)}" for name, value in fields.items() if name != "step")
    return {
        "time": str(event.get("time", "")),
        "kind": str(event.get("kind", "")),
        "step": fields.get("step") if isinstance(fields.get("step"), int) else None,
        "fields": text if len(text) <= FIELDS else f"{text[:FIELDS]} …",
        "health": str(fields.get("health", "")),
    }


def evaluated_before(events: Sequence[Found]) -> list[Found]:
    """The evaluation that preceded the first step, which is an event."""
    told = [
        e["fields"] for e in events if e.get("kind") == "evaluation" and isinstance(e.get("fields"), dict)
    ]
    return [{k: v for k, v in fields.items() if isinstance(v, int | float)} for fields in told[-1:]]


def columns(metrics: Sequence[Found], least: int = 1) -> Found:
    """`steps`, `values` by name, and how many steps, `every`, a value is the mean of: `least` or more."""
    names = sorted({name for m in metrics for name in m} - {"step"})
    every = max(least, -(-len(metrics) * len(names) // NUMBERS))
    of_bin = lambda m: -(-m.get("step", 0) // every)  # by step: those of two runs are of the same steps
    bins = [[*b] for _, b in groupby(metrics, of_bin)]
    values = {name: [_mean(m.get(name) for m in b) for b in bins] for name in names}
    at = [b[-1].get("step", 0) for b in bins]
    return {"steps": at, "values": values, "every": every, "last": at[-1] if at else 0}


def _mean(values: Iterator[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return float(f"{sum(known) / len(known):.5g}") if known else None
