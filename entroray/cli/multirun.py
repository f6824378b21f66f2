"""`entroray train --multirun`: every combination of what is swept, one run after the other."""

import subprocess
import sys
from collections import Counter
from collections.abc import Sequence

from entroray.config import Run
from entroray.errors import ConfigError
from entroray.wiring import compose, run_directory


def train_each(overrides: list[str], config_dir: str | None) -> int:
    """Every combination in a process of its own; the first failure's exit code."""
    extra = [f"--config-dir={config_dir}"] if config_dir else []
    combinations = compose.expand_sweep(overrides, config_dir)
    check_apart([compose.load_config(each, config_dir)[0].run for each in combinations], combinations)
    worst = 0
    for number, combination in enumerate(combinations):
        print(f"--- run {number}: {' '.join(combination)}", flush=True)
        command = [sys.executable, "-m", "entroray", "train", *combination, *extra]
        done = subprocess.run(command, check=False)  # deadline: its own driver.stall and call_deadline
        worst = worst or done.returncode
    return worst


def check_apart(runs: Sequence[Run], combinations: Sequence[Sequence[str]]) -> None:
    """Raise, before the first of many runs, if two would share a folder or one would be in an older run's."""
    folders = [run_directory.place(run.dir) for run in runs if run.dir]
    folder, number = next(iter(Counter(folders).most_common(1)), (None, 0))
    if number > 1:
        swept = [word.partition("=")[0] for word in combinations[0] if word not in combinations[-1]]
        own = [f", or 'run.dir={folder}/${{{key}}}'" for key in swept if key == "seed" or "." in key]
        raise ConfigError(
            f"run.dir={folder} is one folder for {number} of {len(runs)} runs: leave it out and each has a "
            f"folder of its own{''.join(own[:1])}"
        )
    for run in runs:
        if run.dir and run.resume != "auto":
            run_directory.check_free(run_directory.place(run.dir))
