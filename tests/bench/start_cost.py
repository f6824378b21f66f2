"""From the command to the first update, here and in another checkout, by turns, alone on the machine:

python -m tests.bench.start_cost ANOTHER_CHECKOUT

Both run `entroray train experiment=quickstart objective=grpo` on one random model, so that no warm start is
timed, with one engine and with two. Wanted: at most 0.75 of 3870155, and two engines at most 1.25 of one.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.bench.side_by_side import ROOT, ROWS, model_folder


def started(checkout: Path, model: Path, engines: int) -> float:
    """Seconds from the command to the first line of its metrics."""
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch, "run")
        command = [sys.executable, "-m", "entroray", "train", "experiment=quickstart", "objective=grpo"]
        command += [f"model.path={model}", f"generator.replicas={engines}", f"run.dir={run}"]
        command += ["learner.lr=1e-5", "run.steps=1", "evaluate.final=false", "observe.report=false"]
        with Path(scratch, "log").open("w") as log:
            began = time.perf_counter()
            environment = os.environ | {"PYTHONPATH": str(checkout)}
            process = subprocess.Popen(command, cwd=checkout, env=environment, stdout=log, stderr=log)
            while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").stat().st_size:
                assert process.poll() is None, Path(log.name).read_text()[-3000:]
                time.sleep(0.02)
            seconds = time.perf_counter() - began
            process.wait(120)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", nargs="?", type=Path, help="the other; left out, only this one is timed")
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    model = model_folder(ROWS["fixed_64"])
    there = [asked.checkout.resolve()] if asked.checkout else []
    arms = [(checkout, engines) for engines in (1, 2) for checkout in (ROOT, *there)]
    found: dict[tuple[Path, int], list[float]] = {arm: [] for arm in arms}
    for _ in range(asked.rounds):
        for arm in arms:
            found[arm].append(started(arm[0], model, arm[1]))
    for (checkout, engines), seconds in found.items():
        name = "here " if checkout == ROOT else "there"
        between = f"({min(seconds):.1f} to {max(seconds):.1f})"
        print(f"{name} {engines} engines  {statistics.median(seconds):5.1f} s  {between}")
    ratio = lambda a, b: statistics.median(x / y for x, y in zip(found[a], found[b], strict=True))
    for engines in (1, 2):
        for other in there:
            print(f"{engines} engines: {ratio((ROOT, engines), (other, engines)):.2f} of there, 0.75 wanted")
    print(f"two engines: {ratio((ROOT, 2), (ROOT, 1)):.2f} of one, 1.25 wanted")


if __name__ == "__main__":
    main()
