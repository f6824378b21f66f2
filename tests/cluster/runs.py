"""Settings of runs on real clusters, and waits with a deadline."""

import json
import time
from collections.abc import Callable

JOB = (
    *("experiment=quickstart", "objective=grpo", "rollout.groups_per_step=4", "data.max_prompt=128"),
    *("learner.lr_high=true", "observe.report=false", "evaluate.final=false", "checkpoint.every=2"),
)
"""A run that takes seconds once it has started."""


def until(
    true: Callable[[], bool], within: float, what: str, alive: Callable[[], bool] = lambda: True
) -> None:
    """Wait until `true`, at most `within` seconds and while `alive`."""
    ends = time.monotonic() + within
    while not true():
        assert time.monotonic() < ends, f"{what}: not within {within:.0f} s"
        assert alive() or true(), f"{what}: it ended before"
        time.sleep(0.5)


def steps(metrics: str) -> list[int]:
    """The steps that a metrics.jsonl has, in order."""
    return [json.loads(line)["step"] for line in metrics.splitlines()]
