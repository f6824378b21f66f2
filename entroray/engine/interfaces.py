"""Which network interface of this machine gloo and NCCL are told to take."""

import os
import socket
from collections.abc import Sequence

import psutil

from entroray.errors import PreflightError

VARIABLES = {"gloo": "GLOO_SOCKET_IFNAME", "nccl": "NCCL_SOCKET_IFNAME"}
LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Ray's switch for clusters of several nodes; off, it binds to loopback alone, on Linux too."""
_OURS: dict[str, str] = {}
"""Variables that `stay_on_loopback` has set, as it has."""


def stay_on_loopback() -> None:
    """Have Ray, gloo, NCCL and vLLM of a run of one machine listen on loopback; the shell's variables hold.

    Left to themselves gloo listens where the machine's name leads, NCCL on its first card, vLLM on that
    which leads out. Before they are imported; child processes inherit it.
    """
    name = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")][:1]
    wanted = {LOOPBACK: "0", "VLLM_HOST_IP": "127.0.0.1"}
    wanted |= {variable: each for variable in VARIABLES.values() for each in name}
    new = {variable: wanted[variable] for variable in wanted.keys() - os.environ.keys()}
    _OURS.update(new)
    os.environ.update(new)


def leave_loopback() -> None:
    """Undo `stay_on_loopback`, for a run that joins a cluster after all."""
    while _OURS:
        variable, value = _OURS.popitem()
        if os.environ.get(variable) == value:
            del os.environ[variable]


def check_interface(backend: str) -> None:
    """PreflightError if the variable that names interfaces to `backend` names none of this machine's."""
    variable, names = VARIABLES[backend], [*psutil.net_if_addrs()]
    said = os.environ.get(variable)
    if said and not (_of_gloo if backend == "gloo" else _of_nccl)(said, names):
        raise PreflightError(
            f"{variable}={said} is no interface of {socket.gethostname()}, which has {', '.join(names)}: set "
            f"{variable} to the one between the nodes, or unset it"
        )


def _of_gloo(said: str, names: Sequence[str]) -> bool:
    """Names with commas between, every one of which gloo opens."""
    return set(filter(None, said.split(","))) <= set(names)


def _of_nccl(said: str, names: Sequence[str]) -> bool:
    """Beginnings of names with commas between; after = whole names, after ^ those not to be taken."""
    listed = [part for part in said.lstrip("^=").split(",") if part]
    exact = said.lstrip("^").startswith("=")
    found = [name for name in names if any(name == x if exact else name.startswith(x) for x in listed)]
    return len(found) < len(names) if said.startswith("^") else bool(found)


def is_loopback(host: str) -> bool:
    """Whether nobody but this machine reaches what listens at `host`."""
    return host in ("localhost", "::1") or host.startswith("127.")


def interface_to(host: str, port: int) -> str:
    """The address of this machine from which `host` is reached, and its interface."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))  # sends nothing
        address = probe.getsockname()[0]
    found = [name for name, all_of in psutil.net_if_addrs().items() if address in [a.address for a in all_of]]
    return f"{address} on {', '.join(found) or 'no interface'}"


def hold_port(host: str) -> socket.socket:
    """A socket on a free port of `host`, this machine: as long as it lives nobody else is given the port.

    Whoever is told it may listen there, as torch and vLLM do, with SO_REUSEADDR; this one does not listen.
    """
    held = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("", 0))
    return held
