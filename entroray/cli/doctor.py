"""`entroray doctor`: everything that is wrong with a machine and a run's settings, at once, with remedies."""

import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from contextlib import closing
from functools import partial, wraps
from pathlib import Path

import psutil
import torch

from entroray import installation
from entroray.cli import flags, judge_trial
from entroray.cli.flags import CONFIG_DIR
from entroray.config import Config, judge_specs
from entroray.engine.interfaces import is_loopback
from entroray.errors import InfrastructureError, PreflightError, first_line
from entroray.policy.tokenizer import response_text
from entroray.reward.programs import Programs
from entroray.rows import repository_file
from entroray.wiring import actors, compose, dataset, memory, preflight
from entroray.workers import cluster, nodes
from entroray.workers.network import ask_here, try_network

FLAGS = (CONFIG_DIR,)


def main(arguments: list[str]) -> int:
    """`doctor [--config-dir FOLDER] overrides`; 0 when all is well, 3 when something is wrong."""
    given, overrides = flags.parse_flags("doctor", arguments, FLAGS)
    config, _ = compose.load_config(overrides, given.get("config-dir"))
    read = judge_trial.ReadOnce()
    of_data = [wraps(check)(partial(check, read=read)) for check in (data, prompt, judge)]
    findings = preflight.run_checks(
        config,
        (packages, tools, driver, *preflight.FAST, ports, network, ray_clusters, isolation, *of_data),
    )
    first = {found.said: found.name for found in reversed(findings) if found.wrong}
    for found in findings:
        again = found.wrong and first[found.said] != found.name
        said = f"not asked: `{first[found.said]}` says why" if again else found.said
        print(f"{'wrong' if found.wrong else 'ok':7}{found.name:14}{said}", flush=True)
    return 3 if any(f.wrong for f in findings) else 0


def packages(_: Config) -> str:
    """Versions installed against the exact ones this version was tested with."""
    found = installation.pins("cpu", "cuda", "liger", "wandb", "mlflow")
    other = [
        f"{name} {version} where {pin} was tested"
        for name, pin in found.items()
        if (version := installation.installed(name).partition("+")[0]) not in ("", pin)
    ]
    if other:
        raise PreflightError(f"{', '.join(other)}: run {installation.install_line()}")
    return f"{len(found)} at the tested versions, Python {sys.version.split()[0]}"


def tools(config: Config) -> str:
    """A compiler and ninja for DeepSpeed's op, or the op already compiled."""
    os.environ.update(cluster.environment())
    folder, left = installation.prepare_ops()
    compiled = [p.name for p in folder.rglob("*.so")]
    missing = [tool for tool in ("g++", "ninja") if not shutil.which(tool)]
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        missing.append("Python.h")
    if not compiled and missing:
        raise PreflightError(
            f"{' and '.join(missing)} not found and DeepSpeed's op is not compiled in {folder}: "
            f"apt-get install g++ python3.{sys.version_info[1]}-dev"
        )
    if not compiled and re.search(r"\s", str(folder)):
        raise PreflightError(
            f"{folder} has a space in it, with which torch links no op: make the environment elsewhere"
        )
    freed = [f"{lock} was left by a killed process, removed" for lock in left]
    told = [
        ", ".join(compiled) or "op not compiled yet",
        f"{', '.join(missing) or 'nothing'} missing",
        *freed,
    ]
    return "; ".join(told)


def isolation(config: Config) -> str:
    """What keeps a program that `reward.judge.fn=code` runs from this machine, as a trial of it shows."""
    used = any(spec.get("fn") == "code" for _, spec in judge_specs(config))
    try:
        with closing(Programs()) as programs:
            if used:
                programs.require(config.verifier.isolation)
            return programs.describe()
    except InfrastructureError as error:
        if used:
            raise
        return f"not needed; {error}"


def driver(config: Config) -> str:
    """The driver of this machine's cards is one that the pinned CUDA runs on."""
    if config.cluster.address:
        return f"to be asked of the cluster at {config.cluster.address}"
    found = memory.cards_here()
    return "no GPU is asked for" if actors.cpu_only(config.cluster) else memory.check_driver(found)


def ports(_: Config) -> str:
    """Loopback takes a server: Ray, gloo and the verifiers talk over it."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            return f"loopback gives ports, {server.getsockname()[1]} for one"
    except OSError as error:
        raise PreflightError(
            f"no port can be opened on 127.0.0.1 ({error}): look at firewall and limits"
        ) from error


def network(config: Config) -> str:
    """Two processes of this machine sum 1 MB as ranks do, over NCCL where there are two cards for them."""
    if config.cluster.address:
        return f"to be tried between the nodes of {config.cluster.address}"
    cards = 0 if actors.cpu_only(config.cluster) else torch.cuda.device_count()
    return try_network("127.0.0.1", ("rank 0", "rank 1"), "nccl" if cards > 1 else "gloo", ask_here)


def ray_clusters(config: Config) -> str:
    """The cluster asked for answers; on this machine no Ray is left over from a driver that is gone."""
    if config.cluster.address:
        return _joined(config, config.cluster.address)
    raylets = [p for p in psutil.process_iter(["name", "ppid"]) if p.info["name"] == "raylet"]
    stale = [p.pid for p in raylets if p.info["ppid"] == 1]
    if stale:
        raise PreflightError(
            f"Ray of a driver that is gone still runs (raylet {', '.join(map(str, stale))}): "
            "`ray stop`, unless it is a cluster of yours; then give cluster.address"
        )
    return f"a local one will be started on loopback; {len(raylets)} of other runs beside it"


def _joined(config: Config, address: str) -> str:
    """The cluster's arithmetic; what stands in the way is said before Ray waits for it."""
    token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    if not os.environ.get("RAY_AUTH_TOKEN") and not token.is_file():
        raise PreflightError(
            f"no token for {address}: copy the head's {token} to this node, or set RAY_AUTH_TOKEN"
        )
    host, _, port = address.removeprefix("ray://").partition(":")
    try:
        if port:
            socket.create_connection((host, int(port)), timeout=3).close()
        if port and not is_loopback(host):
            _refuse_open(address)
        rows = actors.join_cluster(config)
        told = [f"{address}: {rows}", *actors.placement_lines(config), _between_nodes(config)]
        return "; ".join(told)
    except (OSError, ValueError, RuntimeError, InfrastructureError) as error:
        raise PreflightError(
            f"cluster.address={address} cannot be joined ({first_line(error)}): start it with "
            f"{repository_file('launch/ray-head.sh')}, and compare address, Ray versions and tokens"
        ) from error
    finally:
        cluster.stop()


WITHOUT_TOKEN = "import ray, sys; ray.init(sys.argv[1], logging_level='CRITICAL', log_to_driver=False)"


def _refuse_open(address: str) -> None:
    """PreflightError where a process without the cluster's token may join it."""
    without = {k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH_")}
    asked = [sys.executable, "-c", WITHOUT_TOKEN, address]
    try:
        done = subprocess.run(
            asked, env={**without, "RAY_AUTH_MODE": "disabled"}, capture_output=True, timeout=60, check=False
        )
    except subprocess.TimeoutExpired:  # it is not let in
        return
    if done.returncode == 0:
        raise PreflightError(
            f"cluster.address={address} runs code of whoever reaches it, without a token: start its head and "
            f"every node with RAY_AUTH_MODE=token, as {repository_file('launch/ray-head.sh')} does"
        )


def _between_nodes(config: Config) -> str:
    """A sum over the nodes that were joined; by NCCL over those with cards, if cards are asked for."""
    on_cards = not actors.cpu_only(config.cluster)
    asked = [node for node in nodes.alive_nodes() if node.gpus or not on_cards]
    if len(asked) < 2:
        return "one node, which sums over nothing"
    ask = partial(cluster.ask_each_node, nodes=[node.id for node in asked], gpus=float(on_cards))
    names = [node.name for node in asked]
    return try_network(cluster.own_address(), names, "nccl" if on_cards else "gloo", ask)


Read = Callable[[Config], dataset.Dataset]


def data(config: Config, read: Read = judge_trial.read_few) -> str:
    """Rows are read, rendered, tokenised and split; of a generated task the first `ROWS`."""
    found = read(config)
    parts = f"{len(found.split.training)} training, {len(found.split.heldout)} held out"
    tasks = ", ".join(part.task for part in dataset.tasks(config.data, config.model.system).values())
    sets = "".join(f"; {line}" for line in dataset.set_lines(config, found))
    return f"{tasks}: {parts}; {found.dropped}{sets}"


def prompt(config: Config, read: Read = judge_trial.read_few) -> str:
    """The first prompt as the model reads it, special tokens written out, and what its template adds."""
    found = read(config)
    first = found.split.training[0]
    part = dataset.tasks(config.data, config.model.system)[first.domain]
    said = f"{len(first.token_ids)} tokens: {response_text(found.tokenizer, ())(first.token_ids)!r}"
    return "; ".join([said, *dataset.conversation(config, found.tokenizer, part).remarks()])


def judge(config: Config, read: Read = judge_trial.read_few) -> str:
    """The judge gives a verdict on a right answer where one is known, on an empty and on a long response."""
    return "; ".join(judge_trial.try_judges(config, read(config)))
