"""Nodes of a Ray cluster on this one machine: network namespaces on a bridge, whose links can be cut."""

import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

ROOT_ONLY = pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("ip"), reason="NOT TESTED: nodes of their own: root and iproute2"
)
REACHED = "import socket, sys; socket.create_connection((sys.argv[1], 6379), 1.0).close()"


def ip(*arguments: str, check: bool = True) -> str:
    done = subprocess.run(["ip", *arguments], check=check, capture_output=True, text=True, timeout=20)
    return done.stdout


@dataclass(frozen=True)
class Network:
    """Of a short name; node n is at 10.99.0.n+1, the head is node 0."""

    name: str
    count: int

    def namespace(self, node: int) -> str:
        return f"entroray-{self.name}{node}"

    def within(self, node: int, *command: str) -> list[str]:
        return ["ip", "netns", "exec", self.namespace(node), *command]

    def cut(self, node: int) -> None:
        """Whatever it sends or is sent is lost, and nobody is told."""
        ip("link", "set", f"er{self.name}{node}", "nomaster")

    def heal(self, node: int) -> None:
        ip("link", "set", f"er{self.name}{node}", "master", f"er{self.name}")

    def reaches_head(self, node: int) -> bool:
        command = self.within(node, sys.executable, "-c", REACHED, "10.99.0.1")
        return not subprocess.run(command, capture_output=True, timeout=30, check=False).returncode

    def processes(self, node: int) -> list[psutil.Process]:
        found = map(int, ip("netns", "pids", self.namespace(node)).split())
        return [psutil.Process(pid) for pid in found if psutil.pid_exists(pid)]


@contextmanager
def network(name: str, count: int) -> Iterator[Network]:
    """Namespaces on one bridge, until it is left."""
    made, bridge = Network(name, count), f"er{name}"
    try:
        ip("link", "add", bridge, "type", "bridge")
        ip("link", "set", bridge, "up")
        for node in range(count):
            space, link = made.namespace(node), f"{bridge}{node}"
            ip("netns", "add", space)
            ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", space)
            ip("link", "set", link, "master", bridge, "up")
            ip("-n", space, "addr", "add", f"10.99.0.{node + 1}/24", "dev", "eth0")
            ip("-n", space, "link", "set", "eth0", "up")
            ip("-n", space, "link", "set", "lo", "up")
        yield made
    finally:
        for node in range(count):
            ip("netns", "del", made.namespace(node), check=False)
        ip("link", "del", bridge, check=False)


@dataclass
class Nodes:
    """Raylets of a cluster, the first with its head, and the environment of whoever joins it."""

    network: Network
    folder: Path
    environment: dict[str, str]
    started: list[subprocess.Popen] = field(default_factory=list)

    def start(self, node: int, cpus: int, *told: str) -> None:
        """Of so many cores; returns once it takes actors."""
        joins = (
            ["--head", "--port=6379", "--include-dashboard=false"]
            if node == 0
            else ["--address=10.99.0.1:6379"]
        )
        ray = [str(Path(sys.executable).with_name("ray")), "start", *joins, *told]
        ray += [f"--node-ip-address=10.99.0.{node + 1}", f"--num-cpus={cpus}", "--block"]
        out = (self.folder / f"node{node}.log").open("wb")
        command = self.network.within(node, *ray, "--disable-usage-stats")
        self.started.append(
            subprocess.Popen(command, env=self.environment, stdout=out, stderr=subprocess.STDOUT)
        )
        said, end = self.folder / f"node{node}.log", time.monotonic() + 120.0
        while "Ray runtime started" not in said.read_text():
            assert time.monotonic() < end and self.started[-1].poll() is None, said.read_text()[-3000:]
            time.sleep(0.2)

    def end(self) -> None:
        """Every process of every node is gone."""
        ours = [p for node in range(self.network.count) for p in self.network.processes(node)]
        for process in self.started:
            process.terminate()
        _, alive = psutil.wait_procs(ours, timeout=20)
        for left in alive:
            left.kill()
        for process in self.started:
            process.wait(timeout=20)


@contextmanager
def nodes(name: str, cpus: Sequence[int], *told: str) -> Iterator[Nodes]:
    """A cluster of as many nodes as there are numbers of cores; `told` to each `ray start`."""
    name += str(os.getpid())  # others may be at it on this machine
    folder = Path(f"/tmp/ray-{name}")  # a short name: sockets lie in it
    own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_TMPDIR": str(folder)}
    own |= {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | own
    folder.mkdir()
    with network(name, len(cpus)) as made:
        cluster = Nodes(made, folder, environment)
        try:
            for node, each in enumerate(cpus):
                cluster.start(node, each, *told)
            yield cluster
        finally:
            cluster.end()
            shutil.rmtree(folder, ignore_errors=True)
