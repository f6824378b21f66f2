"""Step times that `entroray plan` predicts against real runs: python -m tests.bench.plan_accuracy --engines 1

One calibration for each number of engines and kind of lengths, on 128 responses a step; the runs beside it in
the same process have 64 and 256, lag 0 and 1, one and two updates. Alone on the machine, about four minutes
for each number of engines. `--keep FILE` adds the rows to a file, and the table is of all rows in it.
"""

import argparse
import asyncio
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from entroray.cli.calibration import Bench, open_bench, shape_of
from entroray.config import Config, WarmStartConfig
from entroray.planning.simulate import simulate
from entroray.policy.tiny_model import build_tiny_model
from entroray.wiring import actors, compose, dataset
from entroray.wiring.parts import build_parts
from entroray.workers import cluster

LENGTHS = {
    "fixed": ["rollout.max_tokens=64"],  # a random model ends 22 % of its responses before
    "by chance": ["rollout.max_tokens=256", "sampler.stop=[a,b,c,d]"],  # mean about 50
}
BASE = [
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
    parser.add_argument("--steps", type=int, default=5, help="of each run, after two others")
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


async def measure(folder: str, engines: int, kinds: list[str], steps: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    machine = None
    for kind in sorted(kinds):  # `by chance` first: its engine reads longer sequences
        config = settings(folder, engines, kind)
        parts, read_in = build_parts(config), dataset.load_dataset(config, folder)
        bench = Bench(config, parts, read_in, folder, machine) if machine else None
        bench = bench or await open_bench(config, parts, read_in, folder)
        began = time.monotonic()
        rates, drift = await bench.calibrate(3)
        print(f"{kind}, {engines} engines: {time.monotonic() - began:.0f} s, drift {drift:.2f}")
        print({k: v for k, v in vars(rates).items() if k != "lengths"}, flush=True)
        for groups, lag, updates in CASES:
            of = case(config, groups, lag, updates)
            real = (await bench.steps(of, steps + 2))[2:]
            model = simulate(shape_of(of), rates)
            row = {
                "engines": engines,
                "lengths": kind,
                "responses": groups * 8,
                "lag": lag,
                "updates": updates,
            }
            row |= {"measured": median(s.seconds for s in real), "predicted": model["seconds"]}
            for name, phases in {
                "sample": ["sample"],
                "learn": ["score", "update"],
                "sync": ["sync"],
            }.items():
                row[name] = [median(s.phases(*phases) for s in real), model[name]]
            for role in ("generator", "learner"):
                row[f"idle/{role}"] = [median(s.metrics[f"idle/{role}"] for s in real), model[f"idle/{role}"]]
            print(json.dumps(row), flush=True)
            rows.append(row)
        machine = bench.machine
    await machine.stop()
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Every run, then the median and the worst error, and pairs over 20 % apart in the wrong order."""
    errors = [abs(r["predicted"] / r["measured"] - 1) for r in rows]
    lines = [
        "| engines | lengths | responses a step | lag | updates | measured s | modelled s | error |",
        "|---" * 8 + "|",
    ]
    for r in rows:
        cells = [r["engines"], r["lengths"], r["responses"], r["lag"], r["updates"]]
        error = r["predicted"] / r["measured"] - 1
        lines.append(
            "| "
            + " | ".join(map(str, cells))
            + f" | {r['measured']:.3f} | {r['predicted']:.3f} | {error:+.0%} |"
        )
    pairs = [(a, b) for a in rows for b in rows if a["measured"] > 1.2 * b["measured"]]
    wrong = sum(a["predicted"] <= b["predicted"] for a, b in pairs)
    lines.append(
        f"\n{len(rows)} runs: median error {median(errors):.0%}, worst {max(errors):.0%}; "
        f"{wrong} of {len(pairs)} pairs that differ by over 20 % in the wrong order"
    )
    return "\n".join(lines)


def main() -> None:
    asked = arguments()
    with tempfile.TemporaryDirectory() as folder:
        build_tiny_model(Path(folder), WarmStartConfig().size, seed=0)
        actors.join_cluster(settings(folder, asked.engines, asked.lengths[0]))
        rows = asyncio.run(measure(folder, asked.engines, asked.lengths, asked.steps))
    if asked.keep:
        before = json.loads(asked.keep.read_text()) if asked.keep.exists() else []
        rows = before + rows
        asked.keep.write_text(json.dumps(rows, indent=1))
    print(table(rows), flush=True)
    cluster.stop()


if __name__ == "__main__":
    main()
