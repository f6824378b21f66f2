"""Every row of conf/objective trains three steps on real engines: one machine, reused over the rows."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from entroray.cli import machine, settings
from entroray.cli.material import load
from entroray.loop.driver import Driver, Pace, Roles
from entroray.loop.prompts import PromptStream
from entroray.objective import build
from entroray.observe.journal import Journal
from entroray.workers.generator import Sampling

pytestmark = pytest.mark.slow
ROWS = sorted(path.stem for path in (settings.CONF / "objective").glob("*.yaml"))
PACE = Pace(8, 8, 0, True, 2, 1000, max_failed=0.5, max_skipped=1, stall=120.0)
"""The model is random, so nearly every answer is wrong: filters are asked for patience, see `keep`."""


@pytest.fixture(scope="module")
def running(local_ray: None, model: str) -> Iterator[tuple[Any, Any, Any]]:
    overrides = ["experiment=quickstart", "data.max_prompt=128", "data.size=2000", "generator.replicas=1"]
    config, _ = settings.load([*overrides, f"model.path={model}"])
    read = load(config, model)
    loop = asyncio.new_event_loop()
    made = machine.build(config, model, build(config.objective), read.judge, (1, 2, 3), total_updates=1000)
    yield loop, loop.run_until_complete(made), read
    loop.close()


@pytest.mark.parametrize("name", ROWS)
def test_a_row_trains_three_steps(running: tuple[Any, Any, Any], name: str, tmp_path: Path) -> None:
    loop, m, read = running
    objective = build(settings.objective(name) | {"keep": {"fn": "always"}})
    journal = Journal(tmp_path, tokens_every=0)

    async def train() -> list[dict[str, float]]:
        await m.learner.all(lambda rank, h: h.adopt.remote(objective), deadline=60.0)
        await m.sync(0)
        roles = Roles(
            m.generator_role(Sampling(1.0, 12)), m.verifier_role(), m.learner_role(objective), m.sync, journal
        )
        return await Driver(PromptStream(read.split.training, seed=0), roles, objective, PACE, seed=0).train(
            3
        )

    steps = loop.run_until_complete(train())
    journal.close()
    assert len(steps) == 3 and all(s["update/skipped"] == 0 for s in steps)
    assert all(np.isfinite([s["update/loss"], s["update/grad_norm"], s["entropy/mean"]]).all() for s in steps)
