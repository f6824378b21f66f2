"""What a part of the proof writes: one JSON with the card, the versions, every number and a verdict a check.

A part is a list of steps. What a step found is written when it ends, and a later call of the same commit on
the same card runs only what is missing, so that a part that ran out of its time goes on.
"""

import argparse
import hashlib
import importlib
import json
import os
import platform
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).with_name("results")
SEED = 0
PACKAGES = ("triton", "transformers", "vllm", "ray", "deepspeed", "liger-kernel", "accelerate", "numpy")
RIGHT, WRONG, BROKE = "right", "WRONG", "BROKE"
MEASURED = "measured"
"""A number that nothing is asked of."""
NOT_THERE = "not there"
"""What the check calls is not in this checkout, or its package is not installed."""
NOT_HERE = "not here"
"""Only a card can show it."""


class Check(NamedTuple):
    """One thing looked at."""

    name: str
    verdict: str
    numbers: Mapping[str, Any] = {}
    """By name with its unit, as seen; raw."""
    why: str = ""
    """What was asked, or what went wrong."""


class NotThereError(Exception):
    """Something of entroray or of a package that this checkout or this machine has not."""


class Asked(NamedTuple):
    """What the steps of a part are given."""

    device: torch.device
    dry: bool
    """Tiny shapes on the CPU."""

    @property
    def card(self) -> bool:
        """Whether they run on a GPU."""
        return self.device.type == "cuda"


Step = Callable[[Asked], Iterable[Check]]


def measured(name: str, **numbers: Any) -> Check:
    """Numbers that nothing is asked of."""
    return Check(name, MEASURED, numbers)


def at_most(name: str, limit: float, **numbers: float) -> Check:
    """Whether every number is at most `limit`; one that is none is not."""
    held = all(value <= limit for value in numbers.values())
    return Check(name, RIGHT if held else WRONG, numbers, f"each at most {limit:g}")


def holds(name: str, true: bool, why: str, **numbers: Any) -> Check:
    """Whether what `why` says is so."""
    return Check(name, RIGHT if true else WRONG, numbers, why)


def not_here(name: str, why: str) -> Check:
    """A check that needs a card."""
    return Check(name, NOT_HERE, {}, why)


def there(module: str, *names: str) -> Any:
    """The module, or what it calls `names`; NotThereError where it has not got them."""
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise NotThereError(f"{module}: {error}") from error
    for name in names:
        if not hasattr(found, name):
            raise NotThereError(f"{module} has no {name}")
    own = [getattr(found, name) for name in names]
    return found if not names else own[0] if len(own) == 1 else own


def main(part: str, about: str, steps: Mapping[str, Step]) -> None:
    """Run what is missing of `steps`, as the command line asks; exits 1 if a check is wrong or broke."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--dry", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--again", action="store_true", help="although it was run on this card and commit")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON")
    parser.add_argument("--only", default="", help="steps whose names have this in them")
    given = parser.parse_args()
    if given.dry and given.results.resolve() == RESULTS.resolve():
        parser.error("--dry writes into a folder of its own: name one with --results")
    if not given.dry and not torch.cuda.is_available():
        parser.error("no CUDA device is here: --dry runs every part on the CPU")
    asked = Asked(torch.device("cpu" if given.dry else "cuda"), given.dry)
    record = Record(part, about, [*steps], given.results, asked, again=given.again)
    for name, step in steps.items():
        if given.only in name and name not in record.steps:
            record.run(name, step)
    sys.exit(record.close())


class Record:
    """The JSON of one part on one card."""

    def __init__(
        self, part: str, about: str, planned: Sequence[str], folder: Path, asked: Asked, *, again: bool
    ) -> None:
        self.asked = asked
        self.head = {"part": part, "about": about, **identity(asked), "planned": [*planned]}
        slug = re.sub(r"[^a-z0-9]+", "-", str(self.head["card"]).lower()).strip("-")
        self.path = folder / f"{part}-{slug}.json"
        kept = None if again else _read(self.path)
        same = kept is not None and all(kept[key] == self.head[key] for key in ("commit", "source", "card"))
        self.steps: dict[str, dict[str, Any]] = kept["steps"] if kept and same else {}
        # What broke may be no fault of its own, for after an illegal access nothing more runs in a process;
        # what was not there may have been copied since.
        open_ = lambda step: any(check["verdict"] in (BROKE, NOT_THERE) for check in step["checks"])
        self.steps = {n: step for n, step in self.steps.items() if n in planned and not open_(step)}
        if done := len(self.steps):
            print(f"part {part}: {done} of {len(planned)} steps were run on this card and commit", flush=True)

    def run(self, name: str, step: Step) -> None:
        """Run one step and write what it found."""
        torch.manual_seed(SEED)
        began = time.perf_counter()
        checks: list[Check] = []
        try:
            for check in step(self.asked):
                checks.append(check)
                _show(self.head["part"], check)
        except NotThereError as error:
            checks.append(Check(name, NOT_THERE, {}, str(error)))
            _show(self.head["part"], checks[-1])
        except Exception as error:  # boundary: what broke is what the proof is to tell
            where = traceback.format_exc().strip().splitlines()[-8:]
            checks.append(Check(name, BROKE, {}, f"{type(error).__name__}: {error}"[:2000]))
            _show(self.head["part"], checks[-1])
            print("\n".join(where), file=sys.stderr, flush=True)
        seconds = round(time.perf_counter() - began, 3)
        self.steps[name] = {"seconds": seconds, "checks": [check._asdict() for check in checks]}
        self._write()
        if self.asked.card:
            torch.cuda.empty_cache()  # raises behind an illegal access, and the next call goes on

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        whole = self.head | {"steps": self.steps}
        beside = self.path.with_suffix(".part")
        beside.write_text(json.dumps(whole, indent=1, allow_nan=True) + "\n")
        beside.rename(self.path)

    def close(self) -> int:
        """The exit code."""
        verdicts = [c["verdict"] for step in self.steps.values() for c in step["checks"]]
        return int(any(v in (WRONG, BROKE) for v in verdicts))


def identity(asked: Asked) -> dict[str, Any]:
    """What ran, and on what."""
    card = torch.cuda.get_device_properties(0) if asked.card else None
    return {
        "card": card.name if card else "no card",
        "memory_gib": round(card.total_memory / 2**30, 1) if card else None,
        "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        **{name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "commit": _said("git", "rev-parse", "HEAD") or os.environ.get("PROOF_COMMIT", "none"),
        "source": source_hash(),
        "seed": SEED,
        "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        "dry": asked.dry,
    }


def source_hash() -> str:
    """Of all code that a part may run: a checkout may differ from its commit, or come without one."""
    files = sorted([*ROOT.glob("entroray/**/*.py"), *ROOT.glob("tests/gpu/*.py")])
    found = hashlib.sha256()
    for path in files:
        found.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return found.hexdigest()[:16]


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _said(*command: str) -> str:
    """First line that a program prints; nothing if it is not here."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip().partition("\n")[0] if done.returncode == 0 else ""


def _show(part: Any, check: Check) -> None:
    print(f"{part}  {check.verdict:<9}  {check.name}: {numbers(check.numbers) or check.why}", flush=True)


def numbers(found: Mapping[str, Any]) -> str:
    """As they are printed: four digits, names without underscores."""
    return ", ".join(f"{name.replace('_', ' ')} {_short(value)}" for name, value in found.items())


def _short(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(_short, value)) + "]"
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)
