"""`entroray submit`: the run of `train` as a job of a Ray cluster, with the code and settings found here."""

import asyncio
import importlib.util
import os
import secrets
import shlex
import shutil
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from entroray import rows
from entroray.cli import flags
from entroray.cli.flags import CONFIG_DIR, Flag
from entroray.config import Config, Data, EvaluationSet, Part, user_files
from entroray.engine.interfaces import is_loopback
from entroray.errors import ConfigError, InfrastructureError, PreflightError, first_line
from entroray.wiring import compose
from entroray.wiring.overrides import quote

ADDRESS = "http://127.0.0.1:8265"
"""Where launch/ray-head.sh serves jobs unless told otherwise."""
GRACE = 60
"""Seconds a stopped job has to save a checkpoint; of itself Ray gives 3."""
LATER = "No available agent"
"""What Ray's job server says while no node can run a job yet."""
YOUNG = 60.0
"""Seconds a head has to get its job agent up; longer where its machine is busy."""
LARGEST = 100 << 20
"""Bytes of a file of rows that goes along with a job."""
RUNS = "~/entroray-runs"
"""Where a submitted run is written when `run.dir` is not given: at home on the head node."""


FLAGS = (Flag("address", "URL"), CONFIG_DIR)


def main(arguments: list[str]) -> int:
    """`submit [--address http://HEAD:8265] [--config-dir FOLDER] overrides`; the job's own exit code."""
    given, overrides = flags.parse_flags("submit", arguments, FLAGS)
    config_dir = given.get("config-dir")
    config, _ = compose.load_config(overrides, config_dir)
    with tempfile.TemporaryDirectory() as folder:
        command = pack(Path(folder), config, overrides, config_dir)
        client, job = _submit(given.get("address"), command, folder)
    return asyncio.run(_follow(client, job))


def pack(folder: Path, config: Config, overrides: list[str], config_dir: str | None) -> list[str]:
    """Code, conf and the files the settings name, copied into `folder`; returns the command to run there."""
    shutil.copytree(rows.PACKAGE, folder / "entroray", ignore=shutil.ignore_patterns("__pycache__"))
    if not (folder / "entroray" / "conf").is_dir():
        shutil.copytree(rows.conf_folder(), folder / "conf")
    command = ["python", "-m", "entroray", "train", *overrides, "cluster.address=auto"]
    if config_dir:
        shutil.copytree(config_dir, folder / "submitted-conf")
        command.append("--config-dir=submitted-conf")
    command += [f"{name}={quote(packed)}" for name, packed in _pack_files(folder, config)]
    for package in config.packages:
        _pack_package(folder, package.partition(".")[0])
    command += _pack_data(folder, config)
    if not Path(config.model.path).is_absolute() and Path(config.model.path).is_dir():
        raise PreflightError(
            f"model.path={config.model.path} is a folder here, which does not go along: give an absolute "
            "path of the cluster's nodes, or a hub id"
        )
    if not config.run.dir:
        run = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"  # another may be submitted now
        command.append(f"run.dir={quote(f'{RUNS}/{config.run.name}/{run}')}")
    elif not config.run.dir.startswith(("/", "~")):
        raise ConfigError(
            f"run.dir={config.run.dir} would lie in the packed code, which Ray deletes: give an absolute "
            "path of the cluster's nodes"
        )
    return command


def _pack_files(folder: Path, config: Config) -> Iterator[tuple[str, str]]:
    """Each setting that names a file of the user's, and its value in the job: the file, with its imports."""
    for number, (setting, path) in enumerate(user_files(config).items()):
        file, _, function = path.rpartition(":")
        source = Path(file or path).expanduser().resolve()
        if not source.is_file():
            raise PreflightError(f"{setting}={path}: there is no file {source}")
        place = Path(f"submitted-{number}")
        if not file:  # it imports nothing
            _copy(source, folder / place / source.name)
            yield setting, str(place / source.name)
            continue
        inside = [d for d in source.parents if (d / "__init__.py").is_file()]
        top = next((d for d in source.parents if d not in inside), source.parent)
        for each in sorted(top.iterdir()):
            if each.suffix == ".py" or (each / "__init__.py").is_file() or each.name == source.name:
                _copy(each, folder / place / each.name)
        yield setting, f"{place / source.relative_to(top)}:{function}"


def _pack_package(folder: Path, name: str) -> None:
    """A package of the user's own, which is not installed on the nodes: not one of site-packages."""
    spec = importlib.util.find_spec(name)
    if spec is None or not (spec.origin or spec.submodule_search_locations):
        raise PreflightError(
            f"packages=[{name}]: it cannot be imported here; its folder must be on PYTHONPATH"
        )
    source = Path(next(iter(spec.submodule_search_locations or [str(spec.origin)])))
    if not {"site-packages", "dist-packages"} & set(source.parts) and not (folder / source.name).exists():
        _copy(source, folder / source.name)


def _pack_data(folder: Path, config: Config) -> list[str]:
    """Files of rows that are named from here; what is named from the root lies on the nodes already."""
    parts: dict[str, Data | Part | EvaluationSet] = {
        "data": config.data,
        **{f"evaluate.sets.{name}": each for name, each in config.evaluate.sets.items()},
        **{f"data.parts.{name}": part for name, part in config.data.parts.items()},
    }
    settings = []
    for number, (name, part) in enumerate(parts.items()):
        source = Path(part.task)
        several = part.source == "table" and (source.is_dir() or bool(set("*?[") & set(part.task)))
        if part.source == "reasoning_gym" or source.is_absolute() or not (source.is_file() or several):
            continue
        if several or source.stat().st_size > LARGEST:
            raise PreflightError(
                f"{name}.task={part.task} does not go along, it is no single file below {LARGEST >> 20} MiB: "
                "give an absolute path of the cluster's nodes"
            )
        place = Path(f"submitted-data-{number}", source.name)
        _copy(source, folder / place)
        settings.append(f"{name}.task={quote(str(place))}")
    return settings


def _copy(source: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, to, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy(source, to)


def _submit(address: str | None, command: list[str], folder: str) -> tuple[Any, str]:
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    os.environ.setdefault("RAY_AUTH_MODE", "token")
    place = address or os.environ.get("RAY_API_SERVER_ADDRESS") or ADDRESS
    _refuse_open(place)
    try:
        client = JobSubmissionClient(place)
        environment = {"working_dir": folder, "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(GRACE)}}
        job = _accepted(lambda: client.submit_job(entrypoint=shlex.join(command), runtime_env=environment))
    except (ConnectionError, RuntimeError, AuthenticationError) as error:
        said = first_line(error)
        raise PreflightError(f"no job could be given to {place}: {said}. {_hint(said)}") from error
    print(f"submitted {job} to {place}: {shlex.join(command)}", flush=True)
    return client, job


def _refuse_open(place: str) -> None:
    """PreflightError where a job server serves whoever reaches it, unless RAY_AUTH_MODE says that it may."""
    host = urlsplit(place).hostname
    if os.environ["RAY_AUTH_MODE"] != "token" or not host or is_loopback(host):
        return
    try:
        urllib.request.urlopen(f"{place.rstrip('/')}/api/jobs/", timeout=10.0).close()
    except (OSError, ValueError):  # it wants a token, or is none; who is not there is told of below
        return
    raise PreflightError(
        f"{place} runs code of whoever reaches it, without a token: start it with RAY_AUTH_MODE=token, as "
        f"{rows.repository_file('launch/ray-head.sh')} does, or say "
        "RAY_AUTH_MODE=disabled here too if nobody else can reach it"
    )


def _hint(said: str) -> str:
    if LATER in said:
        return (
            "Its job agent did not come up: another Ray on its machine may hold the agent's port; start the "
            "head with --dashboard-agent-listen-port=<a free one>"
        )
    return (
        f"Is a head running there ({rows.repository_file('launch/ray-head.sh')}), and is its "
        "token here, in RAY_AUTH_TOKEN or ~/.ray/auth_token?"
    )


def _accepted(submit: Callable[[], str], within: float = YOUNG) -> str:
    """The job's id; a head that was just started has no agent to run it yet, and is asked again."""
    ends = time.monotonic() + within
    while True:
        try:
            return submit()
        except RuntimeError as error:  # Ray has no type of its own for it
            if LATER not in str(error) or time.monotonic() > ends:
                raise
        time.sleep(1.0)


async def _follow(client: Any, job: str) -> int:
    """Print the job's log until it ends, and return its code; Ctrl-C stops the job, and 130 is returned."""
    try:
        await _print_log(client, job)
    except asyncio.CancelledError:
        print(f"\nstopping {job}; a second Ctrl-C leaves it to itself", file=sys.stderr, flush=True)
        client.stop_job(job)
        await _print_log(client, job)
        return 130
    return _exit_code(client, job)


async def _print_log(client: Any, job: str) -> None:
    async for lines in client.tail_job_logs(job):
        print(lines, end="", flush=True)


def _exit_code(client: Any, job: str) -> int:
    info = client.get_job_info(job)
    if info.driver_exit_code is None:
        raise InfrastructureError(f"{job} ended as {info.status} without an exit code: {info.message}")
    return int(info.driver_exit_code)
