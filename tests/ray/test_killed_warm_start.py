"""A driver that is killed while its model is warm-started leaves no process that goes on with it."""

import os
from pathlib import Path

import pytest

from entroray.workers.orphans import GRACE
from tests.ray.processes import descendants, left_over, start, until


def test_a_warm_start_ends_with_its_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENTRORAY_CACHE", str(tmp_path))
    shared = set(os.listdir("/dev/shm"))
    process = start("train", "experiment=quickstart", f"run.dir={tmp_path}/run")
    named = lambda: [p for p in descendants(process) if "warm-start" in p.cmdline()]
    until(process, named)
    (warm,) = named()
    process.kill()
    assert left_over([warm], shared, 10 * GRACE) == []
    process.communicate(timeout=30)
