"""Verdicts a second of the judge `math`, of this checkout and of another, on one core and by turns:

python tests/bench/judge_speed.py ANOTHER_CHECKOUT
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

INTEGERS = [
    (str(n), answer)
    for n in range(1013, 9000, 97)
    for answer in (
        f"{n}",
        f"{n + 1}",
        f"{n:,}",
        f"{n}.0",
        rf"\text{{{n}}}",
        f"x = {n}",
        f"{n} dollars",
        f"2{n}",
    )
]
LIKE_MATH = [
    *(
        (r"\frac{1}{2}", r"\frac12"),
        (r"\frac{3\sqrt{2}}{5}", r"\frac{3}{5}\sqrt{2}"),
        (r"2\sqrt{3}", r"\sqrt{12}"),
    ),
    *(("x^2-1", "(x-1)(x+1)"), ("x^2+2x+1", "x^2+2x+2"), ("(1,2)", "(1, 2)"), ("[1,2)", "[1,2]")),
    *(
        (r"\{1,2,3\}", "3,2,1"),
        (r"\frac{14}{3}", "4 2/3"),
        (r"\pi", "3.14"),
        ("2x+3", "3+2x"),
        ("y=2x+3", "2x+3"),
    ),
    *(
        (r"\text{Yes}", "yes"),
        (r"\pm 2", "2,-2"),
        ("3+4i", "4i+3"),
        (r"\frac{\pi}{6}", r"\pi/6"),
        ("90^\\circ", "90"),
    ),
    *((r"(-\infty,2)\cup(3,\infty)", r"(-\infty,2)\cup(3,\infty]"), (r"50\%", r"\frac12"), ("12.5", "12.4")),
    *(
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\3\end{pmatrix}"),
        (r"\log_2 8", "3"),
        ("42", "41"),
    ),
    *(
        (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}"),
        ("e^2", "2e"),
        ("x>5", "5<x"),
        (r"10\,080", "10080"),
        ("8", "2^3"),
    ),
]


def timed(pairs: list[tuple[str, str]]) -> float:
    """Verdicts a second; each pair's reference is read once more by then."""
    from entroray.reward import build_judge
    from entroray.types import Prompt

    judge = build_judge({"fn": "math"})
    asked = [(rf"\boxed{{{answer}}}", Prompt("0" * 16, "?", (1,), reference)) for reference, answer in pairs]
    for response, prompt in asked[:50]:
        judge(response, prompt)
    began = time.perf_counter()
    for response, prompt in asked:
        judge(response, prompt)
    return len(asked) / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", nargs="?", help="of the other")
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    if not asked.checkout:
        print(timed(INTEGERS), timed(LIKE_MATH * 4))
        return
    folders = (Path(__file__).parents[2], Path(asked.checkout))
    found: dict[Path, list[list[float]]] = {folder: [] for folder in folders}
    for _ in range(asked.rounds):
        for folder in folders:
            environment = os.environ | {"PYTHONPATH": str(folder)}
            out = subprocess.run(
                [sys.executable, __file__],
                env=environment,
                capture_output=True,
                text=True,
                check=True,
                timeout=600,
            )
            found[folder].append([float(word) for word in out.stdout.split()[-2:]])
    for n, what in enumerate(("integers", "like MATH")):
        here, there = (statistics.median(speeds[n] for speeds in found[folder]) for folder in folders)
        print(f"{what}: {here:,.0f} here, {there:,.0f} there, {here / there:.2f} times")


if __name__ == "__main__":
    main()
