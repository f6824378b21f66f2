"""Where ranks meet: on loopback in a run of one machine."""

import socket
from datetime import timedelta

import psutil
import pytest
import torch

from entroray.workers import deepspeed_backend


def listening() -> set[tuple[str, int]]:
    """Addresses and ports on which this process listens."""
    return {
        (c.laddr.ip, c.laddr.port) for c in psutil.Process().net_connections("tcp") if c.status == "LISTEN"
    }


def meet(monkeypatch: pytest.MonkeyPatch, host: str) -> tuple[set[str], int]:
    """Addresses on which the store of a single rank at `host` listens, and what it stored."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", host)
    monkeypatch.setenv("MASTER_PORT", str(port))
    store = deepspeed_backend._store(0, 1, timedelta(seconds=20))
    there = torch.distributed.TCPStore(host, port, 1, False, timedelta(seconds=20))
    there.set("met", "7")
    return {address for address, its in listening() if its == port}, int(store.get("met"))


def test_ranks_of_one_machine_listen_on_loopback_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    assert meet(monkeypatch, "127.0.0.1") == ({"127.0.0.1"}, 7)
    assert deepspeed_backend.os.environ["GLOO_SOCKET_IFNAME"].startswith("lo")


def test_ranks_of_several_machines_meet_on_an_address_that_others_reach(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    addresses = [
        each.address
        for all_of_one in psutil.net_if_addrs().values()
        for each in all_of_one
        if each.family == socket.AF_INET and not each.address.startswith("127.")
    ]
    if not addresses:
        pytest.skip("NOT TESTED: this machine has loopback alone")
    found, met = meet(monkeypatch, addresses[0])
    assert met == 7 and found & {"0.0.0.0", "::", addresses[0]}
