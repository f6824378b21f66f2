"""Both ends of vLLM's nccl transfer over a stub of NCCL that waits as NCCL does: for ever, but for an abort.

Learner and engines are threads of this process; no card is needed.
"""

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import nullcontext, suppress
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from entroray.engine import checked_transfer, communicator
from entroray.engine.checked_transfer import CheckedEngine, agreed, check_workers, received
from entroray.errors import InfrastructureError, SyncError
from entroray.workers import transfer
from entroray.workers.transfer import GatheredSource
from entroray.workers.weight_sender import Delivery, GeneratorClient

WEIGHTS = {f"layers.{i}.weight": torch.randn(8, 8) for i in range(12)}
WITHIN = 20.0


class Network:
    """What connects the members of all groups: whoever has come is waited for."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.groups: list[Group] = []
        self.dead: set[str] = set()
        self.damage: dict[str, int] = {}
        """By engine the round whose bytes arrive wrong there."""

    def join(self, name: str, rank: int, size: int, port: int) -> "Member":
        """`ncclCommInitRank`: returns when all have come, and cannot be aborted."""
        with self.changed:
            group = next((g for g in self.groups if g.port == port), None) or Group(port, size)
            self.groups += [group] if group not in self.groups else []
            member = Member(self, group, name, rank)
            group.members.append(member)
            self.changed.notify_all()
            assert self.changed.wait_for(lambda: len(group.members) == size, WITHIN), "it would wait for ever"
        return member


class Group:
    def __init__(self, port: int, size: int):
        self.port, self.size = port, size
        self.members: list[Member] = []
        self.store = Store()
        self.rounds: dict[int, list[tuple[Member, torch.Tensor]]] = {}


class Store(dict[str, str]):
    def set(self, key: str, value: str) -> None:
        self[key] = value

    def check(self, keys: Sequence[str]) -> bool:
        return all(key in self for key in keys)


class Member:
    """`PyNcclCommunicator`: a broadcast returns when all have come, or silently once it was aborted."""

    def __init__(self, network: Network, group: Group, name: str, rank: int):
        self.network, self.members_of, self.name, self.rank = network, group, name, rank
        self.group = SimpleNamespace(store=group.store)
        self.round, self.aborted = 0, False

    def broadcast(self, tensor: torch.Tensor, src: int, stream: Any = None) -> None:
        if self.aborted:
            return  # vLLM's is disabled then
        group, network = self.members_of, self.network
        with network.changed:
            came = group.rounds.setdefault(self.round, [])
            if self.name not in network.dead:
                came.append((self, tensor))
            network.changed.notify_all()
            over = lambda: self.aborted or len(came) == group.size
            assert network.changed.wait_for(over, WITHIN), "it would wait for ever"
            if not self.aborted and self.rank != src:
                tensor.copy_(next(t for m, t in came if m.rank == src))
                if network.damage.get(self.name) == self.round:
                    tensor[5] ^= 1
            self.round += 1

    def destroy(self) -> None:
        with self.network.changed:
            self.aborted = True
            self.network.changed.notify_all()


class Actor:
    """An engine: calls run one after another in a thread of its own, and fail at once as it dies."""

    def __init__(self, name: str, network: Network, dies_at: str = ""):
        from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

        self.name, self.network, self.dies_at = name, network, dies_at
        self.loaded: dict[str, torch.Tensor] = {}
        self.model = SimpleNamespace(load_weights=self.load)
        shape = SimpleNamespace(parallel_config=name, model_config=None)
        own = NCCLWeightTransferEngine(None, shape, torch.device("cpu"), self.model)  # type: ignore[arg-type]
        self.engine = CheckedEngine(own)
        self.lock, self.calls = threading.Lock(), list[Future]()

    def load(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        self.loaded.update((name, tensor.clone()) for name, tensor in weights)
        if self.dies_at == "loading" and len(self.loaded) > 4:
            self.die()

    def die(self) -> None:
        with self.network.changed:
            self.network.dead.add(self.name)
        for call in self.calls:
            with suppress(Exception):  # boundary: it has ended
                call.set_exception(InfrastructureError("its process died"))
        threading.Event().wait(WITHIN)

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(remote=lambda *given: self.call(getattr(self, f"do_{method}"), *given))

    def call(self, method: Any, *given: Any) -> Future:
        done: Future = Future()
        self.calls.append(done)

        def run() -> None:
            with self.lock:
                try:
                    value, error = method(*given), None
                except BaseException as raised:  # boundary: told to who asked
                    value, error = None, raised
            with suppress(Exception):  # boundary: it has died meanwhile
                done.set_exception(error) if error else done.set_result(value)

        threading.Thread(target=run, daemon=True).start()
        return done

    def do_init_weight_transfer_engine(self, info: dict[str, Any]) -> None:
        if self.dies_at == "initialising":
            self.die()
        self.engine.init_transfer_engine(self.engine.parse_init_info(info))
        self.check()

    def do_start_weight_update(self) -> None:
        self.loaded.clear()
        self.engine.sums = {}

    def do_update_weights(self, info: dict[str, Any]) -> None:
        self.engine.update_weights(info)
        self.check()

    def check(self) -> None:
        worker = SimpleNamespace(weight_transfer_engine=self.engine)
        check_workers(SimpleNamespace(collective_rpc=lambda method: [method(worker)]))

    def do_finish_weight_update(self, version: int, keep_kv: bool) -> Any:
        return version, agreed([received(SimpleNamespace(weight_transfer_engine=self.engine))])


class Client(GeneratorClient):
    """That of a run, but for how it waits."""

    def _all(self, calls: Sequence[Future], action: str) -> list[Any]:
        limit = self.limits.get(action, self.deadline)
        done, left = wait(calls, timeout=limit, return_when=FIRST_EXCEPTION)
        for call in done:
            call.result(timeout=0)
        if left:
            raise InfrastructureError(f"{action} gave no answer within {limit} s")
        return [call.result(timeout=0) for call in calls]


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Iterator[Network]:
    from vllm.distributed.weight_transfer import nccl_engine, packed_tensor
    from vllm.model_executor.model_loader import mtp_validation  # noqa: F401 : seconds, which no test is to wait

    made = Network()
    waits = SimpleNamespace(synchronize=lambda: None)
    monkeypatch.setattr(packed_tensor, "_get_streams", lambda card, number: (waits,) * number)
    monkeypatch.setattr("torch.cuda.stream", lambda stream: nullcontext())
    monkeypatch.setattr("torch.accelerator.current_device_index", lambda: 0)
    monkeypatch.setattr("torch.accelerator.synchronize", lambda: None)
    joined = lambda info, config: made.join(config, info.rank_offset, info.world_size, info.master_port)
    sender = lambda info: made.join("learner", 0, info.world_size, info.master_port)
    monkeypatch.setattr(nccl_engine, "worker_init_process_group", joined)
    monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", sender)
    monkeypatch.setattr(checked_transfer, "check_interface", lambda backend: None)
    monkeypatch.setattr(communicator, "LOOK", 0.02)
    monkeypatch.setattr(communicator, "ENTER", 0.05)
    monkeypatch.setattr(transfer, "PACKED", 600)  # three weights in a buffer
    yield made
    left = [
        m for group in made.groups[:-1] for m in group.members if not m.aborted and m.name not in made.dead
    ]
    assert not left, "communicators of a group that was formed anew are closed"


class Learner:
    """Rank 0, and what it gathers together with other ranks."""

    def __init__(self) -> None:
        self.gathered: list[str] = []
        self.ports = iter(range(1, 9))
        self.transfer: Any = None

    def gather(self, name: str) -> torch.Tensor:
        self.gathered.append(name)
        return WEIGHTS[name]

    def full_shape(self, name: str) -> Any:
        return WEIGHTS[name].shape

    def connect(self, *engines: Actor) -> None:
        if self.transfer is not None:
            self.transfer.shutdown()
        named: Any = [(name, Named(name)) for name in WEIGHTS]
        self.transfer = transfer.connect(
            "nccl",
            rank=0,
            client=Client(engines, 1, WITHIN, False),
            source=GatheredSource(named, self),
            rendezvous=lambda: ("127.0.0.1", next(self.ports)),
            adapter={},
        )

    def send(self, version: int) -> Delivery:
        self.gathered.clear()
        return self.transfer.client.deliver(version, self.transfer.send_weights)


class Named(str):
    """A parameter, by its name."""

    dtype = torch.float32


def test_an_engine_that_dies_in_a_transfer_costs_seconds_and_the_others_get_the_weights(
    network: Network,
) -> None:
    """The learner is freed, gathers to the end with other ranks, and meets the engines that are left anew."""
    learner, well, dying = Learner(), Actor("a", network), Actor("b", network, dies_at="loading")
    learner.connect(well, dying)
    began = time.monotonic()
    with pytest.raises(InfrastructureError, match="its process died"):
        learner.send(1)
    assert time.monotonic() - began < 5.0 and learner.gathered == [*WEIGHTS]
    with pytest.raises(InfrastructureError, match="left"):
        well.calls[-1].result(timeout=5.0)
    learner.connect(well)
    delivery = learner.send(1)
    delivery.verify(1)
    assert delivery.size == 12 * 256 and all(torch.equal(well.loaded[n], WEIGHTS[n]) for n in WEIGHTS)


def test_an_engine_that_dies_as_the_group_forms_frees_learner_and_engines_by_its_deadline(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner, well, dying = Learner(), Actor("a", network), Actor("b", network, dies_at="initialising")
    monkeypatch.setattr(checked_transfer, "meet", lambda work: communicator.meet(work, 0.5))
    began = time.monotonic()
    with pytest.raises(InfrastructureError, match="its process died"):
        learner.connect(well, dying)
    with pytest.raises(InfrastructureError, match="NCCL_SOCKET_IFNAME"):
        well.calls[-1].result(timeout=5.0)
    assert time.monotonic() - began < 5.0
    learner.connect(well)
    learner.send(1).verify(1)
    network.groups.pop(0)  # what stands in NCCL's start is left to itself


def test_an_engine_that_hangs_is_given_up_after_its_deadline(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "transfer_deadline", lambda size: 0.3)
    learner, well, stuck = Learner(), Actor("a", network), Actor("b", network)
    learner.connect(well, stuck)
    network.dead.add("b")
    with pytest.raises(InfrastructureError, match=r"loading gave no answer within 0\.3 s"):
        learner.send(1)
    learner.connect(well)
    learner.send(2).verify(1)


def test_a_tensor_that_arrives_wrong_at_one_engine_is_named(network: Network) -> None:
    learner, engines = Learner(), [Actor("a", network), Actor("b", network)]
    learner.connect(*engines)
    learner.send(1).verify(2)
    network.damage["b"] = 5  # the second buffer of the second sending, from its fourth weight on
    delivery = learner.send(2)
    with pytest.raises(SyncError, match=r"generator 1 .*1 of 12 tensors .*layers\.3\.weight$"):
        delivery.verify(2)
