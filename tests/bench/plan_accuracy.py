"""Step times that `entroray plan` predicts against real runs: python -m tests.bench.plan_accuracy --engines 1

One calibration for each number of engines and kind of lengths, on 128 and 32 responses a step; runs beside
it in the same process have 64 and 256, lag 0 and 1, one and two updates. Alone on the machine, about five
minutes for each number of engines. `--keep FILE` adds the rows to a file, and the table is of all in it.
"""

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

from entroray.cli.calibration import Bench, open_bench, shape_of
from entroray.config import Config, WarmStartConfig
from entroray.planning.rates import LEARNER
from entroray.planning.simulate import Rates, simulate
from entroray.policy.tiny_model import build_tiny_model
from entroray.wiring import actors, compose, dataset
from entroray.wiring.parts import build_parts
from entroray.workers import cluster

LENGTHS = {
    "fixed": ["rollout.max_tokens=64"],  # a random model ends 22 % of its responses before
    "by chance": ["rollout.max_tokens=256", "sampler.stop=[a,b,c,d]"],  # mean about 50
}
BASE = [
    "learner.lr_high=true",
    *("experiment=quickstart", "objective=grpo", "generator.threads=null", "learner.updates_per_rollout=1"),
    *("rollout.groups_per_step=16", "observe.tokens.every=0", "observe.diagnosis.every=0"),
    *("observe.prediction.every=0", "evaluate.final=false", "observe.trackers=[]"),
]
CASES = [(8, 0, 1), (32, 0, 1), (8, 1, 1), (32, 1, 1), (8, 0, 2)]
"""Groups a step, lag, updates."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engines", type=int, default=1)
    parser.add_argument("--lengths", nargs="*", default=list(LENGTHS))
    parser.add_argument("--steps", type=int, default=4, help="of each run, after two others")
    parser.add_argument("--keep", type=Path, help="a JSON file of rows, added to")
    return parser.parse_args()


def settings(folder: str, engines: int, lengths: str) -> Config:
    own = [f"model.path={folder}", f"generator.replicas={engines}", *LENGTHS[lengths]]
    return compose.load_config([*BASE, *own])[0]


def case(config: Config, groups: int, lag: int, updates: int) -> Config:
    return replace(
        config,
        rollout=replace(config.rollout, groups_per_step=groups),
        driver=replace(config.driver, max_lag=lag),
        learner=replace(config.learner, updates_per_rollout=updates),
    )


async def compare(bench: Bench, kind: str, rates: Rates, steps: int) -> AsyncIterator[dict[str, Any]]:
    """A real run of each case beside what the rates say: [measured, modelled]."""
    for groups, lag, updates in CASES:
        of = case(bench.config, groups, lag, updates)
        real, model = (await bench.steps(of, steps + 2))[2:], simulate(shape_of(of), rates)
        told = {"engines": of.generator.replicas, "lengths": kind, "responses": 8 * groups, "lag": lag}
        row = {**told, "updates": updates, "seconds": [fmean(s.seconds for s in real), model["seconds"]]}
        for name, phases in {"sample": ["sample"], "learn": LEARNER, "sync": ["sync"]}.items():
            row[name] = [fmean(s.phases(*phases) for s in real), model[name]]
        for name in ("idle/generator", "idle/learner"):
            row[name] = [fmean(s.metrics[name] for s in real), model[name]]
        yield row


async def measure(folder: str, engines: int, kinds: list[str], steps: int, keep: Path) -> None:
    """Every row is kept as it comes, so that a run that is cut leaves the others."""
    machine = None
    for kind in sorted(kinds):  # `by chance` first: its engine reads longer sequences
        config = settings(folder, engines, kind)
        parts, read_in = build_parts(config), dataset.load_dataset(config, folder)
        bench = Bench(config, parts, read_in, folder, machine) if machine else None
        bench = bench or await open_bench(config, parts, read_in, folder)
        began = time.monotonic()
        rates, drift = await bench.calibrate()
        print(f"{kind}, {engines} engines: {time.monotonic() - began:.0f} s, drift {drift:.2f}")
        print({k: v for k, v in vars(rates).items() if k != "lengths"}, flush=True)
        async for row in compare(bench, kind, rates, steps):
            print(json.dumps(row), flush=True)
            keep.write_text(json.dumps([*kept(keep), row], indent=1))
        machine = bench.machine
    await machine.stop()


def kept(file: Path) -> list[dict[str, Any]]:
    return json.loads(file.read_text()) if file.exists() else []


def table(rows: list[dict[str, Any]]) -> str:
    """Every run, then the median and the worst error, and pairs over 20 % apart in the wrong order."""
    head = ["engines", "lengths", "responses", "lag", "updates"]
    lines = [f"| {' | '.join(head)} | measured s | modelled s | error |", "|---" * 8 + "|"]
    errors = [r["seconds"][1] / r["seconds"][0] - 1 for r in rows]
    for r, error in zip(rows, errors, strict=True):
        cells = [*(str(r[name]) for name in head), *(f"{s:.2f}" for s in r["seconds"]), f"{error:+.0%}"]
        lines.append(f"| {' | '.join(cells)} |")
    each = [r["seconds"] for r in rows]
    pairs = [(a, b) for a in each for b in each if a[0] > 1.2 * b[0]]
    wrong = sum(a[1] <= b[1] for a, b in pairs)
    sizes = [abs(error) for error in errors]
    return "\n".join(lines) + (
        f"\n\n{len(rows)} runs: median error {median(sizes):.0%}, worst {max(sizes):.0%}; "
        f"{wrong} of {len(pairs)} pairs that differ by over 20 % in the wrong order"
    )


def main() -> None:
    asked = arguments()
    with tempfile.TemporaryDirectory() as folder:
        build_tiny_model(Path(folder), WarmStartConfig().size, seed=0)
        keep = asked.keep or Path(folder, "rows.json")
        actors.join_cluster(settings(folder, asked.engines, asked.lengths[0]))
        asyncio.run(measure(folder, asked.engines, asked.lengths, asked.steps, keep))
        print(table(kept(keep)), flush=True)
    cluster.stop()


if __name__ == "__main__":
    main()
