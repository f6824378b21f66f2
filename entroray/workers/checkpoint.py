"""Checkpoints: written aside, listed with sizes and hashes, committed by a marker, newest valid one found."""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entroray.workers.cluster import Gang

MANIFEST, MARKER, STATE = "manifest.json", "COMMITTED", "driver.json"


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run: `<folder>/step-000010/`, the `keep` newest and the best."""

    folder: Path
    learner: Gang
    keep: int
    deadline: float

    async def save(self, step: int, state: Mapping[str, Any], accuracy: float | None = None) -> Path:
        """Every rank's part, the driver's state and the held-out accuracy, if known; the committed folder."""
        aside = self.folder / f".step-{step:06d}.part"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        await self.learner.all(lambda rank, h: h.save.remote(str(aside)), deadline=self.deadline)
        (aside / STATE).write_text(json.dumps({**state, "accuracy": accuracy}))
        done = commit(aside, self.folder / f"step-{step:06d}")
        for old in superfluous(committed(self.folder), self.keep):
            shutil.rmtree(old)
        return done


def superfluous(checkpoints: Sequence[Path], keep: int) -> list[Path]:
    """Those that are neither among the `keep` newest nor the best by held-out accuracy."""
    known = {c: a for c in checkpoints if (a := state_of(c)["accuracy"]) is not None}
    best = max(known, key=lambda c: known[c], default=None)
    return [c for c in checkpoints[:-keep] if c != best]


def commit(aside: Path, final: Path) -> Path:
    """List what `aside` holds, rename it to `final`, and mark it last: half a checkpoint is never one."""
    listed = {str(f.relative_to(aside)): _described(f) for f in sorted(aside.rglob("*")) if f.is_file()}
    (aside / MANIFEST).write_text(json.dumps(listed, indent=1))
    shutil.rmtree(final, ignore_errors=True)
    aside.rename(final)
    (final / MARKER).touch()
    latest = final.parent / "latest"
    latest.unlink(missing_ok=True)
    latest.symlink_to(final.name)
    return final


def committed(folder: Path) -> list[Path]:
    """Checkpoints with their marker, oldest first."""
    return sorted(p.parent for p in folder.glob(f"step-*/{MARKER}"))


def complaint(checkpoint: Path) -> str:
    """What is wrong with a committed checkpoint; empty when every file is what its manifest says."""
    listed = json.loads((checkpoint / MANIFEST).read_text())
    for name, (size, digest) in listed.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is gone"
        if [size, digest] != _described(file):
            return f"{name} is not the file that was written"
    return ""


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest valid checkpoint, and a sentence for each newer one that is not."""
    passed_over: list[str] = []
    for checkpoint in reversed(committed(folder)):
        wrong = complaint(checkpoint)
        if not wrong:
            return checkpoint, passed_over
        passed_over.append(f"{checkpoint.name} is damaged ({wrong})")
    return None, passed_over


def state_of(checkpoint: Path) -> dict[str, Any]:
    """The driver's state in a checkpoint."""
    return json.loads((checkpoint / STATE).read_text())


def _described(file: Path) -> list[Any]:
    with file.open("rb") as opened:
        return [file.stat().st_size, hashlib.file_digest(opened, "blake2b").hexdigest()[:32]]
