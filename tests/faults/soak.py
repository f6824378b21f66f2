"""Runs hurt by a seeded list of faults beside runs left alone: python -m tests.faults.soak --seed 1 2 3.

Each run is kept in `soak_results`, so that the same command goes on where it was ended; `soak.md` explains.
"""

import argparse
import json
import signal
import statistics
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from entroray.wiring.run_directory import commit
from tests.faults.soak_numbers import GROWTH, SETTLED, Growth, growths, interval
from tests.faults.soak_run import Interrupted, Log, Supervisor, whole_lines

RESULTS = Path(__file__).with_name("soak_results")
COLUMNS = (
    *("seed", "run", "steps", "faults", "restarts", "dropped", "reward (last 20)", "left over"),
    *("most growth", "commit, date"),
)
DROPPED = ("/dropped", "/refused", "/surplus", "/rolled_back")
"""Ends of the names of metrics that count what was drawn and not trained on, by reason."""
LAST = 20
"""Steps that `reward_last` is the mean of."""


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if all holds, 1 for a miss, 130 if it was ended before and goes on with the same command."""
    parser = argparse.ArgumentParser(prog="tests.faults.soak", description=__doc__)
    parser.add_argument("--seed", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--every", type=int, default=15, help="steps between faults, about; 0: no faults")
    parser.add_argument("--again", action="store_true", help="forget what is kept of these runs")
    parser.add_argument("--print", action="store_true", help="print what is kept, run nothing")
    parser.add_argument("--work", type=Path, default=Path("runs/soak"), help="where the runs themselves are")
    asked = parser.parse_args(arguments)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    runs = list(dict.fromkeys((seed, every) for seed in asked.seed for every in (asked.every, 0)))
    kept = {run: RESULTS / f"{name(*run, asked.steps)}.json" for run in runs}
    try:
        for run in runs if not asked.print else ():
            if asked.again or not kept[run].exists():
                _measure(asked.work, run, asked.steps, kept[run], again=asked.again)
    except Interrupted:
        print("ended before the end: the same command goes on")
        return 130
    found = [json.loads(kept[run].read_text()) for run in runs if kept[run].exists()]
    said, holds = table(found)
    print("\n".join(said))
    return 0 if holds and len(found) == len(runs) else 1


def name(seed: int, every: int, steps: int) -> str:
    """Of a run: what it is kept by."""
    return f"seed-{seed}-steps-{steps}-" + (f"fault-every-{every}" if every else "no-faults")


def _interrupt(number: int, _: Any) -> None:
    raise Interrupted(signal.Signals(number).name)


def _measure(work: Path, run: tuple[int, int], steps: int, kept: Path, *, again: bool) -> None:
    folder = (work / name(*run, steps)).resolve()
    if again and folder.exists():
        folder.rename(folder.with_name(f"{folder.name}-before-{len(list(work.glob('*-before-*'))) + 1}"))
    print(folder.name, flush=True)
    seed, every = run
    if not Log(folder / "soak.jsonl").of("end"):
        Supervisor(folder, seed=seed, steps=steps, every=every).supervise()
    about = {"seed": seed, "steps": steps, "every": every, "commit": commit()}
    log, rows = whole_lines(folder / "soak.jsonl"), whole_lines(folder / "run" / "metrics.jsonl")
    kept.parent.mkdir(exist_ok=True)
    kept.write_text(json.dumps(about | result(log, rows), indent=1) + "\n")


def result(log: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What is kept of a run that has ended: its `log` by the supervisor, and its `rows` of metrics."""
    of = lambda kind: [row for row in log if row["kind"] == kind]
    rewards, last = [row["reward/mean"] for row in rows], rows[-1] if rows else {}
    faults, end = of("fault"), of("end")[-1]
    open_at_interruption = sum(row["open"] for row in of("interrupted"))
    return {
        "date": end["time"][:10],
        "done": [row["step"] for row in rows] == list(range(1, len(rows) + 1)) and len(rows),
        "faults": dict(sorted(Counter(row["name"] for row in faults if row["fired"]).items())),
        "not_fired": [row["name"] for row in faults if not row["fired"]],
        "not_answered": sum(row["fired"] for row in faults) - len(of("answer")) - open_at_interruption,
        "restarts": len(of("start")) - 1 - len(of("interrupted")),
        "unexplained": [row["code"] for row in of("exit") if not row["explained"]],
        "dropped": {key: last[key] for key in last if key.endswith(DROPPED)},
        "reward": round(statistics.fmean(rewards), 4) if rewards else None,
        "reward_last": round(statistics.fmean(rewards[-LAST:]), 4) if rewards else None,
        "left_over": end["left_over"],
        "ray_sessions": end["ray_sessions"],
        "ray_mb": end["ray_mb"],
        "growths": [growth._asdict() for growth in growths(of("memory"))],
        "rewards": [round(reward, 4) for reward in rewards],
    }


def misses(run: Mapping[str, Any]) -> Iterator[str]:
    """What a run has not kept of what is promised, in words."""
    if run["done"] != run["steps"]:
        yield f"{run['done'] or 'not each once'} of {run['steps']} steps"
    for fault in run["not_fired"]:
        yield f"not fired: {fault}"
    if run["not_answered"]:
        yield f"{run['not_answered']} faults without an answer"
    for code in run["unexplained"]:
        yield f"a driver ended with {code}, for which there was no fault"
    for thing in run["left_over"]:
        yield f"left over: {thing}"
    for grown in (Growth(**each) for each in run["growths"]):
        if not grown.holds:
            yield f"{_grown(grown)} beyond {100 * GROWTH:.0f} %"


def _grown(of: Growth) -> str:
    if of.mb is None or of.memory is None or of.descriptors is None:
        return f"{of.role} {of.pid}: {of.steps} steps, too few"
    return (
        f"{of.role} {of.pid}: {of.steps} steps, {of.mb:.0f} MB, grown by {100 * of.memory:+.1f} %, "
        f"descriptors by {100 * of.descriptors:+.1f} %"
    )


def table(runs: Sequence[Mapping[str, Any]]) -> tuple[list[str], bool]:
    """In Markdown, with each miss, and whether there is none."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|", *map(_line, runs), ""]
    for run in runs:
        if run["faults"]:
            kinds = ", ".join(f"{number} x {kind}" for kind, number in run["faults"].items())
            lines.append(f"seed {run['seed']}: {kinds}")
    missed = [f"MISS seed {run['seed']}, {_called(run)}: {each}" for run in runs for each in misses(run)]
    said, holds = _compared(runs)
    return [*lines, "", *_processes(runs), "", *missed, said], holds and not missed


def _called(run: Mapping[str, Any]) -> str:
    return f"a fault every {run['every']}" if run["every"] else "no faults"


def _line(run: Mapping[str, Any]) -> str:
    measured = [grown for each in run["growths"] if (grown := Growth(**each)).memory is not None]
    most = max(measured, key=lambda grown: grown.memory or 0.0, default=None)
    grown = f"{most.role} {100 * (most.memory or 0):+.1f} %" if most else f"none lived {SETTLED} steps"
    dropped = ", ".join(f"{key} {value:g}" for key, value in run["dropped"].items() if value) or "nothing"
    cells = [
        *(run["seed"], _called(run), run["done"], sum(run["faults"].values()), run["restarts"], dropped),
        *(f"{run['reward']} ({run['reward_last']})", len(run["left_over"]) or "nothing", grown),
        f"{run['commit']}, {run['date']}",
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def _processes(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Each process that lived long enough, and how many did not."""
    said = []
    for run in runs:
        found = [Growth(**each) for each in run["growths"]]
        said += [f"seed {run['seed']}, {_called(run)}: {_grown(g)}" for g in found if g.memory is not None]
        if brief := sum(g.memory is None for g in found):
            said.append(f"seed {run['seed']}, {_called(run)}: {brief} processes lived too briefly to measure")
    return said


def _compared(runs: Sequence[Mapping[str, Any]]) -> tuple[str, bool]:
    """The interval of the mean reward with faults minus that without, over seeds that have both."""
    hurt = {run["seed"]: run["reward"] for run in runs if run["every"]}
    calm = {run["seed"]: run["reward"] for run in runs if not run["every"]}
    differences = [hurt[seed] - calm[seed] for seed in hurt if seed in calm]
    found, each = interval(differences), ", ".join(f"{d:+.4f}" for d in differences) or "none"
    if found is None:
        return f"reward with faults minus without: {each}; no interval from fewer than two seeds", True
    return (
        f"reward with faults minus without: {each}; mean {found.mean:+.4f}, "
        f"95 % from {found.low:+.4f} to {found.high:+.4f} (Student's t, {len(differences)} seeds): "
        f"{found.verdict}",
        found.verdict == "holds",
    )


if __name__ == "__main__":
    sys.exit(main())
