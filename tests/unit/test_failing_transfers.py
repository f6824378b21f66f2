"""What nccl and ipc lack: sums of what arrived, an end of every wait, a pass that every rank ends."""

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from entroray.engine import checked_transfer, communicator
from entroray.engine.checked_transfer import (
    CheckedEngine,
    agreed,
    check_transfers,
    check_workers,
    received,
)
from entroray.engine.communicator import Communicator, fail, meet
from entroray.engine.weight_bytes import checksum, read_sums
from entroray.errors import InfrastructureError, PreflightError, SyncError
from entroray.planning.deadlines import transfer_deadline
from entroray.workers.transfer import CheckedSource
from entroray.workers.weight_sender import Delivery, GeneratorClient


class Store(dict[str, str]):
    """Of a group's members; `gone` once its host is."""

    gone = False

    def set(self, key: str, value: str) -> None:
        self[key] = value

    def check(self, keys: list[str]) -> bool:
        if self.gone:
            raise RuntimeError("Connection reset by peer")
        return all(key in self for key in keys)


class Nccl:
    """vLLM's communicator, with a member that never comes: only an abort ends a wait on the card."""

    def __init__(self) -> None:
        self.group, self.aborted, self.sent = SimpleNamespace(store=Store()), threading.Event(), 0

    def broadcast(self, tensor: Any, src: int, stream: Any = None) -> None:
        self.sent += 1

    def synchronize(self) -> None:
        assert self.aborted.wait(10.0), "it would have waited for ever"

    def destroy(self) -> None:
        assert not self.aborted.is_set(), "vLLM's would abort it twice"
        time.sleep(0.01)
        self.aborted.set()


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(communicator, "LOOK", 0.01)


def test_who_waits_on_the_card_goes_on_as_another_thread_leaves_and_begins_nothing_more() -> None:
    nccl = Nccl()
    held = Communicator(nccl)
    held.broadcast(torch.zeros(1), 0)
    threading.Timer(0.05, held.dismiss, ["generator 1: its process died"]).start()
    nccl.synchronize()
    with pytest.raises(InfrastructureError, match="its process died"):
        held.broadcast(torch.zeros(1), 0)
    assert nccl.sent == 1 and communicator.LEFT in nccl.group.store


@pytest.mark.parametrize("how", ["late", "dismissed", "gone"])
def test_an_engine_leaves_after_its_deadline_and_at_once_as_the_sender_leaves_or_dies(how: str) -> None:
    nccl = Nccl()
    seconds = 0.05 if how == "late" else 60.0
    if how == "late":  # a host that is silent answers no question about the key
        nccl.group.store.check = lambda keys: nccl.synchronize()  # type: ignore[method-assign]
    if how == "dismissed":
        threading.Timer(0.05, nccl.group.store.set, [communicator.LEFT, "x"]).start()
    nccl.group.store.gone = how == "gone"
    with pytest.raises(InfrastructureError), Communicator(nccl).bounded(seconds):
        nccl.synchronize()


def test_work_in_time_leaves_nothing_behind() -> None:
    nccl = Nccl()
    with Communicator(nccl).bounded(60.0):
        time.sleep(0.05)
    assert not nccl.aborted.is_set() and not any("_watch" in t.name for t in threading.enumerate())


def test_a_call_that_hangs_in_nccl_itself_is_aborted_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(communicator, "ENTER", 0.05)
    nccl = Nccl()
    nccl.broadcast = lambda *_, **__: nccl.synchronize()  # type: ignore[method-assign]
    held = Communicator(nccl)
    threading.Timer(0.05, held.dismiss, ["gone"]).start()
    held.broadcast(torch.zeros(1), 0)


def test_a_communicator_that_two_threads_leave_is_aborted_once() -> None:
    held = Communicator(Nccl())
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(leave) for leave in (held.destroy, partial(held.leave, "late")) * 2]:
            done.result(timeout=5.0)


def test_a_group_that_never_forms_is_given_up_after_its_deadline_and_sooner_by_who_knows() -> None:
    never = threading.Event()
    with pytest.raises(InfrastructureError, match=r"0 s.*NCCL_SOCKET_IFNAME.*doctor"):
        meet(never.wait, 0.05)
    ended: Future[bool] = Future()
    threading.Timer(0.05, fail, [ended, InfrastructureError("generator 0: its process died")]).start()
    with pytest.raises(InfrastructureError, match="its process died"):
        meet(never.wait, 60.0, ended)
    assert meet(lambda: 7) == 7
    never.set()


def test_weights_have_a_minute_and_ten_seconds_for_each_gigabyte() -> None:
    assert transfer_deadline(65e9) == 710.0


# --- sums ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float64], ids=str)
def test_a_sum_is_of_every_word_by_its_place_modulo_2_to_the_64(dtype: torch.dtype) -> None:
    tensor = (torch.arange(9000) % 251 - 125).to(dtype)
    size = dtype.itemsize
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    words = tensor.view(kind).tolist()
    total = sum(w * (i % 4096 + 1) + w * (i // 4096 + 1) * 1_000_003 for i, w in enumerate(words[:8192]))
    total += sum(w * (i + 1) for i, w in enumerate(words[8192:])) * 7_368_787
    assert (checksum(tensor).item() - total) % 2**64 == 0
    assert checksum(tensor.view(9, 1000)) == checksum(tensor)


def test_every_kind_of_wrong_tensor_has_another_sum() -> None:
    right = torch.randn(70, 130)
    one_bit = right.clone()
    one_bit.view(torch.int32)[69, 129] ^= 1
    wrong = [one_bit, right.flip(0), right.flip(1), right.roll(1, 0), right.T.contiguous(), right * 0, -right]
    assert not any(checksum(each) == checksum(right) for each in wrong)
    assert checksum(right.T.contiguous().T) == checksum(right), "as it is read, not as it lies"


class Engine:
    """vLLM's receiving engine, which loads what `arrives`."""

    def __init__(self, arrives: dict[str, torch.Tensor]):
        self.arrives, self.model, self.closed = arrives, SimpleNamespace(load_weights=self.load), 0
        self.loaded: list[str] = []

    def load(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        self.loaded += [name for name, _ in weights]

    def start_weight_update(self) -> None:
        self.loaded.clear()

    def update_weights(self, info: Any) -> None:
        self.model.load_weights((name, self.arrives[name]) for name in info["names"])

    def init_transfer_engine(self, info: Any) -> None:
        self.met = info

    def shutdown(self) -> None:
        self.closed += 1


def checked(arrives: dict[str, torch.Tensor], backend: str = "ipc") -> Any:
    """A worker as vLLM wraps it."""
    config = SimpleNamespace(weight_transfer_config=SimpleNamespace(backend=backend))
    worker = SimpleNamespace(vllm_config=config, weight_transfer_engine=Engine(arrives))
    check_transfers(SimpleNamespace(worker=worker))
    return worker


def sent(weights: dict[str, torch.Tensor]) -> CheckedSource:
    backend = SimpleNamespace(gather=lambda p: p, full_shape=lambda p: p.shape)
    return CheckedSource([*weights.items()], backend)  # type: ignore[arg-type]


def test_a_wrong_tensor_that_arrives_is_named() -> None:
    weights = {f"layers.{i}.weight": torch.randn(4, 4) for i in range(5)}
    source, worker = sent(weights), checked({**weights, "layers.3.weight": weights["layers.2.weight"]})
    with source.one_pass():
        assert dict(source).keys() == weights.keys()
    engine = worker.weight_transfer_engine
    engine.start_weight_update()
    for names in ([*weights][:3], [*weights][3:]):
        engine.update_weights({"names": names})
    assert engine.loaded == [*weights] and engine.model.load_weights == engine.engine.load
    ours, theirs = read_sums(source.sums), agreed([received(worker)])
    with pytest.raises(SyncError, match=r"generator 1 .*: 1 of 5 .*layers\.3\.weight$"):
        Delivery(2, ours, ((2, ours), (2, theirs))).verify(2)
    engine.start_weight_update()
    engine.arrives["layers.3.weight"] = weights["layers.3.weight"]
    engine.update_weights({"names": [*weights]})
    Delivery(3, ours, ((3, received(worker)),)).verify(1)


def test_a_tensor_that_is_missing_or_that_shards_have_not_alike_is_named() -> None:
    ours = {"a": 1, "b": 2}
    for theirs in (
        {"a": 1},
        {"a": 1, "b": 3},
        agreed([{"a": 1, "b": 2}, {"a": 1, "b": 0}]),
        {**ours, "c": 0},
    ):
        name = "c" if "c" in (theirs or {}) else "b"
        with pytest.raises(SyncError, match=f"1 of 2 .*first {name}$"):
            Delivery(2, ours, ((2, theirs),)).verify(1)
    assert agreed([ours, dict(ours)]) == ours and agreed([None]) is None
    with pytest.raises(SyncError):
        Delivery(2, ours, ((2, None),)).verify(1)


def test_engines_without_sums_are_left_as_they_are() -> None:
    worker = checked({}, "plasma")
    assert type(worker.weight_transfer_engine) is Engine and received(worker) is None


def test_a_group_that_forms_anew_is_an_engine_of_its_own() -> None:
    worker = checked({})
    engine = worker.weight_transfer_engine
    first = engine.engine
    engine.init_transfer_engine("there")
    assert engine.met == "there" and not hasattr(first, "met")


# --- the sender ---


def test_a_pass_that_fails_is_gathered_to_its_end_for_ranks_that_gather_too() -> None:
    gathered: list[str] = []
    backend = SimpleNamespace(gather=lambda p: gathered.append(p) or torch.zeros(1))
    source = CheckedSource([(name, name) for name in "abcd"], backend)  # type: ignore[misc]

    def fails_after(number: int) -> None:
        gathered.clear()
        with source.one_pass():
            for _, (name, _) in zip(range(number), source, strict=False):
                assert name in gathered
            raise InfrastructureError("generator 1: its process died")

    for number in (0, 1, 3, 4):
        with pytest.raises(InfrastructureError):
            fails_after(number)
        assert gathered == [*"abcd"], f"it failed after {number}"


@pytest.mark.parametrize("action", ["initialising", "loading", "pausing"])
def test_who_meets_engines_in_a_collective_is_told_of_their_failure(
    action: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[BaseException] = []
    limits: list[float] = []

    def wait(calls: Any, *, deadline: float, what: str) -> None:
        limits.append(deadline)
        raise InfrastructureError(f"{what}: its process died")

    monkeypatch.setattr("entroray.workers.weight_sender.wait", wait)
    client = GeneratorClient([], 1, 1800.0, False)
    client.interrupt, client.limits = told.append, {"loading": 125.0, "initialising": 120.0}
    calls: dict[str, Any] = {
        "initialising": lambda: client.init_weight_transfer_engine({}),
        "loading": lambda: client.update_weights({}),
        "pausing": client.start_weight_update,
    }
    with pytest.raises(InfrastructureError):
        calls[action]()
    assert len(told) == (action != "pausing")
    assert limits == [{"initialising": 120.0, "loading": 125.0, "pausing": 1800.0}[action]]


@pytest.mark.parametrize("late", [True, False])
def test_who_waits_too_long_for_weights_is_told_where_to_look(
    late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be the wrong network; the death of a process is nobody's interface."""

    def wait(calls: Any, *, deadline: float, what: str) -> None:
        raise InfrastructureError(what) from (TimeoutError() if late else None)

    monkeypatch.setattr("entroray.workers.weight_sender.wait", wait)
    client = GeneratorClient([], 1, 1800.0, False)
    client.limits = {"loading": 70.0}
    with pytest.raises(InfrastructureError) as told:
        client.update_weights({})
    assert ("NCCL_SOCKET_IFNAME" in str(told.value)) is late


def test_an_engine_waits_as_long_for_weights_as_they_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds: list[float] = []

    class Group:
        def bounded(self, limit: float) -> Any:
            seconds.append(limit)
            return Communicator(Nccl()).bounded(limit)

    monkeypatch.setattr(checked_transfer, "check_interface", lambda backend: None)
    engine = Engine({"a": torch.zeros(1)})
    engine.model_update_group = Group()  # type: ignore[attr-defined]
    info = {"names": ["a"], "dtype_names": ["bfloat16"], "shapes": [[500, 1000, 1000]]}
    CheckedEngine(engine).update_weights(info)
    assert seconds == [70.0]


class Shards:
    """Workers of one engine behind vLLM's executor, which reads their answers up to the first error."""

    def __init__(self, *workers: Any):
        self.workers, self.unread = workers, [list[Any]() for _ in workers]

    def collective_rpc(self, method: Any, *given: Any) -> list[Any]:
        for worker, answers in zip(self.workers, self.unread, strict=True):
            try:
                answers.append(method(worker, *given))
            except Exception as error:  # boundary: as vLLM's workers
                answers.append(error)
        read = []
        for answers in self.unread:
            if isinstance(answer := answers.pop(0), Exception):
                raise RuntimeError(f"Worker failed with error '{answer}'")
            read.append(answer)
        return read


@pytest.mark.parametrize("fails", [(0,), (1,), (0, 1)])
def test_an_engine_of_two_cards_is_as_before_after_a_transfer_that_failed(fails: tuple[int, ...]) -> None:
    """One shard may have all of the weights when the other is told that the sender has left."""
    weights = {"a": torch.ones(2, 2)}
    workers = [checked(weights), checked(weights)]
    shards = Shards(*workers)
    load = lambda worker, info: worker.weight_transfer_engine.update_weights(info)
    meet_anew = lambda worker: worker.weight_transfer_engine.init_transfer_engine("there")
    for shard in fails:
        workers[shard].weight_transfer_engine.engine.arrives = {}
    shards.collective_rpc(load, {"names": ["a"]})
    with pytest.raises(InfrastructureError, match="KeyError"):
        check_workers(shards)
    for worker in workers:
        worker.weight_transfer_engine.engine.arrives = weights
    shards.collective_rpc(meet_anew)
    check_workers(shards)
    shards.collective_rpc(load, {"names": ["a"]})
    check_workers(shards)
    assert agreed(shards.collective_rpc(received)) == {"a": checksum(weights["a"]).item()}
    assert not any(shards.unread), "every answer was read by the call that it is of"


def test_a_meeting_that_fails_at_one_card_is_told_with_its_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong name of an interface ends the run at once; nothing is tried again."""
    workers = [checked({}), checked({})]
    wrong = PreflightError("NCCL_SOCKET_IFNAME=nowhere0 is no interface")
    monkeypatch.setattr(checked_transfer, "meet", lambda work: (_ for _ in ()).throw(wrong))
    shards = Shards(*workers)
    shards.collective_rpc(lambda worker: worker.weight_transfer_engine.init_transfer_engine("there"))
    with pytest.raises(PreflightError, match="nowhere0"):
        check_workers(shards)
    assert not any(shards.unread)
