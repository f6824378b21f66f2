"""When log-probs of engine and learner on the probe text count as the same."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from entroray.config import DriverConfig, ProbeConfig
from entroray.errors import SyncError
from entroray.workers.sync import WeightSync


def probed(dtype: str, engine: list[float], learner: list[float], **probe: Any) -> Any:
    """What a comparison of these log-probs finds."""

    async def given(values: list[float]) -> list[float]:
        return values

    async def answers(*_: Any, **__: Any) -> dict[str, list[float]]:
        return {"generator 0": engine}

    gang: Any = SimpleNamespace(all=lambda method, deadline: asyncio.gather(given(learner)))
    driver = DriverConfig(probe=ProbeConfig(**probe))
    pool: Any = SimpleNamespace(call_all=answers)
    return asyncio.run(WeightSync(gang, pool, (1, 2, 3), driver, 5.0, dtype).measure())


LIKELY, RARE = [-0.1] * 9 + [-9.0], [-0.1] * 9 + [-8.7]
"""0.3 nats apart at a token of probability 1e-4: 0.03 on average."""


def test_a_rare_token_of_another_log_prob_is_refused_in_float32_and_not_in_bfloat16() -> None:
    found = probed("bfloat16", LIKELY, RARE, tolerance=0.05)
    assert found["sync/probe_error"] == pytest.approx(0.3)
    assert found["sync/probe_mean_error"] == pytest.approx(0.03)
    assert found["sync/probe_probability_error"] == pytest.approx(4.3e-5, rel=0.02)
    with pytest.raises(SyncError, match=r"0\.0300 nats .*0\.3000 at most.*driver\.probe\.tolerance"):
        probed("float32", LIKELY, RARE, tolerance=0.05)


@pytest.mark.parametrize(
    ("engine", "learner"),
    [([-3.0] * 9, [-3.06] * 9), ([-0.1] * 9, [-0.1] * 8 + [-0.3]), ([-1.0], [float("nan")])],
    ids=["a mean", "a probability", "nan"],
)
def test_in_bfloat16_a_mean_and_a_probability_that_are_too_far_apart_are_refused(
    engine: list[float], learner: list[float]
) -> None:
    with pytest.raises(SyncError, match=r"driver\.probe\.tolerance"):
        probed("bfloat16", engine, learner, tolerance=0.05)


def test_in_float32_the_largest_difference_counts_whatever_the_probability() -> None:
    assert probed("float32", [-9.0], [-9.0009])["sync/probe_error"] == pytest.approx(9e-4)
    with pytest.raises(SyncError):
        probed("float32", [-0.1] * 99 + [-9.0], [-0.1] * 99 + [-9.0011])
