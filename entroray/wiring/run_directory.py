"""The run directory: where it is, what it was begun with, and what is written there before the first step."""

import fcntl
import json
import os
import platform
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from entroray import __version__
from entroray.config import USER_FILES, Config, Run
from entroray.errors import DataError, PreflightError
from entroray.installation import STACK, installed
from entroray.observe.journal import read_metrics, refuse_links, replace_text
from entroray.policy.lora import WEIGHTS, read_config
from entroray.policy.safetensors_header import read_header, tensor_shapes
from entroray.rows import PACKAGE, in_checkout
from entroray.wiring.overrides import setting_type
from entroray.workers import checkpoint

PACKAGES = (*STACK, "hydra-core", "reasoning-gym")
FILES = ("metrics.jsonl", "events.jsonl", "config.yaml", "manifest.json")
LEFT = (*FILES[:3], "checkpoints", "model")
"""What a run leaves: a folder with one of these holds a run."""
RESUME: Mapping[str, tuple[str, str]] = {
    setting: (kind, why)
    for setting, kind, why in (
        line.split("\t") for line in Path(__file__).with_name("resume.tsv").read_text().splitlines()
    )
}
"""Setting, or the beginning of several -> what a resumption does about another value (`free`, `fixed` or
`own`, which is the command's and not the run's), and why. The longest beginning holds; `*` is any name."""


@dataclass(frozen=True)
class RunDirectory:
    """Where a run lives, and the checkpoint it goes on from."""

    folder: Path
    checkpoint: Path | None = None
    state: Mapping[str, Any] = field(default_factory=dict)
    """Of the driver, when there is a checkpoint."""
    changed: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    """Setting -> its value until now and from now on."""
    lock: Any = None
    """Held as long as this lives, so that no other run writes there."""

    @property
    def resume(self) -> tuple[Path, int] | None:
        return (self.checkpoint, self.state["version"]) if self.checkpoint else None


def resume_run(run: Run, tree: DictConfig) -> RunDirectory | None:
    """The run that `run.resume=auto` goes on with, if there is one.

    PreflightError if it is damaged, is written by another process, or was begun with other settings.
    """
    if run.resume != "auto":
        return None
    folder = place(run.dir) if run.dir else _unfinished(run.name, tree)
    if run.dir and folder and (any(folder.glob("*/COMMITTED")) or (folder / "COMMITTED").exists()):
        raise PreflightError(
            f"run.dir={run.dir} is a checkpoint of a run, or holds some: give the run's folder"
        )
    if folder is None or not holds_run(folder):
        return None
    lock = lock_folder(folder)
    return replace(_resumed(folder, run.steps, plain(tree)), lock=lock)


def new_run(run: Run) -> RunDirectory:
    """A folder of its own for a new run; PreflightError where `run.dir` holds one or cannot be made."""
    given = place(run.dir) if run.dir else None
    if given:
        make_folder(given, "run.dir")
    folder = given or _new_folder(Path("runs", run.name))
    lock = lock_folder(folder)
    if given:
        check_free(given)
    elif said := checkpoint.point_link(Path("runs", "latest"), folder):
        print(said, flush=True)
    return RunDirectory(folder, lock=lock)


def _new_folder(parent: Path) -> Path:
    """A folder named by the time, which no other run has, even one begun in the same second."""
    make_folder(parent, "run.name: the folder")
    now = time.strftime("%Y%m%d-%H%M%S")
    for name in (now, *(f"{now}-{number}" for number in range(2, 1000))):
        folder = parent.resolve() / name
        with suppress(FileExistsError):
            folder.mkdir()
            return folder
    raise PreflightError(f"{parent.resolve()} has 999 runs of this second: give run.dir")


def make_folder(folder: Path, setting: str) -> None:
    """Make a folder unless it is there; PreflightError, by the setting that names it, if it cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PreflightError(f"{setting}={folder} cannot be made ({error.strerror}): give another") from error


def place(given: str, setting: str = "run.dir") -> Path:
    """The folder that `setting` names, made or not; PreflightError where it can be none."""
    try:
        if unset := re.search(r"\$\w+", given):
            raise ValueError(f"{unset[0]} is not filled in: write it outside of single quotes")
        named = Path(given).expanduser()
        folder = named.resolve()
        if named.is_symlink() and not named.exists():
            raise OSError(f"it is a link to {os.readlink(named)}, which is not there")
        if folder.exists() and not folder.is_dir():
            raise OSError("it is no folder")
    except (OSError, RuntimeError, ValueError) as error:
        raise PreflightError(f"{setting}={given}: {error}; give another {setting}") from error
    return folder


def check_place(run: Run) -> str:
    """Where the run would be, in words; PreflightError if nothing can be written there."""
    folder = place(run.dir or str(Path("runs", run.name)))
    there = next(p for p in (folder, *folder.parents) if p.exists())
    try:
        tempfile.TemporaryDirectory(prefix=".entroray-", dir=there).cleanup()
    except OSError as error:
        raise PreflightError(
            f"run.dir={folder}: nothing can be written in {there} ({error.strerror}): give another run.dir"
        ) from error
    if run.dir and run.resume != "auto":
        check_free(folder)
    if (folder / ".lock").exists():
        lock_folder(folder).close()
    return run.dir or f"runs/{run.name}/<time>"


def lock_folder(folder: Path) -> Any:
    """The folder's lock, open; the kernel lets go of it when this process ends, however it ends."""
    try:
        how = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
        lock = os.fdopen(os.open(folder / ".lock", how, 0o666), "a+")
    except OSError as error:
        raise PreflightError(f"run.dir={folder}: {error}; give another run.dir") from error
    for take in (fcntl.flock, fcntl.lockf):  # some network file systems know the older one alone
        try:
            take(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError as error:
            lock.seek(0)
            raise PreflightError(
                f"run.dir={folder} is being written by another run ({lock.read().strip()}): wait for it, "
                "stop it, or give another run.dir"
            ) from error
        except OSError as error:
            why = error.strerror
    else:
        print(f"{folder}: {why}, so nothing keeps another run from writing there", flush=True)
    lock.truncate(0)
    print(f"process {os.getpid()} on {platform.node()}", file=lock, flush=True)
    return lock


def holds_run(folder: Path) -> str:
    """The first thing in `folder` that only a run leaves; empty without any."""
    return next((name for name in LEFT if os.path.lexists(folder / name)), "")


def check_free(folder: Path | None) -> None:
    """PreflightError when `folder` holds a run already."""
    if folder and (found := holds_run(folder)):
        raise PreflightError(
            f"run.dir={folder} already holds a run ({found}): give another, delete it, or go on with "
            "run.resume=auto"
        )


def finished(run: Run) -> str:
    """That the run of `run.dir` has done what is asked of it, in words; empty if `train` has work to do."""
    folder = place(run.dir) if run.dir and run.resume == "auto" else None
    last = _last_line(folder) if folder else {}
    if folder is None or not last or not _is_whole(folder / "model"):
        return ""
    if last["step"] < run.steps and not 0 < run.tokens <= last.get("tokens/drawn", 0):
        return ""
    return (
        f"resume: {folder} is finished after {last['step']} steps and is left alone, its model is "
        f"{folder / 'model'}: raise run.steps to go on from its last checkpoint, or give another run.dir"
    )


def _is_whole(model: Path) -> bool:
    """Whether every file of weights, of a model or an adapter, is as long as its header says."""
    try:
        return bool(read_header(model / WEIGHTS) if read_config(str(model)) else tensor_shapes(model))
    except (OSError, PreflightError):
        return False


def _last_line(folder: Path) -> Mapping[str, Any]:
    """Of the metrics; nothing where there is none that can be read."""
    try:
        return next(reversed(read_metrics(folder / "metrics.jsonl")), {})
    except DataError:
        return {}


def _resumed(folder: Path, steps: int, settings: Mapping[str, Any]) -> RunDirectory:
    refuse_links(folder)
    for path in (folder / name for name in FILES):
        if os.path.lexists(path) and not path.is_file():
            raise PreflightError(f"{path} is no file: move it away, the run goes on without it")
    if os.path.lexists(folder / "checkpoints") and not (folder / "checkpoints").is_dir():
        raise PreflightError(f"{folder / 'checkpoints'} is no folder: move it away to start the run over")
    found, passed_over = checkpoint.newest(folder / "checkpoints")
    for sentence in passed_over:
        print(f"resume: {sentence}, trying an older one", flush=True)
    state = checkpoint.driver_state(found) if found else {}
    began = state.get("settings") or read_settings(folder / "config.yaml")
    if began is None:
        print(f"resume: {folder / 'config.yaml'} cannot be read: settings are not compared", flush=True)
    changed = compare(folder, began or settings, settings)
    if found is None:
        check_beginning(folder, passed_over)
        print(f"resume: {folder} has no checkpoint yet, starting it over", flush=True)
        return RunDirectory(folder, changed=changed)
    if state["version"] > steps:
        raise PreflightError(
            f"{found} is at step {state['version']} of run.steps={steps}: raise run.steps to go on"
        )
    print(f"resume: going on after step {state['version']} of {steps} from {found}", flush=True)
    if _last_line(folder).get("step", 0) < state["version"]:
        print(f"resume: {folder / 'metrics.jsonl'} has lost steps before that one", flush=True)
    return RunDirectory(folder, found, state, changed)


def check_beginning(folder: Path, passed_over: list[str]) -> None:
    """PreflightError where starting over would destroy more than steps of a run that was cut short."""
    if passed_over:
        raise PreflightError(
            f"run.dir={folder} has no checkpoint to go on from: {'; '.join(passed_over)}. Mend one, or "
            f"delete {folder / 'checkpoints'} to start the run over"
        )
    if (folder / "model").exists():
        raise PreflightError(
            f"run.dir={folder} has trained a model and kept no checkpoint to go on from (checkpoint.every): "
            f"start another run from its weights: model.path={folder / 'model'}, learner.lr, another run.dir"
        )


def _unfinished(name: str, tree: DictConfig) -> Path | None:
    """The newest run without an exported model of the same settings, else of the same `fixed` ones.

    A run whose settings are lost is none.
    """
    files = sorted(Path("runs", name).glob("*/config.yaml"), reverse=True)
    found = {f.parent: s for f in files if not (f.parent / "model").exists() and (s := read_settings(f))}
    for rules in (("fixed", "free"), ("fixed",)):
        mine = _ruled(plain(tree), rules)
        for folder, theirs in found.items():
            if _ruled(theirs, rules) == mine:
                return folder.resolve()
    print(
        f"resume: no unfinished run in {Path('runs', name)} has these settings, a new one begins", flush=True
    )
    return None


def plain(tree: DictConfig) -> dict[str, Any]:
    """Settings as JSON holds them, in a checkpoint too."""
    return json.loads(json.dumps(OmegaConf.to_container(tree, resolve=True)))


def read_settings(file: Path) -> dict[str, Any] | None:
    """The settings in a run's config.yaml; None if it is gone, empty, cut short or something else."""
    try:
        tree = OmegaConf.load(file)
        return plain(tree) if isinstance(tree, DictConfig) and tree else None
    except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException):
        return None


def flatten(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting by its dotted path; lists are whole."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + str(name), value


def resume_rule(path: str) -> tuple[str, str]:
    """What a resumption does about another value of a setting, and why."""
    parts = path.split(".")
    beginnings = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next(
        (rule for each in beginnings for known, rule in RESUME.items() if fnmatchcase(each, known)),
        ("fixed", ""),
    )


def _ruled(settings: Mapping[str, Any], rules: Sequence[str]) -> dict[str, Any]:
    """The settings for which one of `rules` holds."""
    return {path: value for path, value in flatten(settings) if resume_rule(path)[0] in rules}


def compare(folder: Path, began: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings that change when the run goes on, each said; PreflightError for those that cannot.

    A setting that an older version did not have counts as its default.
    """
    usual = dict(flatten(asdict(Config())))
    was, now = (usual | _ruled(settings, ("fixed", "free")) for settings in (began, given))
    pairs = {path: (was.get(path), now.get(path)) for path in sorted(was | now)}
    other = {path: pair for path, pair in pairs.items() if not _alike(path, *pair)}
    moved = {c.get("knob") for c in given.get("control", {}).values() if isinstance(c, dict)}
    fixed = [p for p in other if resume_rule(p)[0] == "fixed" or p in moved]
    if gone := [path for path in fixed if setting_type(path) is None]:
        raise PreflightError(
            f"run.dir={folder} is a run of another version of entroray, with {', '.join(gone[:8])}, which "
            "this one has not: go on with that version, or begin another run with another run.dir"
        )
    if fixed:
        said = "; ".join(f"{p}={other[p][1]} where the run has {other[p][0]}" for p in fixed[:8])
        raise PreflightError(
            f"run.dir={folder} was begun with other settings, which a run keeps: {said}. Give it the values "
            f"it has ({folder / 'config.yaml'}), or begin another run with another run.dir"
        )
    for path, (old, new) in other.items():
        why = f" ({resume_rule(path)[1]})" if resume_rule(path)[1] else ""
        print(f"resume: {path}={new} from here on, it was {old}{why}", flush=True)
    return other


def _alike(setting: str, old: Any, new: Any) -> bool:
    """Whether two values are one, or two ways to write one path."""
    path = setting in USER_FILES or setting.endswith((".path", ".task"))
    written = path and isinstance(old, str) and isinstance(new, str)
    return old == new or (written and os.path.realpath(old) == os.path.realpath(new))


def check_same_data(run: RunDirectory, identity: Mapping[str, str]) -> None:
    """PreflightError where what a setting names holds something else than when the run began."""
    for setting, known in run.state.get("identity", {}).items():
        if identity.get(setting) != known:
            raise PreflightError(
                f"run.dir={run.folder}: the content of what {setting} names has changed since the run began: "
                "put the old content back, or begin another run with another run.dir"
            )


def write_manifest(folder: Path, settings: str, facts: dict[str, Any]) -> None:
    """Write config.yaml, which is `settings`, and manifest.json (versions, seeds, hashes)."""
    replace_text(folder / "config.yaml", settings)
    versions = {"entroray": __version__, **{name: v for name in PACKAGES if (v := installed(name))}}
    found = {"python": platform.python_version(), "packages": versions, "commit": commit()}
    replace_text(folder / "manifest.json", json.dumps(found | facts, indent=2, default=str))


def code_version() -> str:
    """The commit of the checkout, else the version of the package."""
    return commit() or __version__


def commit() -> str | None:
    """The checkout's commit, when there is one; not that of a repository around the environment."""
    if not in_checkout():
        return None
    try:
        asked = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=PACKAGE,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except FileNotFoundError:
        return None
    return asked.stdout.strip() or None
