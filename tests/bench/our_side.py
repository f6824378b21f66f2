"""`entroray train` behind a gate: python -m tests.bench.our_side OVERRIDES, called by side_by_side.py."""

import sys
from collections.abc import Mapping

from entroray import cli
from entroray.observe.console import Console
from tests.bench.gate import Gate


def main() -> int:
    gate = Gate()

    def log(console: Console, step: int, metrics: Mapping[str, float]) -> None:
        """In the place of a line on the terminal: the driver goes on when this returns."""
        if step:
            phases = {k: v for k, v in metrics.items() if k.startswith("seconds/")}
            for name in ("seconds/journal", "seconds/step"):  # in which the step before was held still
                phases[name] = phases.get(name, 0.0) - gate.held
            gate.step(metrics["tokens/per_second"] * metrics["seconds/step"], phases)

    Console.log = log  # type: ignore[method-assign]
    return cli.run(["train", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
