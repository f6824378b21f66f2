"""Checkpoints: written to a hidden folder, listed with sizes and hashes, committed by a marker file."""

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
        partial = self.folder / f".step-{step:06d}.part"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        await self.learner.all(lambda rank, h: h.save.remote(str(partial)), deadline=self.deadline)
        (partial / STATE).write_text(json.dumps({**state, "accuracy": accuracy}))
        done = commit(partial, self.folder / f"step-{step:06d}")
        for old in expired(committed(self.folder), self.keep):
            shutil.rmtree(old)
        return done


def expired(checkpoints: Sequence[Path], keep: int) -> list[Path]:
    """Those that are neither among the `keep` newest nor the best by held-out accuracy."""
    known = {c: a for c in checkpoints if (a := driver_state(c)["accuracy"]) is not None}
    best = max(known, key=lambda c: known[c], default=None)
    return [c for c in checkpoints[:-keep] if c != best]


def commit(partial: Path, final: Path) -> Path:
    """Write a manifest of `partial`, rename it to `final`, and write the marker last."""
    files = [f for f in sorted(partial.rglob("*")) if f.is_file()]
    manifest = {str(f.relative_to(partial)): _fingerprint(f) for f in files}
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    (final / MARKER).touch()
    latest = final.parent / "latest"
    latest.unlink(missing_ok=True)
    latest.symlink_to(final.name)
    return final


def committed(folder: Path) -> list[Path]:
    """Checkpoints with their marker, oldest first."""
    return sorted(p.parent for p in folder.glob(f"step-*/{MARKER}"))


def complaint(checkpoint: Path) -> str:
    """What is wrong with a committed checkpoint; empty if every file is as its manifest says."""
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    for name, (size, digest) in manifest.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is gone"
        if [size, digest] != _fingerprint(file):
            return f"{name} is not the file that was written"
    return ""


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest valid checkpoint, and a sentence for each newer one that is damaged."""
    damaged: list[str] = []
    for checkpoint in reversed(committed(folder)):
        wrong = complaint(checkpoint)
        if not wrong:
            return checkpoint, damaged
        damaged.append(f"{checkpoint.name} is damaged ({wrong})")
    return None, damaged


def driver_state(checkpoint: Path) -> dict[str, Any]:
    """The driver's state in a checkpoint."""
    return json.loads((checkpoint / STATE).read_text())


def _fingerprint(file: Path) -> list[Any]:
    """Its size in bytes and hash."""
    with file.open("rb") as opened:
        return [file.stat().st_size, hashlib.file_digest(opened, "blake2b").hexdigest()[:32]]
