"""Checkpoints: written to a hidden folder, listed with sizes and hashes, committed by a marker file.

Every rank hashes what it wrote, all at once; the driver hashes its own file and lists the rest. A run goes on
from one whose sizes are as listed, and its hashes too up to `HASHED_BYTES`; of a larger one each rank hashes
what it reads. So damage is always noticed, and up to that size the checkpoint before is taken by itself.
"""

import asyncio
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entroray.errors import InfrastructureError, first_line, writing
from entroray.train.threads import in_thread

if TYPE_CHECKING:  # it imports Ray, which a rank does without
    from entroray.workers.cluster import Gang

MANIFEST, MARKER, STATE = "manifest.json", "COMMITTED", "driver.json"
HASHED_BYTES = 64 << 30
"""Of a checkpoint that is hashed before a run goes on from it: a minute at 1 GB/s, less on several cores."""
HASHERS = 8
"""Files hashed at a time: hashing leaves Python's lock to others."""
Fingerprint = list[Any]
"""A file's size in bytes and its hash."""
MAPPINGS = ("settings", "identity", "stagnation", "health", "stream")
"""What of a driver's state is one."""


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run: `<folder>/step-000010/`, the `keep` newest and the best."""

    folder: Path
    learner: "Gang"
    keep: int
    deadline: float
    size: int = 0
    """Bytes that must be free before one is written."""

    def __post_init__(self) -> None:
        for left in self.folder.glob(".step-*"):  # by a save that was killed
            shutil.rmtree(left, ignore_errors=True)

    async def save(self, step: int, state: Mapping[str, Any], accuracy: float | None = None) -> Path:
        """Every rank's part, the driver's state and the held-out accuracy, if known; the committed folder.

        InfrastructureError if the disk has no room, refuses or is too slow; nothing of the part that was
        written is left, and no other checkpoint is touched.
        """
        final, partial = self.folder / f"step-{step:06d}", self.folder / f".step-{step:06d}.part"
        remedy = (
            f"free some space, lower checkpoint.keep={self.keep} or, for a slow disk, raise "
            "driver.call_deadline; then go on with run.resume=auto"
        )
        with writing(final, remedy, self.size):
            sealing = False
            try:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
                parts = await self.learner.all(
                    lambda rank, h: h.save.remote(str(partial)), deadline=self.deadline
                )
                listed = {name: found for part in parts for name, found in part.items()}
                sealing = True
                return await in_thread(
                    lambda: self._seal(partial, final, {**state, "accuracy": accuracy}, listed)
                )
            except BaseException as error:  # boundary: it is raised again
                if not sealing or not isinstance(error, asyncio.CancelledError):  # else the thread is at it
                    shutil.rmtree(partial, ignore_errors=True)
                late = (
                    error.__cause__,
                    getattr(error.__cause__, "__cause__", None),
                )  # of a gang
                if any(isinstance(cause, TimeoutError) for cause in late):
                    raise TimeoutError(str(error)) from error
                raise

    def _seal(
        self, partial: Path, final: Path, state: Mapping[str, Any], listed: Mapping[str, Fingerprint]
    ) -> Path:
        (partial / STATE).write_text(json.dumps(state))
        done = commit(partial, final, listed)
        for old in expired(committed(self.folder), self.keep):
            old.unlink() if old.is_symlink() else shutil.rmtree(old)
        return done


def expired(checkpoints: Sequence[Path], keep: int) -> list[Path]:
    """Those that are neither among the `keep` newest nor the best by held-out accuracy."""
    known = {c: a for c in checkpoints if (a := _state(c).get("accuracy")) is not None}
    best = max(known, key=lambda c: known[c], default=None)
    return [c for c in checkpoints[:-keep] if c != best]


def written_by(rank: int, folder: Path) -> list[Path]:
    """The files of a checkpoint that `rank` wrote: those that bear its number; rank 0 what bears none."""
    done = [f for f in _files(folder) if not f.name.startswith(".")]  # others may still be writing theirs
    numbers = {f: re.match(r"(?:rank|rng)-(\d+)", f.name) for f in done}
    own = {f: int(found[1]) if found else 0 for f, found in numbers.items()}
    listings = (MANIFEST, MARKER, STATE)
    return [f for f, owner in own.items() if owner == rank and f.name not in listings]


def seal(folder: Path, files: Iterable[Path]) -> dict[str, Fingerprint]:
    """Have the disk hold these files of a checkpoint; size and hash of each by its name in `folder`."""
    found = {str(f.relative_to(folder)): _fingerprint(f) for f in files}
    for name in found:
        _flush(folder / name)
    return found


def commit(partial: Path, final: Path, listed: Mapping[str, Fingerprint] = {}) -> Path:
    """Write a manifest of `partial`, then the marker, and rename it to `final`.

    Everything is on the disk before the marker is, so that a power cut leaves a whole checkpoint or none. The
    files `listed` were sealed by who wrote them: InfrastructureError if one is not there as it was.
    """
    there = {str(f.relative_to(partial)): f for f in _files(partial)}
    for name, (size, _) in listed.items():
        if name not in there or there[name].stat().st_size != size:
            raise InfrastructureError(
                f"{partial / name} is not as a rank wrote it: run.dir must be a folder that all nodes share"
            )
    manifest = {**listed, **seal(partial, (f for name, f in there.items() if name not in listed))}
    (partial / MANIFEST).write_text(json.dumps(dict(sorted(manifest.items())), indent=1))
    folders = [f for f in partial.rglob("*") if f.is_dir()]
    for written in (partial / MANIFEST, *folders, partial):
        _flush(written)
    (partial / MARKER).touch()
    _flush(partial)
    aside = final.with_name(f".{final.name}.old")
    if final.exists():  # of this step too: whole until the new one stands in its place
        final.rename(aside)
    partial.rename(final)
    _flush(final.parent)
    shutil.rmtree(aside, ignore_errors=True)
    if said := point_link(final.parent / "latest", final):
        print(said, flush=True)
    return final


def point_link(link: Path, target: Path) -> str:
    """Have `link` point to `target`, by a relative path; why not, in words, where it is no link.

    A folder that stands in its place, as `cp -rL` leaves one, is somebody's copy: it is left alone.
    """
    if link.exists() and not link.is_symlink():
        return (
            f"{link} is no link, so it is left as it is and does not lead to {target}: delete it to have it"
        )
    aside = link.with_name(f".{link.name}-{os.getpid()}")
    try:
        aside.unlink(missing_ok=True)
        aside.symlink_to(os.path.relpath(target.resolve(), link.parent.resolve()))
        os.replace(aside, link)  # another run may do the same now
    except OSError as error:
        return f"{link} cannot be made to lead to {target}: {error.strerror}"
    return ""


def _flush(path: Path) -> None:
    """Have the disk hold a file, or the names in a folder, before what is written next."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def committed(folder: Path) -> list[Path]:
    """Checkpoints with their marker, oldest first; a folder that somebody renamed is none of them."""
    found = {p.parent: p.parent.name.removeprefix("step-") for p in folder.glob(f"step-*/{MARKER}")}
    numbered = {path: int(number) for path, number in found.items() if number.isdecimal()}
    return sorted(numbered, key=lambda path: numbered[path])


def complaint(checkpoint: Path) -> str:
    """What is wrong with a committed checkpoint; empty if every file is as its manifest says."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_bytes())
        hashed = {} if _large(manifest) else manifest
        if wrong := _other_sizes(checkpoint, manifest) or _other_hashes(checkpoint, hashed):
            return wrong
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:  # not there, or no JSON
        return f"{MANIFEST} or what it lists cannot be read: {first_line(error)}"
    return _wrong_state(checkpoint) if STATE in manifest else f"{MANIFEST} does not list {STATE}"


def damage(checkpoint: Path, rank: int, ranks: int) -> str:
    """What is wrong with this rank's share of the files, where `complaint` left out hashes; else empty."""
    file = checkpoint / MANIFEST
    manifest = json.loads(file.read_bytes()) if file.is_file() else {}  # none before it is committed
    own = sorted(manifest)[rank::ranks] if _large(manifest) else []
    return _other_hashes(checkpoint, {name: manifest[name] for name in own})


def _large(manifest: Mapping[str, Fingerprint]) -> bool:
    return sum(size for size, _ in manifest.values()) > HASHED_BYTES


def _other_sizes(checkpoint: Path, manifest: Mapping[str, Fingerprint]) -> str:
    """Which file is not there, or of another size than listed; empty if none."""
    for name, (size, _) in manifest.items():
        if not (checkpoint / name).is_file():
            return f"{name} is gone"
        if (checkpoint / name).stat().st_size != size:
            return f"{name} is not the file that was written"
    return ""


def _other_hashes(checkpoint: Path, manifest: Mapping[str, Fingerprint]) -> str:
    with ThreadPoolExecutor(HASHERS) as threads:
        found = threads.map(lambda name: _fingerprint(checkpoint / name), manifest)
        wrong = [name for name, each in zip(manifest, found, strict=True) if manifest[name] != each]
    return f"{wrong[0]} is not the file that was written" if wrong else ""


def _wrong_state(checkpoint: Path) -> str:
    """What of the driver's state no run can go on from; empty if nothing."""
    state, step = _state(checkpoint), int(checkpoint.name.removeprefix("step-"))
    if type(state.get("version")) is not int or state["version"] != step:
        return f"{STATE} is of version {state.get('version')!r}"
    wrong = [name for name in MAPPINGS if not isinstance(state.get(name, {}), dict)]
    if not wrong and "ledger" not in state.get("stream", {"ledger": {}}):
        return f"{STATE} has no ledger, as those of an older version of entroray: go on with that version"
    return f"{STATE} has no mapping under {wrong[0]}" if wrong else ""


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest valid checkpoint, and a sentence for each newer one that cannot be gone on from."""
    wrong: list[str] = []
    for aside in folder.glob(".step-*.old"):  # a save of a step again was ended between its two renames
        if not (final := folder / aside.stem.removeprefix(".")).exists():
            aside.rename(final)
    bare = [
        f"{p.name} has no {MARKER}: if it is whole, make an empty file of that name in it"
        for p in _unmarked(folder)
    ]
    for checkpoint in reversed(committed(folder)):
        why = complaint(checkpoint)
        if not why:
            return checkpoint, wrong
        wrong.append(f"{checkpoint.name} is damaged ({why})")
    marked = sorted(marker.parent for marker in folder.glob(f"*/{MARKER}"))
    others = [p.name for p in marked if p not in committed(folder) and not p.is_symlink()]
    return None, [*wrong, *bare, *(f"{name} is not called step- and a number" for name in others)]


def _unmarked(folder: Path) -> list[Path]:
    """Checkpoints that were all written and have lost their marker, as an empty file is lost in a copy."""
    found = [p for p in sorted(folder.glob("step-*")) if p.is_dir() and not p.is_symlink()]
    return [p for p in found if (p / MANIFEST).is_file() and not (p / MARKER).exists()]


def driver_state(checkpoint: Path) -> dict[str, Any]:
    """The driver's state in a checkpoint."""
    return json.loads((checkpoint / STATE).read_text())


def _state(checkpoint: Path) -> dict[str, Any]:
    """As `driver_state`, and nothing where the file is damaged."""
    try:
        state = driver_state(checkpoint)
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def _files(folder: Path) -> list[Path]:
    return [f for f in sorted(folder.rglob("*")) if f.is_file()]


def _fingerprint(file: Path) -> Fingerprint:
    """Its size in bytes and hash."""
    with file.open("rb") as opened:
        return [file.stat().st_size, hashlib.file_digest(opened, "blake2b").hexdigest()[:32]]
