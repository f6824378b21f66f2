"""Ray at the edge: start it, place actors on it, and the only waits on it there are."""

import asyncio
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from entroray.engine.interfaces import leave_loopback
from entroray.errors import EntrorayError, InfrastructureError, LearnerLostError, Stopped, first_line
from entroray.installation import op_folder
from entroray.redaction import is_secret
from entroray.train.clock import BusyTime
from entroray.train.trace import NO_TRACE
from entroray.workers import engine_forkserver, heartbeat, orphans
from entroray.workers.heartbeat import Watched, memory_of


class OpenWaits:
    """What this process is waiting for over Ray, and since when: for reports of stalls, idle shares, traces.

    What is waited for is an actor, or an actor, a comma and what it does.
    """

    def __init__(self) -> None:
        self.started: dict[object, tuple[str, float]] = {}
        self.busy, self.trace = BusyTime(), NO_TRACE

    @contextmanager
    def record(self, what: str) -> Iterator[None]:
        """Count `what` as waited for while inside."""
        key, began = object(), time.monotonic()
        actor, _, name = what.partition(", ")
        self.started[key] = what, began
        self.busy.began(actor, began)
        try:
            yield
        finally:
            del self.started[key]
            ended = time.monotonic()
            self.busy.ended(actor, ended)
            if name != SAMPLING:  # an engine's requests are spans of their own
                self.trace.span(actor, name, began, ended)

    def lines(self, limit: int = 20) -> list[str]:
        """The longest waits, one a line."""
        now = time.monotonic()
        return [f"{what}: {now - start:.1f} s" for what, start in list(self.started.values())[:limit]]


T = TypeVar("T")
SAMPLING = "sampling"
WAITS = OpenWaits()
KILL = "ray.kill"
"""Name of the threads that kill actors."""


async def settle(ref: Any, *, deadline: float, what: str) -> Any:
    """The value of one ObjectRef, awaited at most `deadline` seconds; InfrastructureError names `what`."""
    return await _await_within(asyncio.wrap_future(ref.future()), deadline, what)


async def settle_next(stream: Any, *, deadline: float, what: str) -> Any:
    """The next value that an actor's generator yields, awaited at most `deadline` seconds."""
    ref = await _await_within(anext(stream), deadline, what)
    return await settle(ref, deadline=deadline, what=what)


async def _await_within(value: Awaitable[Any], deadline: float, what: str) -> Any:
    with _typed_errors(deadline, what), WAITS.record(what):
        return await asyncio.wait_for(value, deadline)


def wait(refs: Sequence[Any], *, deadline: float, what: str) -> list[Any]:
    """The values of all ObjectRefs within `deadline` seconds, for code that is not asyncio."""
    with _typed_errors(deadline, what):
        return ray.get(list(refs), timeout=deadline)


async def await_starts(starts: Sequence[Awaitable[Any]]) -> dict[int, BaseException]:
    """Which of these actors did not start, and why; raises their error if none did, or one no machine has."""
    results = await asyncio.gather(*starts, return_exceptions=True)
    failed = {i: result for i, result in enumerate(results) if isinstance(result, BaseException)}
    final = [error for error in failed.values() if not isinstance(error, InfrastructureError)]
    if final or len(failed) == len(results):
        raise (final or list(failed.values()))[0]
    return failed


@contextmanager
def _typed_errors(deadline: float, what: str) -> Iterator[None]:
    """InfrastructureError for a missed deadline, a dead process or node, else the worker's own error."""
    try:
        yield
    except TimeoutError as error:  # of asyncio, and Ray's GetTimeoutError
        raise InfrastructureError(f"{what} gave no answer within {deadline:.0f} s") from error
    except RayTaskError as error:
        if not isinstance(error.cause, EntrorayError):
            raise  # unforeseen: Ray's wrapping has the traceback
        raise type(error.cause)(f"{what}: {error.cause}") from error
    except RayError as error:  # its node may go with an answer already given, and Ray may be full
        lost = "its process died" if isinstance(error, RayActorError) else type(error).__name__
        raise InfrastructureError(f"{what}: {lost}{memory_of(what)}: {first_line(error)}") from error


@dataclass(frozen=True)
class Share:
    """What one actor of a role needs of its node."""

    cpus: float
    gpus: float
    threads: int | None
    """Of OpenMP and MKL; None: neither is told a number."""
    beside: tuple[str, ...] = ()
    """Methods answered while another runs, which then runs off the main thread."""
    at: Any = "DEFAULT"
    """Ray's scheduling strategy."""


FORWARDED = ("NCCL_", "TORCH_NCCL_", "GLOO_", "HF_", "HUGGING_FACE_", "TRANSFORMERS_", "VLLM_")
"""Beginnings of variables of the driver's shell that every actor has, on whatever node."""
ALSO = {"CUDA_LAUNCH_BLOCKING", "CUDA_DEVICE_MAX_CONNECTIONS", "CUDA_MODULE_LOADING"}
"""Others of CUDA say where things are on one node, or are Ray's, such as CUDA_VISIBLE_DEVICES."""
OF_ONE_NODE = {"NCCL_HOSTID", "VLLM_HOST_IP", "VLLM_PORT"}


def forwarded(*, secret: bool) -> dict[str, str]:
    """Variables of this shell for actors on every node; either the secret ones, or the others.

    A secret one goes into no runtime environment, which Ray logs and shows.
    """
    named = {k: v for k, v in os.environ.items() if k.startswith(FORWARDED) or k in ALSO}
    return {k: v for k, v in named.items() if k not in OF_ONE_NODE and is_secret(k, v) == secret}


def environment() -> dict[str, str]:
    """Variables every worker needs: those of this shell, the environment's own tools and ops, no reports."""
    quiet = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1",  # whatever a library's call of torch.load says
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONWARNINGS": "ignore",
        "PYTHONDONTWRITEBYTECODE": "",  # set, it makes every worker recompile vLLM: 10 s
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
        "DEEPSPEED_LOG_LEVEL": os.environ.get("DEEPSPEED_LOG_LEVEL", "warning"),
        # The in-process engine: a second engine process costs a start-up and buys nothing on one node.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return forwarded(secret=False) | quiet | {"PATH": path, "TORCH_EXTENSIONS_DIR": str(op_folder())}


CPU_ONLY = {
    "DS_ACCELERATOR": "cpu",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # engine and learner share the cores as the OS sees fit
    # A thread that waits leaves its core: spinning, engine and learner halve each other's speed.
    "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "passive"),
    "TORCHDYNAMO_DISABLE": "1",  # equal speed, 8 s less before the first token, no compiler needed
}


def start(address: str | None, *, cpu_only: bool) -> None:
    """Join the Ray cluster at `address`, or start one on this machine, bound to loopback."""
    os.environ.update({"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"})
    # Ray's spare workers have none of an actor's variables: nobody could use them.
    os.environ.update({"RAY_prestart_worker_first_driver": "0", "RAY_enable_worker_prestart": "0"})
    if address:
        leave_loopback()  # the command line may not have said it
    temporary = {} if address else orphans.end_with_parent()
    if not address:  # else Ray keeps what its last 100,000 calls did, in 340 MB that nobody looks at
        os.environ.setdefault("RAY_task_events_report_interval_ms", "0")
    variables = environment() | (CPU_ONLY if cpu_only else {}) | temporary
    secrets = forwarded(secret=True) if address else {}  # here every process has them from this one

    def begin_worker() -> None:
        os.environ.update(secrets)
        heartbeat.begin()

    local: dict[str, Any] = {"num_cpus": os.cpu_count(), "include_dashboard": False}
    with _own_sigterm():
        ray.init(
            address=address or "local",
            runtime_env={"env_vars": variables, "worker_process_setup_hook": begin_worker},
            logging_level=logging.WARNING,
            log_to_driver=bool(os.environ.get("ENTRORAY_WORKER_LOGS")),
            **({} if address else local),
        )


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Ray overwrites the handler of SIGTERM: ours comes back, and Ray's way out meanwhile becomes ours."""
    ours = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit as left:
        raise Stopped(signal.SIGTERM, "ended by SIGTERM while Ray was starting") from left
    except Exception as error:  # boundary: Ray has none of its own for this; its log says more
        raise InfrastructureError(f"Ray did not start ({first_line(error)}): try again") from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, ours)


def joined() -> bool:
    """Whether this process is in a cluster."""
    return ray.is_initialized()


def on_one_node() -> bool:
    """Whether all actors are on the same node."""
    return sum(node["Alive"] for node in ray.nodes()) == 1


def own_address() -> str:
    """Of this machine, as the nodes of the cluster reach it."""
    return str(ray.util.get_node_ip_address())


FORKED: dict[str, str] = {}
"""By name of a class: what Ray runs in place of Python to start its actors."""
SERVERS: dict[subprocess.Popen[bytes], str] = {}
"""What forks them, and the folder of its socket."""


def fork_engines(threads: int | None) -> None:
    """Let engines on this machine's CPU be forked from a process that imports vLLM from now on."""
    path = os.path.join(tempfile.mkdtemp(prefix="entroray-"), "engines")
    server = subprocess.Popen(  # it ends when this process does, whose end of the pipe then closes
        [sys.executable, "-m", engine_forkserver.__name__, path],
        env=os.environ | environment() | CPU_ONLY | _threads(threads),
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    SERVERS[server] = os.path.dirname(path)
    FORKED["Generator"] = shlex.join([sys.executable, "-I", "-S", engine_forkserver.__file__, path])


def stop_forking() -> None:
    """End what `fork_engines` started, if anything; engines that were forked live on."""
    FORKED.clear()
    while SERVERS:
        server, folder = SERVERS.popitem()
        try:
            server.communicate(timeout=10.0)
        except subprocess.TimeoutExpired:  # it loads a library, and hears nothing meanwhile
            server.kill()
            server.wait(timeout=10.0)
        shutil.rmtree(folder, ignore_errors=True)


def _threads(number: int | None) -> dict[str, str]:
    return {} if number is None else {"OMP_NUM_THREADS": str(number), "MKL_NUM_THREADS": str(number)}


def spawn(cls: type, share: Share, *args: Any, **kwargs: Any) -> Any:
    """A Ray actor of a plain class; returns its handle at once, before its constructor has run."""
    groups: dict[str, Any] = {"concurrency_groups": dict.fromkeys(share.beside, 1)} if share.beside else {}
    remote: Any = ray.remote(num_cpus=share.cpus, num_gpus=share.gpus, max_restarts=0, **groups)(cls)
    forked = {"py_executable": FORKED[cls.__name__]} if cls.__name__ in FORKED else {}
    own = {"env_vars": _threads(share.threads), **forked}
    return remote.options(runtime_env=own, scheduling_strategy=share.at).remote(*args, **kwargs)


def ask_each_node(questions: Sequence[Callable[[], T]], nodes: Sequence[str], *, gpus: float) -> list[T]:
    """What each question answers on its node, by Ray's id, with so many of its GPUs, within two minutes."""
    remote: Any = ray.remote(num_cpus=0, num_gpus=gpus, max_retries=0)(_answer)
    at = [NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes]
    asked = [remote.options(scheduling_strategy=a).remote(q) for q, a in zip(questions, at, strict=True)]
    return wait(asked, deadline=120.0, what="a sum over all nodes")


def _answer(question: Callable[[], T]) -> T:
    return question()


def ask_node(question: Callable[[], T]) -> T:
    """What `question` answers on a node that has GPUs, within a minute."""
    remote: Any = ray.remote(num_cpus=0, num_gpus=0.01, max_retries=0)(question)
    return wait([remote.remote()], deadline=60.0, what="a node with GPUs")[0]


def kill_actors(handles: Sequence[Any]) -> None:
    """Kill actors, to free what they hold of their nodes; returns at once, where a node is gone too."""
    for handle in handles:
        threading.Thread(target=ray.kill, args=(handle,), name=KILL, daemon=True).start()


def stop() -> None:
    """Leave the cluster; one that this process started ends with it."""
    for thread in [t for t in threading.enumerate() if t.name == KILL]:
        thread.join(timeout=1.0)  # Ray must not be left in the middle of a call
    ray.shutdown()
    stop_forking()


COLLECTIVE = ("gloo", "NCCL", "process group", "Connection closed by peer")
"""In the error of a rank whose peer is gone: what it says comes from torch.distributed."""
NAMED = 5.0
"""Seconds in which Ray tells that a rank died, once its peers have failed for want of it."""


class Gang:
    """Ranks that move together: one call is a call on every rank, and one failure is a failure of all.

    `spawn` is rank -> the handle of an actor started for it.
    """

    def __init__(self, name: str, handles: Sequence[Any], spawn: Callable[[int], Any] | None = None):
        self.name, self.handles, self.spawn = name, list(handles), spawn
        self.lost: dict[int, str] = {}
        """Why a rank was killed, by rank."""

    def respawn(self) -> None:
        """Kill every rank, and start another in the place of each, which has joined nobody yet."""
        assert self.spawn
        kill_actors(self.handles)
        self.handles, self.lost = [self.spawn(rank) for rank in range(len(self.handles))], {}

    async def start(self, deadline: float) -> list[dict[str, Any]]:
        """Have the ranks meet at rank 0 and load the model; what each says of it."""
        ((host, port),) = await self.all(lambda rank, h: h.address.remote(), deadline=deadline, ranks=1)
        return await self.all(lambda rank, h: h.start.remote(host, port, deadline), deadline=deadline)

    def member(self, rank: int) -> str:
        """What a rank is called."""
        return f"{self.name} rank {rank}"

    async def all(
        self, method: Callable[[int, Any], Any], *, deadline: float, ranks: int | None = None
    ) -> list[Any]:
        """`method(rank, handle)` on all, or the first `ranks`; a failure or the deadline ends the wait.

        LearnerLostError where a rank died or gave no answer, also if it is a peer that says so first.
        """
        calls = [
            asyncio.ensure_future(settle(method(r, h), deadline=deadline, what=self.member(r)))
            for r, h in enumerate(self.handles[:ranks])
        ]
        try:
            return list(await asyncio.gather(*calls))
        except (InfrastructureError, RayTaskError) as error:
            for why in self.lost.values():
                raise LearnerLostError(why) from error
            if not (_is_lost(error) or _lacks_peer(error)):
                raise
            if not _is_lost(error):
                await asyncio.wait(calls, timeout=NAMED)
            ended = [c.exception() for c in calls if c.done() and not c.cancelled()]
            lost = next((e for e in ended if e and _is_lost(e)), None)
            why = first_line(lost) if lost else f"{self.name}: {first_line(getattr(error, 'cause', error))}"
            raise LearnerLostError(why) from error

    def watched(self, report: Callable[..., None]) -> list[Watched]:
        """Every rank not lost, to be looked at; a frozen one is killed, and calls of the gang say why."""

        def lose(rank: int, handle: Any, error: InfrastructureError) -> None:
            if self.handles[rank] is handle:  # else another has taken its place meanwhile
                self.lost[rank] = f"{self.member(rank)}: {error}"
                kill_actors([handle])
                report("rank_lost", rank=self.member(rank), error=str(error))

        there = [(r, h) for r, h in enumerate(self.handles) if r not in self.lost]
        return [Watched(h, partial(lose, r, h), name=self.member(r)) for r, h in there]


def _is_lost(error: BaseException) -> bool:
    """Whether an actor died or gave no answer, and did not raise this itself."""
    cause = error.__cause__ if isinstance(error, InfrastructureError) else None
    return isinstance(cause, TimeoutError | RayError) and not isinstance(cause, RayTaskError)


def _lacks_peer(error: BaseException) -> bool:
    """Whether a rank raised this because another that it was to meet is gone."""
    return isinstance(error, RayTaskError) and any(word in str(error.cause) for word in COLLECTIVE)
