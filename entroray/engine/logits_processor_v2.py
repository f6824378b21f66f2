"""The sampler of `logits_processor.py` for vLLM's runner V2, which GPUs take: it waits for no card.

V2 calls it before it divides by the temperature. The host knows how long each row is, so where its token
stands; notes go to the host when the card has made them, and are read once they are there.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from vllm import SamplingParams
from vllm.utils.torch_utils import async_tensor_h2d as to_card
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcessor, LogitsProcRequestState

from entroray.engine import logits_processor
from entroray.engine.logits_processor import KEY, NOTES
from entroray.engine.vllm_request import Noted
from entroray.rollout import reshape

PIECE = 1 << 25
"""Logits measured at once: vLLM has not counted the memory that measuring takes."""


class Ask(NamedTuple):
    """How a request is to be drawn."""

    name: str
    rule: str
    insert: int | None


class Pending(NamedTuple):
    """Notes of one step on their way to the host."""

    done: torch.cuda.Event | None
    values: Tensor
    names: list[str]
    """Of its rows; empty where one read a part of its prompt and drew nothing."""
    positions: NDArray[np.int64]


PENDING: deque[Pending] = deque()
"""Of this process, the oldest step first."""


def flush(*, wait: bool = False) -> None:
    """Note what has arrived, or with `wait` all there is; a step beyond a request's end is nobody's."""
    while PENDING:
        done, values, names, positions = PENDING[0]
        if done is not None and not (wait or done.query()):
            return
        if done is not None:
            done.synchronize()
        held = [row for row, name in enumerate(names) if name in NOTES.slots]
        if held:
            slots = np.array([NOTES.slots[names[row]] for row in held])
            NOTES.note(slots, positions[held], values.numpy()[held])
        PENDING.popleft()


def drain(worker: Any, names: Sequence[str]) -> list[Noted | None]:
    """As `logits_processor.drain`: the notes on a token arrive before it does."""
    flush()
    return logits_processor.drain(worker, names)


class Shaping(LogitsProcessor):
    """Draws each random row by the rule its request brought; rows that brought none are left alone."""

    def __init__(self, vllm_config: Any, req_states: LogitsProcRequestState):
        self.states = req_states
        self.asks: dict[int, Ask] = {}
        """By vLLM's slot of a request."""
        self.staged: dict[int, tuple[float, float, float]] = {}
        self.asked = torch.zeros(req_states.max_num_reqs, 3, device=req_states.device)
        """Temperature, factor of the prompt, token to insert (-1: none any more) of each slot."""

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        self.asks.pop(req_idx, None)
        asked = (sampling_params.extra_args or {}).get(KEY)
        if asked is None or sampling_params.temperature == 0:
            return False
        self.asks[req_idx] = ask = Ask(asked["name"], asked["rule"], asked["insert"])
        if ask.name in NOTES.slots:  # it comes back from pre-emption
            flush(wait=True)
        slot = NOTES.open(ask.name, sampling_params.max_tokens or 1)
        begun = int(self.states.prefill_len.np[req_idx] - self.states.prompt_len.np[req_idx])
        token = -1 if ask.insert is None or NOTES.inserted(slot, begun) else ask.insert
        self.staged[req_idx] = (sampling_params.temperature, asked["factor"], token)
        return True

    def apply_staged_writes(self) -> None:
        if self.staged:
            slots = to_card(list(self.staged), self.asked.device, torch.int64)
            self.asked[slots] = to_card(list(self.staged.values()), self.asked.device, torch.float32)
            self.staged.clear()

    def apply(self, logits: Tensor, ctx: LogitsContext) -> Tensor:
        flush()
        by_rule: dict[str, list[int]] = {}
        for row, slot in enumerate(ctx.idx_mapping_np.tolist()):
            if slot in self.asks:
                by_rule.setdefault(self.asks[slot].rule, []).append(row)
        for rows in by_rule.values():
            whole = len(rows) == len(logits)
            places = None if whole else to_card(rows, logits.device, torch.int64)
            part = logits if places is None else logits[places]
            self._draw_from(part, ctx.idx_mapping if places is None else ctx.idx_mapping[places], ctx, rows)
            if places is not None:
                logits[places] = part
        return logits

    def _draw_from(self, logits: Tensor, slots: Tensor, ctx: LogitsContext, rows: list[int]) -> None:
        """Measure, reshape in place, and note; of rows under one rule."""
        held = ctx.idx_mapping_np[rows]
        asks = [self.asks[slot] for slot in held.tolist()]
        lengths = ctx.seq_lens_upper_bound_np[rows]  # exact, but with drafts, beside which there are no rules
        drawn = lengths >= self.states.prefill_len.np[held]
        temperature, own, token = self.asked[slots].unbind(-1)
        entropy, varentropy = _measure(logits, temperature)
        choice = logits_processor._rule(asks[0].rule)(entropy, varentropy)
        factor = choice.factor * own
        reshape.reshape_logits(logits, factor)
        used = factor * temperature
        if choice.unsure is not None and any(ask.insert is not None for ask in asks):
            put = choice.unsure & (token >= 0) & to_card(drawn, logits.device)
            reshape.keep_where(logits, put, token.clamp(min=0).long())
            self.asked[slots, 2] = torch.where(put, -1.0, token)
            used = torch.where(put, torch.nan, used)
        names = [ask.name if here else "" for ask, here in zip(asks, drawn, strict=True)]
        positions = (lengths - self.states.prompt_len.np[held]).astype(np.int64)
        PENDING.append(Pending(*_to_host(torch.stack((entropy, varentropy, used), -1)), names, positions))


def _measure(logits: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """Entropy and varentropy of softmax(logits / temperature), row by row."""
    rows = max(1, PIECE // logits.shape[-1])
    pieces = zip(logits.split(rows), temperature.split(rows), strict=True)
    entropy, varentropy = zip(*(reshape.measure_entropy(z / t[:, None]) for z, t in pieces), strict=True)
    return torch.cat(entropy), torch.cat(varentropy)


def _to_host(values: Tensor) -> tuple[torch.cuda.Event | None, Tensor]:
    """What is done when the second holds `values`; None where it does now."""
    if not values.is_cuda:
        return None, values
    host = torch.empty(values.shape, pin_memory=True).copy_(values, non_blocking=True)
    (done := torch.cuda.Event()).record()
    return done, host
