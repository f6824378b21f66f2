"""A communicator of NCCL that can be left: NCCL itself waits without end for a member that is gone."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, InvalidStateError
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch

from entroray.errors import InfrastructureError

START = 120.0
"""Seconds for all members of a group to meet."""
LOOK = 0.5
"""Seconds between two looks of a member at whether the sender has left."""
ENTER = 2.0
"""Seconds in which a call that only queues work on the card returns, or watching ends."""
LEFT = "entroray/left"
"""Key of the members' store that the sender sets as it leaves."""
LOOK_AT = "NCCL_SOCKET_IFNAME names the interface between the nodes to NCCL, and `entroray doctor` tries it"
T = TypeVar("T")


class Communicator:
    """vLLM's `PyNcclCommunicator`; who waits in a collective of it goes on, and raises, once it is left."""

    def __init__(self, nccl: Any):
        self.nccl, self.why = nccl, ""
        """`why` it was left; InfrastructureError says so to whoever uses it from then on."""
        self.queueing, self.leaving = threading.Lock(), threading.Lock()

    def broadcast(self, tensor: torch.Tensor, src: int, stream: Any = None) -> None:
        """As vLLM's: queued on the card, and done once its stream is."""
        with self.queueing:
            self.check()
            self.nccl.broadcast(tensor, src=src, stream=stream)

    def check(self) -> None:
        """InfrastructureError once it was left: what was received since is not what was sent."""
        if self.why:
            raise InfrastructureError(f"NCCL was left: {self.why}")

    def leave(self, why: str) -> None:
        """Abort it, from any thread."""
        with self.leaving:
            if self.why:
                return
            self.why = why  # first: nobody may begin anything with what is freed next
        queued = self.queueing.acquire(timeout=ENTER)
        self.nccl.destroy()
        if queued:
            self.queueing.release()

    def dismiss(self, why: str) -> None:
        """Leave, and have the members that are `bounded` leave too."""
        self.nccl.group.store.set(LEFT, why)
        self.leave(why)

    def destroy(self) -> None:
        """As vLLM's: free what it holds of the card."""
        self.leave("it was closed")

    @contextmanager
    def bounded(self, seconds: float) -> Iterator[None]:
        """Work that ends, by InfrastructureError, after `seconds` or once the sender has left or died."""
        over = threading.Event()
        watch = threading.Thread(target=self._watch, args=(over,), daemon=True)
        late = threading.Timer(seconds, self.leave, [f"not done after {seconds:.0f} s: {LOOK_AT}"])
        late.daemon = True  # no part of the watch, which a host that is silent keeps waiting
        late.start()
        watch.start()
        try:
            yield
        finally:
            over.set()
            late.cancel()
            watch.join(timeout=ENTER)
        self.check()

    def _watch(self, over: threading.Event) -> None:
        while not over.wait(LOOK):
            if why := self._reason():
                self.leave(why)
                return

    def _reason(self) -> str:
        """To leave; empty while there is none."""
        try:
            if self.nccl.group.store.check([LEFT]):
                return "the sender of the weights has left"
        except RuntimeError as error:  # torch's, where nobody answers
            return f"the sender of the weights is gone ({error})"
        return ""


def meet(work: Callable[[], T], seconds: float = START, ended: "Future[T] | None" = None) -> T:
    """What `work` forms of members that meet; InfrastructureError after `seconds`.

    It has a thread of its own, which is then left to itself: NCCL's start can neither end nor be ended. Who
    knows sooner that somebody will not come may fail `ended`.
    """
    met: Future[T] = ended or Future()
    card = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def run() -> None:
        try:
            if card is not None:
                torch.cuda.set_device(card)  # a thread begins with the first
            value = work()
        except BaseException as error:  # boundary: whoever waits is told
            fail(met, error)
        else:
            with suppress(InvalidStateError):  # it has failed meanwhile
                met.set_result(value)

    threading.Thread(target=run, daemon=True).start()
    try:
        return met.result(timeout=seconds)
    except TimeoutError as error:
        raise InfrastructureError(
            f"learner and engines have not met by NCCL within {seconds:.0f} s: {LOOK_AT}"
        ) from error


def fail(met: "Future[Any]", error: BaseException) -> None:
    """End the wait for `met` with `error`, unless it has ended."""
    with suppress(InvalidStateError):
        met.set_exception(error)
