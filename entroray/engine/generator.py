"""vLLM in a Ray actor: ids in, ids and the log-probs really sampled out, requests join and leave freely.

One thread steps the engine; every method only posts to it, so weights change between two steps and
requests in flight go on with the new ones, each token knowing the version that sampled it.
"""

import asyncio
import queue
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence, Set
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from entroray.engine.checked_transfer import agreed, check_transfers, check_workers, received
from entroray.engine.cpu_engine import StepThreads, forget_ray_threads
from entroray.engine.overlap import RestlessError, come_to_rest, go_on
from entroray.engine.served_version import check_attempt
from entroray.engine.starting import ask_workers, drain_notes, runner, sleep_level, start_llm
from entroray.engine.vllm_request import (
    Noted,
    Request,
    as_rollout,
    end_tokens,
    has_begun,
    partial_completion,
    probe_params,
    processed,
    prompt_logprobs,
    sampling_params,
    unfinished_rollout,
    without_notes,
)
from entroray.engine.waiting import BEAT, Waiting, as_they_end
from entroray.engine.weight_bytes import Digest, digest, void_weights
from entroray.errors import InfrastructureError
from entroray.policy.tokenizer import response_text, vocabulary_hash
from entroray.train.pulse import TURN, TURNS
from entroray.types import Draw, Rollout, Status

TICK = 0.2
"""Seconds the idle thread sleeps, and between looks at which samples have begun."""


class Generator:
    """A vLLM engine serving one model; constructed inside its Ray actor."""

    def __init__(self, model: str, *, dtype: Any, max_length: int, seed: int, engine: Mapping[str, Any]):
        """`model` may be the folder of a LoRA adapter, which names its base."""
        self.model, self.dtype, self.seed, self.max_length = model, dtype, seed, max_length
        self.options, self.masks = engine, bool(engine.get("return_sampling_mask"))
        """Whether vLLM tells the set that each token was drawn from."""
        self.inbox: queue.SimpleQueue[tuple[Callable[[Future], object], Future]] = queue.SimpleQueue()
        self.waiting: dict[str, Waiting] = {}
        self.owner: dict[str, str] = {}
        self.serial, self.tag = 0, uuid.uuid4().hex
        """Tells this engine's requests from those of another in the same process, to the sampler."""
        self.paused = self.updating = False
        """Between beginning and commit of an update; whether one is open in vLLM."""
        self.asleep = 0
        """vLLM's level of sleep, with weights and cache off the card; 0 is awake."""
        self.salt = 0
        """Of prompts in the prefix cache, changed by an update that keeps it: later prompts find nothing."""
        self.moved = self.next_look = self.asked = 0.0
        """When a sample last ended or was under way, when to look again, when workers were last asked."""
        self.staged: tuple[str, list[np.ndarray]] | None = None
        self.failure: InfrastructureError | None = None
        self.ready: Future[float] = Future()
        self.thread = threading.Thread(target=self._serve, name="engine", daemon=True)
        self.thread.start()

    # --- called over Ray; each returns when the engine thread has answered ---

    async def start(self) -> float:
        """Seconds the engine took to load and warm up."""
        return await asyncio.wrap_future(self.ready)

    async def describe(self) -> dict[str, str]:
        """What decides what a seed draws and how it is read: vLLM's runner, its tokenizer's vocabulary."""
        vocabulary = lambda: vocabulary_hash(self.llm.get_tokenizer())
        return await self._run(lambda: {"runner": self.runner, "vocabulary": vocabulary()})

    async def sample(self, request: Request) -> list[Rollout]:
        """One rollout per seed; those not done `deadline` seconds after their first token are `timeout`."""
        return await self._post(lambda future: self._admit(request, future))

    async def sample_all(self, requests: Sequence[Request]) -> AsyncIterator[dict[int, list[Rollout]]]:
        """What `sample` gives, by index, of requests as they finish; {} where none has for a while.

        All are admitted between two steps of the engine, so the batches they run in are always the same.
        """
        futures: list[Future] = [Future() for _ in requests]

        def admit(admitted: Future) -> None:
            keys: list[str] = []
            try:
                for request, future in zip(requests, futures, strict=True):
                    keys.append(self._admit(request, future))
            except Exception:  # boundary: vLLM refuses one request, and nobody waits for the others then
                for key in keys:
                    self._forget(key)
                raise
            admitted.set_result(None)

        await self._post(admit)
        async for ended in as_they_end(futures, lambda: TURNS.count):
            yield ended

    async def prompt_logprobs(self, token_ids: Sequence[int]) -> list[float]:
        """Log-prob (nats, T=1) of every token but the first, under the weights served now."""
        request = Request("probe", tuple(token_ids), (0,), Draw(1.0, 1), deadline=60.0)
        return await self._post(lambda future: self._admit(request, future, probe=True))

    async def stage(self, payload: list[np.ndarray]) -> str:
        """Hold new weights beside the engine while it goes on; returns the hash of what arrived."""
        self.staged = await asyncio.to_thread(digest, payload), payload
        return self.staged[0]

    async def init_weight_transfer_engine(self, info: Mapping[str, Any]) -> None:
        await self._run(lambda: self._connect(info))

    async def sleep(self) -> None:
        """Leave the card to the learner until the next sync, which brings all weights: they are dropped."""
        await self._run(self._sleep)

    async def replace_weights(self, info: Mapping[str, Any], version: int, keep_kv: bool) -> Any:
        """The three calls below between two steps, on what is staged."""

        def replaced() -> tuple[int, Digest]:
            check_attempt(self.llm.get_weight_version(), version)
            self._open()
            self._load_staged(info)
            return self._commit(version, keep_kv)

        return await self._run(replaced)

    async def start_weight_update(self) -> None:
        """Pause between two steps and open the model for loading."""
        await self._run(self._open)

    async def update_weights(self, info: Mapping[str, Any]) -> None:
        await self._run(lambda: self._load_staged(info))

    async def finish_weight_update(self, version: int, keep_kv: bool) -> tuple[int, Digest]:
        """Commit and go on; acknowledges (version, hash or sums).

        Keys and values of the old weights are dropped, or with `keep_kv` kept for the requests under way.
        """
        return await self._run(lambda: self._commit(version, keep_kv))

    async def abort(self) -> None:
        """Give up every sample that is under way."""
        await self._run(lambda: self._end(lambda waiting: waiting.left, Status.ABANDONED))

    async def use_threads(self, number: int) -> None:
        """Compute with at most `number` CPU threads from the next step on."""
        await self._run(lambda: setattr(self.threads, "most", number))

    async def check_alive(self) -> None:
        """Return once the engine's thread answers; InfrastructureError if it has died."""
        await self._run(lambda: None)

    # --- the engine thread ---

    def _serve(self) -> None:
        try:
            self._load()
            while True:
                self._turn()
        except BaseException as error:  # boundary: the thread's death must reach every waiter
            self.failure = InfrastructureError(f"the engine's thread died: {error!r}")
            TURNS.failure = str(self.failure)
            unread = [future for _, future in self._drain(block=False)]
            for future in (self.ready, *(w.future for w in self.waiting.values()), *unread):
                if not future.done():
                    future.set_exception(self.failure)
            raise

    def _load(self) -> None:
        forget_ray_threads()
        began = time.monotonic()
        sizes = {"dtype": self.dtype, "max_model_len": self.max_length}
        self.llm = start_llm(model=self.model, seed=self.seed, **sizes, **self.options)
        self.llm.collective_rpc(check_transfers)
        self.engine, tokenizer = self.llm.llm_engine, self.llm.get_tokenizer()
        self.read = response_text(tokenizer, end_tokens(self.llm.model_config, tokenizer))
        self.threads, self.runner = StepThreads(self.llm), runner(self.llm)
        self.llm.update_weight_version("0")
        self._warm_up()
        TURNS.limit = TURNS.usual
        self.ready.set_result(time.monotonic() - began)

    def _warm_up(self) -> None:
        done, draw = Future[Any](), Draw(1.0, 4, top_k=int(self.masks))
        self._admit(Request("warm-up", (1, 2, 3), (0, 1), draw, deadline=600.0, queue=600.0), done)
        while not done.done():
            self._collect(self.engine.step())
        come_to_rest(self.llm, self._collect)
        self.engine.reset_prefix_cache()
        go_on(self.llm)

    def _turn(self) -> None:
        TURNS.count += 1
        busy = self.engine.has_unfinished_requests() and not self.paused
        for action, future in self._drain(block=not busy):
            try:
                action(future)
            except Exception as error:  # boundary: the caller gets it, the engine thread lives on
                future.set_exception(error)
                if isinstance(error, RestlessError):
                    self.failure = error
        if self.failure is not None:
            raise self.failure
        if (samples := self.engine.get_num_unfinished_requests()) and not self.paused:
            self.threads.fit(samples)
            self._collect(self.engine.step())
        elif time.monotonic() > self.asked + BEAT:
            self.asked = ask_workers(self.llm)
        self._expire(time.monotonic())

    def _drain(self, *, block: bool) -> list[tuple[Callable[[Future], object], Future]]:
        actions = []
        try:
            if block:
                actions.append(self.inbox.get(timeout=TICK))
            while True:
                actions.append(self.inbox.get_nowait())
        except queue.Empty:
            return actions

    def _admit(self, request: Request, future: Future, *, probe: bool = False) -> str:
        """The key of a request that is under way; what vLLM refuses is raised, and nothing of it is left."""
        self.serial += 1
        key, now = f"{self.serial}", time.monotonic()
        request = without_notes(request) if self.masks else request
        names = [f"{key}-{i}" for i in range(len(request.seeds))]
        self.waiting[key] = Waiting(request, future, now, set(names))
        self.owner |= dict.fromkeys(names, key)
        self.next_look = min(self.next_look, now + request.deadline)
        prompt, lora = self._prompt(request), getattr(self.llm, "adapter", None)
        try:
            for name, seed in zip(names, request.seeds, strict=True):
                own = request, seed, f"{self.tag}-{name}", self.masks
                wanted = probe_params(self.masks) if probe else sampling_params(*own)
                self.engine.add_request(name, prompt, wanted, lora_request=lora)
        except Exception:  # boundary: vLLM has an exception for each thing it refuses
            self._forget(key)
            raise
        return key

    def _prompt(self, request: Request) -> dict[str, Any]:
        salt = self.salt + self.paused  # under an update it will be read by the new weights
        return {"prompt_token_ids": request.input_ids} | ({"cache_salt": f"{salt}"} if salt else {})

    def _forget(self, key: str) -> None:
        """Abort a request that nobody waits for."""
        waiting = self.waiting.pop(key)
        self.engine.abort_request(sorted(waiting.left))
        for name in waiting.left:
            self.owner.pop(name, None)

    def _collect(self, outputs: list[Any]) -> None:
        if finished := [output for output in outputs if output.finished]:
            self.moved = time.monotonic()
        keys = [self.owner.pop(output.request_id) for output in finished]
        owners = [self.waiting[key] for key in keys]
        pairs = zip(finished, owners, strict=True)
        noted = [o.request_id for o, w in pairs if processed(w.request.draw, self.masks)]
        notes = dict(zip(noted, self._drain_notes(noted), strict=True))
        for output, waiting in zip(finished, owners, strict=True):
            self._deliver(waiting, output, notes.get(output.request_id))
        for key in dict.fromkeys(keys):  # once all that finished in this step are in
            self._settle(key)

    def _deliver(self, waiting: Waiting, output: Any, notes: Noted | None) -> None:
        if output.prompt_token_ids != waiting.request.input_ids:
            raise InfrastructureError(f"the engine read {output.prompt_token_ids}, not what it was given")
        if output.prompt_logprobs is not None:
            waiting.done[output.request_id] = prompt_logprobs(output)  # type: ignore[assignment]
        else:
            TURNS.limit = TURN  # a whole wave has been read: the longest turn is known
            waiting.done[output.request_id] = as_rollout(waiting.request, output.outputs[0], self.read, notes)
        waiting.left.discard(output.request_id)

    def _drain_notes(self, names: Sequence[str]) -> list[Noted | None]:
        """The sampler's notes on requests that are over, once; every rank has the same."""
        return drain_notes(self.llm, self.runner, [f"{self.tag}-{n}" for n in names]) if names else []

    def _settle(self, key: str) -> None:
        """Answer when every sample is in, or enough of them are."""
        waiting = self.waiting[key]
        enough = waiting.request.draw.enough
        usable = [n for n, r in waiting.done.items() if isinstance(r, Rollout) and r.status.usable]
        if enough is not None and len(usable) >= enough:
            self._give_up(waiting, waiting.left, Status.ABANDONED)
            for name in usable[enough:]:  # as they finished
                waiting.done[name] = replace(waiting.done[name], status=Status.ABANDONED)
        if waiting.left:
            return
        del self.waiting[key]
        results = [waiting.done[n] for n in sorted(waiting.done, key=lambda n: int(n.rpartition("-")[2]))]
        if not waiting.future.done():  # else cancelled; a probe has one result, which is no rollout
            waiting.future.set_result(results if isinstance(results[0], Rollout) else results[0])

    def _expire(self, now: float) -> None:
        """Give up what is out of time."""
        if now < self.next_look:
            return
        under_way = [w.look(now, partial(has_begun, self.engine)) for w in self.waiting.values()]
        if self.paused or any(under_way):  # then none waits in vain
            self.moved = now
        self._end(lambda waiting: waiting.late(now, self.moved), Status.TIMEOUT)
        self.next_look = now + min([TICK, *(w.request.deadline for w in self.waiting.values())])

    def _end(self, chosen: Callable[[Waiting], Set[str]], status: Status) -> None:
        """Give up these samples of each request."""
        for key, waiting in list(self.waiting.items()):
            if names := chosen(waiting):
                self._give_up(waiting, names, status)
                self._settle(key)

    def _give_up(self, waiting: Waiting, names: Set[str], status: Status) -> None:
        """Abort these samples of a request, and keep what there is of them."""
        late = sorted(names)
        begun = [partial_completion(self.engine, name) for name in late]
        self.engine.abort_request(late)
        if processed(waiting.request.draw, self.masks):
            self._drain_notes(late)
        for name, there in zip(late, begun, strict=True):
            self.owner.pop(name, None)
            waiting.done[name] = unfinished_rollout(waiting.request, status, there, self.read)
        waiting.left.difference_update(late)

    def _connect(self, info: Mapping[str, Any]) -> None:
        """Meet the learner anew; what was there of the last meeting leaves the card."""
        self._end_update()
        self.llm.shutdown_weight_transfer_engine()
        self.llm.init_weight_transfer_engine({"init_info": dict(info)})
        check_workers(self.llm)

    def _sleep(self) -> None:
        if not self.asleep:
            come_to_rest(self.llm, self._collect)
            self.asleep = sleep_level(self.options)
            self.llm.sleep(level=self.asleep)

    def _end_update(self) -> None:
        """Close an update that was cut short, so that the next one counts none of its layers as loaded."""
        if self.updating:
            self.llm.finish_weight_update()
        self.updating = False

    def _open(self) -> None:
        come_to_rest(self.llm, self._collect)
        self._end_update()
        if self.asleep and not self.paused:  # keys and values wake last: the learner holds what it sends
            self.llm.wake_up(tags=["weights"])
            if self.asleep == 2:
                self.llm.collective_rpc(void_weights)
        self.paused = True
        self.threads.take(self.threads.most)
        self.llm.start_weight_update()
        self.updating = True

    def _load_staged(self, info: Mapping[str, Any]) -> None:
        staged = {} if self.staged is None else {"payload": self.staged[1]}
        self.llm.update_weights({"update_info": dict(info) | staged})
        check_workers(self.llm)

    def _commit(self, version: int, keep_kv: bool) -> tuple[int, Digest]:
        self.llm.finish_weight_update(weight_version=str(version))
        self.updating = False
        if self.asleep:
            self.llm.wake_up(tags=["kv_cache"])
            self.asleep = 0
        if keep_kv:
            self.salt += 1
        else:  # without this the cache serves old keys and values under the new version
            self.engine.reset_prefix_cache(reset_running_requests=True)
        arrived = self.staged[0] if self.staged else agreed(self.llm.collective_rpc(received))
        self.staged, self.paused = None, False
        go_on(self.llm)
        return int(self.llm.get_weight_version()), arrived

    # --- from Ray's thread to the engine's ---

    async def _run(self, action: Callable[[], Any]) -> Any:
        return await self._post(lambda future: future.set_result(action()))

    async def _post(self, action: Callable[[Future], object]) -> Any:
        future: Future = Future()
        self.inbox.put((action, future))
        if self.failure is not None:  # looked at last: once it is set, nobody may read the inbox any more
            raise self.failure
        return await asyncio.wrap_future(future)
