"""Programs a second of the judge `code`, shut in and as bare forks, by turns, while one slot is stuck:

python -m tests.bench.code_cost [--rounds 5] [--programs 100]
"""

import argparse
import statistics
import threading
import time

from entroray.reward.programs import Limits, Program, Programs

SOURCE = "def f(x):\n    return sorted(x)[::-1]\n"
PROGRAM = Program(SOURCE, [("value", "f([3, 1, 2])")] * 3)
STUCK = Program("import time\ntime.sleep(3600)")
LEAST = 0.4
"""Of the speed of a bare fork."""


def rate(programs: Programs, count: int) -> float:
    """Programs a second, one after another."""
    began = time.perf_counter()
    for _ in range(count):
        assert len(programs.run(PROGRAM, Limits(10.0)).given) == 3
    return count / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--programs", type=int, default=100)
    asked = parser.parse_args()
    both = {"shut in": Programs(), "bare": Programs(())}
    ends = [threading.Thread(target=p.run, args=(STUCK, Limits(3600.0)), daemon=True) for p in both.values()]
    for thread in ends:
        thread.start()
    rates: dict[str, list[float]] = {name: [] for name in both}
    for _ in range(asked.rounds):
        for name, programs in both.items():
            rates[name].append(rate(programs, asked.programs))
    for name, found in rates.items():
        print(f"{name:8}{statistics.median(found):8.0f} programs/s ({both[name].describe()})")
    ratios = [a / b for a, b in zip(rates["shut in"], rates["bare"], strict=True)]
    ratio = statistics.median(ratios)
    print(f"ratio {ratio:.2f} (from {min(ratios):.2f} to {max(ratios):.2f}), {LEAST} wanted")
    for programs in both.values():
        programs.close()
    raise SystemExit(ratio < LEAST)


if __name__ == "__main__":
    main()
