"""What the driver costs where the machines cost nothing: rollouts of 64 tokens a second, by groups a step.

python tests/bench/driver_cost.py [ANOTHER_CHECKOUT] [--groups 64 512 1024 8192]
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

GROUPS, SIZE, LENGTH = (64, 512, 1024, 8192), 8, 64


class Prompts:
    """q0, q1, q2, ... without end; every fourth is answered by no rollout."""

    position = 0

    def __next__(self) -> Any:
        self.position += 1
        return self.at(self.position - 1)

    def at(self, position: int) -> Any:
        from entroray.types import Prompt

        return Prompt(f"q{position}", f"q{position}", (0, 1, 2, 3), str(position % 4))


class World:
    """Every role, answering from prepared arrays; the engine gives one group a turn of the event loop."""

    def __init__(self, groups: int):
        import numpy as np

        rng = np.random.default_rng(0)
        self.ids = rng.integers(0, 512, (SIZE, LENGTH)).astype(np.int32)
        self.logprobs = -rng.random((SIZE, LENGTH)).astype(np.float32)
        self.column = rng.random(groups * SIZE * LENGTH).astype(np.float32)
        self.version = 0
        self.asked: deque[Any] = deque()
        self.metrics: list[dict[str, float]] = []

    async def sample(self, prompt: Any, seeds: Sequence[int], draw: Any, after: Any = ()) -> list[Any]:
        if not self.asked:
            self.engine = asyncio.ensure_future(self.serve())
        answer = asyncio.get_running_loop().create_future()
        self.asked.append((prompt, answer))
        return await answer

    async def serve(self) -> None:
        import numpy as np

        from entroray.types import Rollout

        while self.asked:
            await asyncio.sleep(0)
            prompt, answer = self.asked[0]
            versions = np.full(LENGTH, self.version, np.int32)
            pairs = zip(self.ids, self.logprobs, strict=True)
            if not answer.done():
                answer.set_result([Rollout(prompt.id, i, p, versions, "", 1.0, LENGTH) for i, p in pairs])
            self.asked.popleft()

    async def judge(self, prompt: Any, rollouts: Sequence[Any]) -> list[Any]:
        from entroray.types import Verdict

        right = [prompt.reference != "0" and i % 2 == 0 for i in range(len(rollouts))]
        return [Verdict(float(r), r) for r in right]

    async def score(self, batch: Any, *_: Any) -> Mapping[str, Any]:
        await asyncio.sleep(0)
        columns = ("logprobs", "entropy", "varentropy")
        return dict.fromkeys(columns, -self.column[: len(batch.response_ids)])

    async def update(self, *_: Any) -> dict[str, float]:
        await asyncio.sleep(0)
        return {}

    async def score_and_update(self, batch: Any, *_: Any) -> tuple[dict[str, float], Mapping[str, Any]]:
        return {}, await self.score(batch)

    async def __call__(self, version: int) -> dict[str, float]:
        self.version = version
        return {}

    def step(self, step: int, metrics: dict[str, float], groups: Any, tokens: Any) -> None:
        self.metrics.append(metrics)

    def skipped(self, *_: Any) -> None: ...

    def event(self, *_: Any, **__: Any) -> None: ...


def rate(groups: int, lag: int, **pace: Any) -> float:
    """Rollouts trained a second by the checkout on the path; the first step is left out."""
    from entroray.objective import build_objective
    from entroray.rows import objective_row
    from entroray.train.driver import Driver, Knobs, LoopSettings, Roles
    from entroray.types import Draw

    world = World(groups)
    settings = {"group_size": SIZE, "groups_per_step": groups, "max_lag": lag, "wait": True}
    settings |= {"refill_limit": 10, "max_failed": 1.0, "stall": 900.0} | pace
    objective = build_objective({**objective_row("grpo"), "keep": {"fn": "informative"}})
    roles = Roles(*[world] * 5)  # type: ignore[arg-type]
    driver = Driver(Prompts(), roles, Knobs(objective, Draw(1.0, LENGTH)), LoopSettings(**settings), seed=0)
    times: list[float] = []

    async def after(step: int, metrics: Any) -> None:
        times.append(time.process_time())

    asyncio.run(driver.train(1 + max(2, min(32, 4096 // groups)), after))
    return groups * SIZE * (len(times) - 1) / (times[-1] - times[0])


def measured(folder: Path, groups: int, lag: int) -> float:
    """`rate` of the checkout in `folder`, in a process of its own."""
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import driver_cost; "
    out = subprocess.run(
        [sys.executable, "-c", code + f"print(driver_cost.rate({groups}, {lag}))"],
        env=os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
        timeout=900,
    )
    return float(out.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", nargs="?", help="of the other")
    parser.add_argument("--groups", type=int, nargs="*", default=GROUPS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--most", type=int, default=1024, help="groups a step asked of the other")
    asked = parser.parse_args()
    folders = {"here": Path(__file__).parents[2]} | (
        {"there": Path(asked.checkout)} if asked.checkout else {}
    )
    for lag in (0, 1):
        for groups in asked.groups:
            among = [name for name in folders if name == "here" or groups <= asked.most]
            found = {name: list[float]() for name in among}
            for _ in range(asked.rounds):
                for name in among:
                    found[name].append(measured(folders[name], groups, lag))
            row = {name: round(statistics.median(rates)) for name, rates in found.items()}
            print(json.dumps({"lag": lag, "groups": groups, "rollouts/s": row}), flush=True)


if __name__ == "__main__":
    main()
