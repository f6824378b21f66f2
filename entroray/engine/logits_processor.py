"""Samplers inside vLLM: one V1 logits processor that measures H and V, reshapes, cuts, and notes what it did.

A request brings its name and its rule in `SamplingParams.extra_args`. Notes are kept by name and position, so
a pre-empted request goes on where it stopped, and a position sampled twice is overwritten.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

from entroray.engine.vllm_request import Noted
from entroray.kept_sets import KeptSets, encode
from entroray.rollout import reshape, temperature_rules

KEY = "entroray"
"""Of `extra_args`, under which a request says how it is to be drawn."""


class Notes:
    """Entropy, varentropy (nats, before shaping) and temperature really used, by request and position.

    One block [slots, room, 3] that grows, so that a whole batch is noted at once; NaN where nothing was.
    Sets that tokens are drawn from are kept beside it, each as large as it is.
    """

    def __init__(self) -> None:
        self.values: NDArray[np.float32] = np.full((64, 64, 3), np.nan, dtype=np.float32)
        self.length: NDArray[np.int64] = np.zeros(64, dtype=np.int64)
        """Positions noted in each slot."""
        self.sets: dict[int, dict[int, tuple[int, NDArray[Any]]]] = {}
        """Slot -> position -> size of the set, and the set encoded."""
        self.slots: dict[str, int] = {}
        self.free = list(range(64))

    def open(self, name: str, room: int) -> int:
        """The slot of a request: its own again when it comes back from pre-emption."""
        if name in self.slots:
            return self.slots[name]
        slots, length, _ = self.values.shape
        if not self.free or room > length:
            self._grow(slots if self.free else 2 * slots, max(room, length))
        self.slots[name] = slot = self.free.pop()
        return slot

    def _grow(self, slots: int, room: int) -> None:
        old, self.values = self.values, np.full((slots, room, 3), np.nan, dtype=np.float32)
        self.values[: len(old), : old.shape[1]] = old
        self.length = np.pad(self.length, (0, slots - len(old)))
        self.free += range(len(old), slots)

    def note(self, slots: NDArray[np.int64], positions: NDArray[np.int64], values: NDArray) -> None:
        """`values` [slots, 3] at one position of each."""
        self.values[slots, positions] = values
        self.length[slots] = np.maximum(self.length[slots], positions + 1)

    def keep(self, slots: NDArray[np.int64], positions: NDArray[np.int64], held: NDArray[np.bool_]) -> None:
        """The set `held` [slots, V] at one position of each, empty where no token is drawn."""
        for slot, position, row in zip(slots.tolist(), positions.tolist(), held, strict=True):
            ids = np.flatnonzero(row)
            self.sets.setdefault(slot, {})[position] = len(ids), encode(ids, len(row))

    def inserted(self, slot: int, position: int) -> bool:
        """Whether a token was put before `position`: one without a temperature."""
        return bool(np.isnan(self.values[slot, :position, 2]).any())

    def close(self, name: str) -> Noted | None:
        """What there is of a request that is over, up to the last position noted; its slot is free again."""
        slot = self.slots.pop(name, None)
        if slot is None:
            return None
        noted = self.values[slot, : self.length[slot]]
        values = noted.copy()
        noted[:], self.length[slot] = np.nan, 0
        self.free.append(slot)
        sets = self.sets.pop(slot, {})
        pairs = [sets[position] for position in sorted(sets)]
        return Noted(values, KeptSets.of([size for size, _ in pairs], [code for _, code in pairs]))


NOTES = Notes()
"""Of this process; a request's leave with `drain`."""


def drain(worker: Any, names: Sequence[str]) -> list[Noted | None]:
    """What is noted of each finished request, which is forgotten; for `LLM.collective_rpc`."""
    return [NOTES.close(name) for name in names]


@dataclass(frozen=True)
class Row:
    """One request in the batch."""

    slot: int
    """Of its notes."""
    tokens: list[int]
    """Its response so far; vLLM's own list, which grows."""
    rule: str
    temperature: float
    factor: float
    insert: int | None
    kept: tuple[int, float] | None
    """top_k and top_p to cut by, if the sets are to be told."""


@lru_cache(maxsize=64)  # of a rule that a controller moves, each step has its own
def _rule(spec: str) -> partial[temperature_rules.TemperatureChoice]:
    rule = json.loads(spec)
    return reshape.build_rule(rule, [rule["fn"].partition(".")[0]])  # the driver has bound it: it is allowed


def _row(params: SamplingParams, _: list[int] | None, tokens: list[int]) -> Row | None:
    """What a request asks for; None if it asks for nothing."""
    asked: Mapping[str, Any] | None = (params.extra_args or {}).get(KEY)
    if asked is None:
        return None
    slot = NOTES.open(asked["name"], params.max_tokens or 1)
    kept = asked["kept"] and tuple(asked["kept"])
    return Row(slot, tokens, asked["rule"], params.temperature, asked["factor"], asked["insert"], kept)


@dataclass(frozen=True)
class Bundle:
    """Rows of the batch that are under the same rule, and cut alike."""

    rule: partial[temperature_rules.TemperatureChoice]
    rows: list[Row]
    slots: NDArray[np.int64]
    index: Tensor
    factor: Tensor
    """Of each row's prompt."""
    temperature: Tensor
    """Of the policy, which the logits were already divided by."""
    inserts: bool
    """Whether any row has a token to insert."""
    kept: tuple[int, float] | None
    """As of each row."""


class Shaping(LogitsProcessor):
    """Draws each random row by the rule its request brought; rows that brought none are left alone."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool):
        self.device = device
        self.rows: dict[int, Row] = {}
        self.bundles: list[Bundle] = []

    def is_argmax_invariant(self) -> bool:
        """Greedy requests are never shaped, so vLLM may leave them out and run this after the temperature."""
        return True

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if process_dict_updates(self.rows, batch_update, _row):
            self.bundles = self._bundles()

    def _bundles(self) -> list[Bundle]:
        alike: dict[tuple[str, tuple[int, float] | None], list[int]] = {}
        for index in sorted(self.rows):
            alike.setdefault((self.rows[index].rule, self.rows[index].kept), []).append(index)
        return [self._bundle(*how, places) for how, places in alike.items()]

    def _bundle(self, rule: str, kept: tuple[int, float] | None, places: list[int]) -> Bundle:
        rows = [self.rows[place] for place in places]
        on = lambda values: torch.from_numpy(values).to(self.device)
        return Bundle(
            _rule(rule),
            rows,
            np.array([r.slot for r in rows]),
            on(np.array(places)),
            on(np.array([r.factor for r in rows], dtype=np.float32)),
            on(np.array([r.temperature for r in rows], dtype=np.float32)),
            any(r.insert is not None for r in rows),
            kept,
        )

    def apply(self, logits: Tensor) -> Tensor:
        for bundle in self.bundles:
            whole = len(bundle.rows) == len(logits)
            part = logits if whole else logits[bundle.index]
            _draw_from(part, bundle)
            if not whole:
                logits[bundle.index] = part
        return logits


def _draw_from(logits: Tensor, bundle: Bundle) -> None:
    """Measure, reshape in place, and note."""
    entropy, varentropy = reshape.measure_entropy(logits)
    choice = bundle.rule(entropy, varentropy)
    factor = choice.factor * bundle.factor
    reshape.reshape_logits(logits, factor)
    if bundle.kept:
        _truncate(logits, *bundle.kept)
    values = torch.stack((entropy, varentropy, factor * bundle.temperature), -1).cpu().numpy()
    if bundle.inserts and choice.unsure is not None:
        _insert(logits, bundle, choice.unsure, values)
    positions = np.array([len(row.tokens) for row in bundle.rows])
    NOTES.note(bundle.slots, positions, values)
    if bundle.kept:
        held = (logits > -torch.inf).cpu().numpy() & ~np.isnan(values[:, 2:])
        NOTES.keep(bundle.slots, positions, held)


def _truncate(logits: Tensor, top_k: int, top_p: float) -> None:
    """Leave the tokens that vLLM's own sampler would, in place: top-k, then top-p of what is left."""
    like = partial(torch.full, (len(logits),), device=logits.device)
    k = like(min(top_k, logits.shape[1])) if top_k > 0 else None
    logits.copy_(apply_top_k_top_p(logits, k, like(top_p) if top_p < 1 else None))


def _insert(logits: Tensor, bundle: Bundle, unsure: Tensor, values: NDArray[np.float32]) -> None:
    """Put a request's own token where the rule is unsure, once; such a token has no temperature."""
    for place in unsure.nonzero().squeeze(-1).tolist():
        row = bundle.rows[place]
        position = len(row.tokens)
        if row.insert is not None and not NOTES.inserted(row.slot, position):
            at, token = torch.tensor([place]), torch.tensor([row.insert])
            reshape.keep_only(logits, at.to(logits.device), token.to(logits.device))
            values[place, 2] = np.nan
