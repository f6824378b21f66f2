"""What of the driver's shell reaches every node, and what is wrong with a network before anybody waits."""

import inspect
import os
import socket
from collections import namedtuple
from typing import Any

import psutil
import pytest
import torch

from entroray.engine import interfaces
from entroray.engine.interfaces import check_interface, hold_port
from entroray.errors import InfrastructureError, PreflightError
from entroray.wiring import preflight
from entroray.workers import cluster, network
from entroray.workers.deepspeed_backend import DeepSpeedBackend
from tests.composed import configured

SHELL = {
    "NCCL_SOCKET_IFNAME": "eth1",
    "NCCL_DEBUG": "INFO",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
    "GLOO_SOCKET_IFNAME": "eth2",
    "HF_HOME": "/shared/hf",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_ATTENTION_BACKEND": "TRITON_ATTN",
    "CUDA_LAUNCH_BLOCKING": "1",
}
STAYS = {
    "CUDA_VISIBLE_DEVICES": "3",
    "CUDA_HOME": "/usr/local/cuda",
    "NCCL_HOSTID": "here",
    "VLLM_HOST_IP": "10.0.0.1",
    "AWS_PROFILE": "mine",
}
SECRETS = {
    "HF_TOKEN": "hf_secret",
    "HUGGING_FACE_HUB_TOKEN": "hf_other",
    "VLLM_API_KEY": "my own key",
    "HF_ENDPOINT": "https://me:hf_third@mirror.example/hf",
}


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**SHELL, **STAYS, **SECRETS}.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What `ray.init` is told."""
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(cluster.ray, "init", lambda **told_now: told.append(told_now))
    monkeypatch.setattr(cluster.orphans, "end_with_parent", lambda: {"TMPDIR": "of-the-run"})
    for name in ("RAY_prestart_worker_first_driver", "RAY_enable_worker_prestart"):
        monkeypatch.setenv(name, "0")
    return told


def test_settings_of_libraries_in_the_drivers_shell_reach_every_actor(
    shell: None, joined: list[dict[str, Any]]
) -> None:
    cluster.start("10.0.0.1:6379", cpu_only=False)
    variables = joined[0]["runtime_env"]["env_vars"]
    assert SHELL.items() <= variables.items() and not STAYS.keys() & variables.keys()
    assert variables["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0", "ours are ours"


def test_a_ray_that_does_not_start_is_one_typed_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that is too busy Ray gives up after 30 s, with an exception of no type."""

    def late(**_: Any) -> None:
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(cluster.ray, "init", late)
    monkeypatch.setattr(cluster.orphans, "end_with_parent", dict)
    with pytest.raises(InfrastructureError, match="timed out during startup"):
        cluster.start(None, cpu_only=True)


def test_temporary_files_are_those_of_the_run_in_a_cluster_of_its_own_alone(
    joined: list[dict[str, Any]],
) -> None:
    cluster.start(None, cpu_only=True)
    cluster.start("10.0.0.1:6379", cpu_only=True)
    own, another = (told["runtime_env"]["env_vars"] for told in joined)
    assert own["TMPDIR"] == "of-the-run" and "TMPDIR" not in another


@pytest.mark.parametrize(
    ("address", "own", "kept"), [(None, None, "0"), (None, "500", "500"), ("10.0.0.1:6379", None, None)]
)
def test_a_ray_of_ours_keeps_no_record_of_each_call_unless_it_is_told_to(
    joined: list[Any], monkeypatch: pytest.MonkeyPatch, address: str | None, own: str | None, kept: str | None
) -> None:
    name = "RAY_task_events_report_interval_ms"
    monkeypatch.setenv(name, own or "")
    if own is None:
        monkeypatch.delenv(name)
    cluster.start(address, cpu_only=True)
    assert os.environ.get(name) == kept


def test_ours_come_before_those_of_the_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    found = cluster.environment()
    assert (found["VLLM_ENABLE_V1_MULTIPROCESSING"], found["VLLM_LOGGING_LEVEL"]) == ("0", "DEBUG")


def test_secrets_reach_actors_and_stand_in_nothing_that_ray_logs(
    shell: None, joined: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.start("10.0.0.1:6379", cpu_only=True)
    (told,) = joined
    assert not any(secret in repr(told) for secret in SECRETS.values())
    for name in SECRETS:
        monkeypatch.delenv(name)
    told["runtime_env"]["worker_process_setup_hook"]()  # as Ray calls it where an actor starts
    assert {name: os.environ[name] for name in SECRETS} == SECRETS


def test_processes_of_this_machine_have_the_secrets_without_ray(
    shell: None, joined: list[dict[str, Any]]
) -> None:
    cluster.start(None, cpu_only=True)
    env = joined[0]["runtime_env"]
    assert inspect.getclosurevars(env["worker_process_setup_hook"]).nonlocals == {"secrets": {}}
    assert not {"HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"} & env["env_vars"].keys()


# --- interfaces ---


@pytest.fixture
def two_interfaces(monkeypatch: pytest.MonkeyPatch) -> None:
    address = namedtuple("address", "address")
    there = {"lo": [address("127.0.0.1")], "eth0": [address("10.0.0.1")], "eth1": [address("10.1.0.1")]}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: there)


@pytest.mark.parametrize(
    ("backend", "said", "is_there"),
    [
        ("gloo", "eth1", True),
        ("gloo", "eth1,lo", True),
        ("gloo", "eth1,ib0", False),
        ("gloo", "eth", False),
        ("nccl", "eth", True),
        ("nccl", "ib,eth1", True),
        ("nccl", "=eth", False),
        ("nccl", "=eth0", True),
        ("nccl", "ib0", False),
        ("nccl", "^docker,lo", True),
        ("nccl", "^lo,eth", False),
        ("nccl", "^=eth0,eth1", True),
        ("nccl", "", True),
    ],
)
def test_an_interface_is_looked_for_as_gloo_and_nccl_do(
    two_interfaces: None, monkeypatch: pytest.MonkeyPatch, backend: str, said: str, is_there: bool
) -> None:
    variable = interfaces.VARIABLES[backend]
    monkeypatch.setenv(variable, said)
    if is_there:
        check_interface(backend)
    else:
        with pytest.raises(PreflightError, match=rf"^{variable}=\S+ .*lo, eth0, eth1.*unset"):
            check_interface(backend)


@pytest.mark.parametrize(("device", "backend"), [("cpu", "gloo"), ("cuda", "nccl")])
def test_a_rank_that_is_told_an_interface_it_has_not_says_so_before_it_joins(
    monkeypatch: pytest.MonkeyPatch, device: str, backend: str
) -> None:
    monkeypatch.setenv(interfaces.VARIABLES[backend], "nowhere0")
    with pytest.raises(PreflightError, match=rf"^{interfaces.VARIABLES[backend]}=nowhere0 "):
        DeepSpeedBackend.join(device, 1.0)


def test_a_port_that_is_held_is_given_to_nobody_but_whoever_is_told_it() -> None:
    held = hold_port("127.0.0.1")
    port = held.getsockname()[1]
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", port))
    for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::")):  # vLLM's store, torch's
        with socket.socket(family) as told:
            told.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            told.bind((host, port))
            told.listen()
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
    assert hold_port("fd00::1").family == socket.AF_INET6


def test_a_sum_that_fails_says_where_and_names_the_variable() -> None:
    well, ill = (True, "10.0.0.1 on eth0, 0.5 ms"), (False, "10.0.0.2 on docker0, Connection refused")
    said = network.try_network("127.0.0.1", ("a", "b"), "gloo", lambda asked: [well] * len(asked))
    assert said.startswith("1 MB summed by gloo over 2 processes (a: 10.0.0.1 on eth0")
    with pytest.raises(PreflightError, match=r"a: .*docker0.*a: .*eth0"):
        network.try_network("127.0.0.1", ("a", "a"), "gloo", lambda asked: [ill, well])
    for backend, variable in interfaces.VARIABLES.items():
        with pytest.raises(PreflightError, match=rf"b: .*docker0, Connection refused.*{variable}"):
            network.try_network("127.0.0.1", ("a", "b"), backend, lambda asked: [well, ill])


@pytest.mark.parametrize(("cards", "own"), [(2, [0, 1]), (1, [0, 0])], ids=["a machine", "two nodes"])
def test_members_of_nccl_take_a_card_each_before_they_meet(
    monkeypatch: pytest.MonkeyPatch, cards: int, own: list[int]
) -> None:
    """Two members on one card are an error of NCCL; a task of Ray sees the card that it was given alone."""
    taken: list[int] = []

    def met(*_: Any, **__: Any) -> None:
        raise ArithmeticError(len(taken))

    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(network.distributed, "TCPStore", lambda *_, **__: None)
    monkeypatch.setattr(network.distributed, "init_process_group", met)
    for rank in range(2):
        with pytest.raises(ArithmeticError, match=f"{rank + 1}"):
            network._sum("nccl", rank, 2, "127.0.0.1", 1)
    assert taken == own


def test_a_driver_that_nobody_tells_is_unknown_and_of_cpus_none_is_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(network, "DRIVER", ("no-nvidia-smi-here",))
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 29, 3))
    assert network._of_card("nccl") == ["driver unknown", "NCCL 2.29.3"]
    assert network._of_card("gloo") == []


# --- plasma ---


@pytest.mark.parametrize(
    ("overrides", "parameters", "remedy"),
    [
        (["cluster=gpu", "generator.transfer=plasma"], 1_100_000_000, "nccl"),
        (["cluster=gpu", "generator.transfer=plasma", "generator.tensor_parallel=2"], 1000, "nccl"),
        (["cluster=one_gpu", "generator.transfer=plasma"], 1_100_000_000, "ipc"),
        (["cluster=gpu", "generator.transfer=plasma"], 900_000_000, None),
        (["cluster=gpu"], 7_000_000_000, None),
        (["cluster=cpu"], 7_000_000_000, None),
    ],
)
def test_plasma_takes_no_large_and_no_divided_weights_to_cards(
    monkeypatch: pytest.MonkeyPatch, overrides: list[str], parameters: int, remedy: str | None
) -> None:
    monkeypatch.setattr(preflight.memory, "parameter_count", lambda config: parameters)
    if remedy is None:
        preflight.transfer(configured(*overrides))
        return
    with pytest.raises(PreflightError, match=rf"generator\.transfer=plasma .*generator\.transfer={remedy}$"):
        preflight.transfer(configured(*overrides))
    assert preflight.transfer in preflight.FAST


# --- loopback ---


def test_a_run_of_one_machine_is_told_to_stay_on_loopback_and_one_that_joins_is_not(
    monkeypatch: pytest.MonkeyPatch, joined: list[dict[str, Any]]
) -> None:
    names = (interfaces.LOOPBACK, "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "VLLM_HOST_IP")
    for name in names:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth1")
    monkeypatch.setattr(interfaces, "_OURS", {})
    interfaces.stay_on_loopback()
    found = [os.environ[name] for name in names]
    assert found == ["0", found[1], "eth1", "127.0.0.1"] and found[1].startswith("lo")
    cluster.start(None, cpu_only=True)
    assert joined[-1]["runtime_env"]["env_vars"]["GLOO_SOCKET_IFNAME"] == found[1]
    cluster.start("10.0.0.1:6379", cpu_only=True)
    assert [os.environ.get(name) for name in names] == [None, None, "eth1", None]
    assert "GLOO_SOCKET_IFNAME" not in joined[-1]["runtime_env"]["env_vars"]


def test_only_this_machine_reaches_loopback() -> None:
    there = {
        "localhost": True,
        "127.0.1.1": True,
        "::1": True,
        "10.0.0.1": False,
        "head": False,
        "0.0.0.0": False,
    }
    assert {host: interfaces.is_loopback(host) for host in there} == there
