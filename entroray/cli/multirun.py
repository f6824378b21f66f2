"""`entroray train --multirun`: every combination of what is swept, one run after the other."""

import signal
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
        code = _run(command)
        worst = worst or code
        if code > 128:  # ended by a signal, which was meant for all of them
            break
    return worst


def _run(command: Sequence[str]) -> int:
    """A run's exit code. Ctrl-C reaches it from the terminal and SIGTERM from here: it saves a checkpoint."""
    child = subprocess.Popen(command)
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
    terminate = signal.signal(signal.SIGTERM, lambda number, _: child.send_signal(number))
    try:
        code = child.wait()  # deadline: its own driver.stall and call_deadline
    finally:
        signal.signal(signal.SIGINT, interrupt)
        signal.signal(signal.SIGTERM, terminate)
    return code if code >= 0 else 128 - code


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
