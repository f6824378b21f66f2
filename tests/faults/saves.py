"""Saves that are cut: python -m tests.faults.saves FOLDER byte|time|full; prints one JSON a save.

A process of its own that forks one for each save, so that the kernel can end that one anywhere.
"""

import asyncio
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from entroray.errors import InfrastructureError
from entroray.observe.journal import replace_text
from entroray.workers.checkpoint import Checkpoints, newest

SIZE, FILES = 300_000, ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt")


class Ranks:
    """A learner of one rank whose part is two files of random bytes."""

    async def all(self, method: Callable[[int, Any], Any], *, deadline: float) -> list[Any]:
        return [method(0, self)]

    @property
    def save(self) -> "Ranks":
        return self

    def remote(self, folder: str) -> dict[str, Any]:
        for name in FILES:
            (Path(folder) / name).write_bytes(random.randbytes(SIZE))
        return {}


def save(folder: Path, step: int) -> None:
    saves = Checkpoints(folder, Ranks(), keep=3, deadline=60.0)  # type: ignore[arg-type]
    asyncio.run(saves.save(step, {"version": step}))


def cut(folder: Path, how: str, seed: int, lasts: float) -> dict[str, Any]:
    """How a save of step 2 was ended, what it left, and what a run then finds and can do."""
    chance = random.Random(seed)
    at: float = chance.randrange(SIZE) if how == "byte" else chance.uniform(0.0, lasts)
    child = os.fork()
    if not child:
        if how == "byte":
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # the kernel ends who writes byte `at`
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(at), resource.RLIM_INFINITY))
        else:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, max(at, 1e-6))
        save(folder, 2)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    there = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file() and "2" in f.parent.name)
    found, why = newest(folder)
    save(folder, 3)  # as the run that goes on makes its next
    after = newest(folder)[0]
    left = sorted(p.name for p in folder.iterdir() if p.name.startswith("."))
    shutil.rmtree(folder / "step-000003")
    shutil.rmtree(folder / "step-000002", ignore_errors=True)
    ended = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else "done"
    told = {"at": at, "ended": ended, "left": there, "found": found and found.name, "why": why}
    return told | {"after": after and after.name, "aside": left}


def fill(folder: Path) -> dict[str, Any]:
    """What is said by a disk that has room for one checkpoint and a half, of a save and of a page."""
    said = {}
    for what, act in (
        ("save", lambda: save(folder, 2)),
        ("page", lambda: replace_text(folder / "page", "x" * 4 * SIZE)),
    ):
        try:
            act()
        except InfrastructureError as error:
            said[what] = f"{error.exit_code}: {error}"
    free = shutil.disk_usage(folder).free
    found, why = newest(folder)
    return {**said, "free": free, "found": found and found.name, "why": why}


def main() -> None:
    folder, how = Path(sys.argv[1]), sys.argv[2]
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    save(folder, 1)
    lasts = time.monotonic() - began
    if how == "full":
        print(json.dumps(fill(folder)))
        return
    for seed in range(int(sys.argv[3])):
        print(json.dumps(cut(folder, how, seed, lasts)), flush=True)


if __name__ == "__main__":
    main()
