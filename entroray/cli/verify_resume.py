"""`entroray verify-resume`: a run that was resumed against one that was not, value by value."""

import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from entroray.cli import flags
from entroray.cli.flags import Flag
from entroray.errors import ConfigError, InfrastructureError, NumericsError
from entroray.observe.journal import read_metrics
from entroray.observe.token_records import files, step_of
from entroray.wiring.overrides import quote
from entroray.wiring.run_directory import make_folder

CLOCKED = ("seconds/", "tokens/per_second", "idle/")
"""Metrics that are times: they may differ."""
UNDONE = ("/issued", "/rolled_back")
"""Ends of metrics that grow by what a resumption draws anew."""


FLAGS = (Flag("steps", "N"), Flag("dir", "FOLDER"))


def main(arguments: list[str]) -> int:
    """`verify-resume [--steps N] [--dir FOLDER] overrides`: n + n steps against 2n; exit 6 when they differ.

    Trains 2n steps with a checkpoint at n, then goes on from that checkpoint in a new process, and compares
    token records, metrics and exported weights of the second half bit for bit. That holds on CPUs.
    """
    given, overrides = flags.parse_flags("verify-resume", arguments, FLAGS)
    steps = _steps(given.get("steps", "3"))
    folder = Path(given.get("dir", "runs/verify-resume")).resolve()
    whole, resumed = _cleared(folder)
    _train(overrides, whole, steps)
    shutil.copytree(whole, resumed, symlinks=True)
    for later in (resumed / "model", resumed / "checkpoints" / f"step-{2 * steps:06d}"):
        shutil.rmtree(later)
    _train(overrides, resumed, steps)
    wrong = differences(whole, resumed, after=steps)
    if wrong:
        raise NumericsError("the resumed run is another run: " + "; ".join(wrong))
    print(f"\n{steps} + {steps} steps equal {2 * steps}: token records, metrics and weights, bit for bit")
    return 0


def _cleared(folder: Path) -> tuple[Path, Path]:
    """Places of the two runs, empty; ConfigError where the folder holds anything that is not theirs."""
    runs = folder / "whole", folder / "resumed"
    make_folder(folder, "--dir")
    others = sorted(p.name for p in folder.iterdir() if p not in runs)
    if others:
        raise ConfigError(
            f"verify-resume --dir={folder} holds {others[0]}: give an empty folder, or a new one"
        )
    for run in runs:
        shutil.rmtree(run, ignore_errors=True)
    return runs


def _steps(given: str) -> int:
    """The number that --steps is; ConfigError where it is none, or no step is left to compare."""
    if not given.isdecimal() or int(given) < 1:
        raise ConfigError(f"verify-resume --steps={given} must be a whole number, at least 1")
    return int(given)


def _train(overrides: list[str], folder: Path, steps: int) -> None:
    fixed = {
        "run.dir": quote(str(folder)),
        "run.resume": "auto",
        "run.steps": 2 * steps,
        "checkpoint.every": steps,
        "checkpoint.every_minutes": 0,
        "checkpoint.keep": 2,
        "observe.tokens.every": 1,
        "observe.report": "false",
        "evaluate.final": "false",
    }
    settings = [f"{name}={value}" for name, value in fixed.items()]
    command = [sys.executable, "-m", "entroray", "train", *overrides, *settings]
    done = subprocess.run(command, check=False)  # deadline: its own driver.stall and call_deadline
    if done.returncode:
        raise InfrastructureError(f"the run in {folder} ended with exit code {done.returncode}")


def differences(whole: Path, resumed: Path, *, after: int) -> list[str]:
    """What the second halves of two run directories do not share; empty when they are the same."""
    wrong = [
        f"{name} of step {a['step']} is {a.get(name)} and {b.get(name)}"
        for a, b in zip(_metrics(whole, after), _metrics(resumed, after), strict=True)
        for name in sorted(a.keys() | b.keys())
        if a.get(name) != b.get(name)
    ]
    wrong += [f"token records of step {step_of(f)}" for f in files(whole) if not _same_records(f, resumed)]
    models = [(folder / "model").glob("*.safetensors") for folder in (whole, resumed)]
    one, other = ({file.name: file.read_bytes() for file in each} for each in models)
    return wrong + ([] if one and one == other else ["the exported weights"])


def _metrics(run: Path, after: int) -> list[Mapping[str, Any]]:
    rows = [row for row in read_metrics(run / "metrics.jsonl") if row["step"] > after]
    return [
        {k: v for k, v in row.items() if not (k.startswith(CLOCKED) or k.endswith(UNDONE))} for row in rows
    ]


def _same_records(file: Path, other: Path) -> bool:
    import pyarrow.parquet as parquet

    return parquet.read_table(file).equals(parquet.read_table(other / "tokens" / file.name))
