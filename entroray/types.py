"""The nouns of the system, in the order data meets them; each is complete at birth.

Axes: G rollouts of one prompt, B rows (rollouts) of a step, L tokens of one response, N response
tokens of all rows, flat. Index t always means response token t: `logprobs[t]` scores `token_ids[t]`.
"""

from __future__ import annotations  # without torch, which a verifier does not need and takes seconds

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from entroray.kept_sets import KeptSets

Version = int
"""Committed steps a set of weights has been through; 0 is the model the run started from."""


class Status(StrEnum):
    """How a sample ended; only `OK` and `TRUNCATED` may reach an advantage."""

    OK = "ok"
    TRUNCATED = "truncated"
    TIMEOUT = "timeout"
    INFRA_FAILED = "infra_failed"
    DATA_FAILED = "data_failed"
    ABANDONED = "abandoned"
    """Given up while others of its group had finished (rollout.early); not a failure."""

    @property
    def usable(self) -> bool:
        return self in (Status.OK, Status.TRUNCATED)


@dataclass(frozen=True)
class Prompt:
    """A question, tokenised, and what its verifier needs to judge an answer."""

    id: str
    """Hash of the task and the rendered question; the same in every run."""
    text: str
    token_ids: tuple[int, ...]
    reference: str
    """The known right answer, or one of them."""
    entry: Mapping[str, Any] = field(default_factory=dict)
    """The data row itself, for verifiers that need more than `reference`."""
    domain: str = ""
    """The part of a mixture it is of."""
    alternatives: tuple[str, ...] = ()
    """Further right answers, besides `reference`."""


@dataclass(frozen=True)
class Draw:
    """How responses are drawn: it travels with each call, so that a call under way keeps its own."""

    temperature: float
    """Of the policy, in the learner too; 0 takes the most probable token."""
    max_tokens: int
    """Longest response, tokens that it already has included."""
    stop: tuple[str, ...] = ()
    """Strings that end a response besides the end token."""
    top_p: float = 1.0
    top_k: int = 0
    kept: bool = False  # whether each token comes with the set that these left it (`Rollout.kept`)
    rule: Mapping[str, Any] = field(default_factory=dict)
    """{fn: ..., settings} of rollout/temperature_rules.py; if empty, the policy's own distribution is drawn
    from, and nothing is noted of it."""
    factor: float = 1.0
    """On the temperature drawn at; the log-probs are of what was drawn from."""
    insert: int | None = None
    """Token to put where the rule is unsure, once a response."""
    enough: int | None = None
    """Responses of a call after which the others are given up; None waits for all."""
    top_tokens: int = 0
    """Most probable tokens to report at each position."""
    min_tokens: int = 0
    """Tokens before which a response cannot end; there the end token has probability 0."""
    repetitions: int = 0
    """Times in a row that its last tokens repeat when a response is stopped; 0 never stops one."""

    @property
    def notes(self) -> bool:
        """Whether the sampler notes entropies (`Rollout.notes`)."""
        return bool(self.rule) or self.factor != 1.0

    def greedy(self, top_tokens: int = 0) -> Draw:
        """The most probable token each time, nothing reshaped or noted."""
        return replace(self, temperature=0.0, kept=False, rule={}, factor=1.0, top_tokens=top_tokens)


class MaskReason(StrEnum):
    """Why a response token is an observation: something the policy sees and learns nothing from."""

    INSERTED = "inserted"  # put there by a sampler
    PREFIX = "prefix"  # a sibling's, trained on there
    FORCED = "forced"  # chosen for the policy, not drawn from it
    TOOL = "tool"  # what a tool answered
    TOOL_ERROR = "tool_error"  # what stands for the answer of a tool that failed


REASONS = tuple(MaskReason)
"""In the order of the indices that `Rollout.observed` holds."""


@dataclass(frozen=True)
class Span:
    """Response tokens [start, stop) that are observations, and why."""

    start: int
    stop: int
    why: MaskReason


@dataclass(frozen=True)
class SamplerNotes:
    """What the sampler measured at each token; entropies are of the policy, before any reshaping."""

    entropy: NDArray[np.float32]  # [L] nats, of the policy's distribution at its own temperature
    varentropy: NDArray[np.float32]  # [L] nats^2
    temperature: NDArray[np.float32]  # [L] really used; 0 where the likeliest was taken, NaN where inserted

    @property
    def inserted(self) -> NDArray[np.bool_]:
        """Tokens that were put there, not drawn: observations, which nothing may be learnt from."""
        return np.isnan(self.temperature)


@dataclass(frozen=True)
class TopTokens:
    """The m most probable tokens at each position by falling probability, after temperature; greedy: at 1."""

    token_ids: NDArray[np.int32]  # [L, m]
    probabilities: NDArray[np.float32]  # [L, m]


@dataclass(frozen=True)
class Rollout:
    """One sampled response, with what the sampler knew while sampling it."""

    prompt_id: str
    token_ids: NDArray[np.int32]  # [L]
    logprobs: NDArray[np.float32]  # [L] nats, of the distribution really sampled from
    versions: NDArray[np.int32]  # [L] weights that sampled each token
    text: str
    temperature: float
    """Of the policy, in the learner too; a sampler that reshapes says in `notes` what it drew at."""
    limit: int
    """Most tokens this response was allowed."""
    status: Status = Status.OK
    notes: SamplerNotes | None = None
    """None if the sampler kept none."""
    kept: KeptSets | None = None  # what each token was drawn from; None: the vocabulary
    spans: tuple[Span, ...] = ()
    """Observations besides inserted tokens, which are in `notes`."""
    parent: int | None = None  # index in its group of the rollout whose first tokens it shares
    seed: int | None = None  # that it was drawn with; None: its generator tells none
    top_tokens: TopTokens | None = None
    """None where nobody asked for it."""
    replayed: bool = False
    """A success of old put into this group: off-policy on purpose, exempt from `driver.max_lag`."""

    @property
    def length(self) -> int:
        return len(self.token_ids)

    @cached_property
    def observed(self) -> NDArray[np.int8]:
        """[L] index into `REASONS` of what is an observation, -1 where the policy drew the token."""
        why = self._observed(self.spans)
        why.setflags(write=False)  # everybody is given the same
        return why

    def _observed(self, spans: Iterable[Span]) -> NDArray[np.int8]:
        why = np.full(self.length, -1, dtype=np.int8)
        if self.notes is not None:
            why[self.notes.inserted] = REASONS.index(MaskReason.INSERTED)
        for span in spans:
            why[span.start : span.stop] = REASONS.index(span.why)
        return why

    @property
    def inherited(self) -> int:
        """How many of its first tokens are its parent's; 0 without one."""
        return max((span.stop for span in self.spans if span.why is MaskReason.PREFIX), default=0)

    @property
    def drawn_before(self) -> int:
        """How many of its inherited tokens the policy drew: without what was inserted, forced or a tool's."""
        own = [span for span in self.spans if span.why is not MaskReason.PREFIX]
        return int((self._observed(own)[: self.inherited] < 0).sum())

    @cached_property
    def drawn(self) -> int:
        """Tokens that the policy drew for it; none where it was replayed."""
        if self.notes is None and not self.spans:
            return 0 if self.replayed else self.length
        return 0 if self.replayed else int((self.observed < 0).sum())

    @cached_property
    def version(self) -> Version:
        """Oldest weights used."""
        return int(self.versions.min()) if self.length else 0


@dataclass(frozen=True)
class Verdict:
    """A verifier's judgement of one rollout. Reward is not correctness: keep rules read `correct`."""

    reward: float
    correct: bool
    """False if `status` is not usable: a response without a verdict is not right."""
    answer: str | None = None
    parts: Mapping[str, float] = field(default_factory=dict)
    """What the reward is made of, by name; journalled as `reward/part_<name>`, and read by nothing else."""
    status: Status = Status.OK
    detail: str = ""


@dataclass(frozen=True)
class Answer:
    """What a tool said to one call; where `status` is not usable it said nothing, by no fault of the call."""

    text: str
    failed: bool = False
    """The text stands for an answer that the tool could not give."""
    status: Status = Status.OK
    detail: str = ""


@dataclass(frozen=True)
class Group:
    """G rollouts of one prompt, each judged: the unit advantages are computed on."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    verdicts: tuple[Verdict, ...]
    earlier: tuple[Group, ...] = ()
    """Judged draws of this prompt that this one took the place of; the first at the policy's temperature."""
    abandoned: tuple[Rollout, ...] = ()
    """Drawn beside these and given up when enough had finished."""
    replaced: tuple[Rollout, ...] = ()
    """Drawn for it, and gone to make room for what was replayed."""

    def __post_init__(self) -> None:
        if len(self.rollouts) != len(self.verdicts):
            raise ValueError(
                f"group of {self.prompt.id}: {len(self.rollouts)} rollouts but {len(self.verdicts)} verdicts"
            )

    @property
    def draws(self) -> tuple[Group, ...]:
        """Every judged draw of this prompt, this one last."""
        return (*self.earlier, self)

    @property
    def rewards(self) -> Float[Tensor, " G"]:
        import torch

        return torch.tensor([v.reward for v in self.verdicts], dtype=torch.float64)

    @property
    def correct(self) -> Float[Tensor, " G"]:
        import torch

        return torch.tensor([v.correct for v in self.verdicts], dtype=torch.float64)

    @property
    def share_right(self) -> float:
        """Share of right answers among those drawn for it: without what was replayed; NaN of none."""
        drawn = [v.correct for r, v in zip(self.rollouts, self.verdicts, strict=True) if not r.replayed]
        return sum(drawn) / len(drawn) if drawn else float("nan")

    @property
    def lengths(self) -> Float[Tensor, " G"]:
        import torch

        return torch.tensor([r.length for r in self.rollouts], dtype=torch.float64)

    @cached_property
    def version(self) -> Version:
        """Oldest weights that sampled any of its tokens, those of replayed rollouts apart."""
        return min(r.version for r in self.rollouts if not r.replayed)


@dataclass(frozen=True)
class Batch:
    """Rows as the learner reads them: prompt and response ids, flat, cut by lengths."""

    prompt_ids: NDArray[np.int32]  # [sum of prompt lengths]
    prompt_lengths: NDArray[np.int32]  # [B]
    response_ids: NDArray[np.int32]  # [N]
    response_lengths: NDArray[np.int32]  # [B]
    temperatures: NDArray[np.float32]  # [B]
    kept: KeptSets | None = None  # of the N response tokens

    @property
    def num_rows(self) -> int:
        return len(self.response_lengths)

    def cut(self, pieces: Sequence[NDArray[np.int64]]) -> list[Batch]:
        """For each piece, a choice of rows, a batch of these in that order."""
        from entroray.ops import token_places

        lengths = self.prompt_lengths, self.response_lengths
        places = zip(pieces, *(token_places(length, pieces) for length in lengths), strict=True)
        ids, heat = (self.prompt_ids, self.response_ids), self.temperatures
        of = lambda r: self.kept and self.kept.take(r)
        return [
            Batch(ids[0][p], lengths[0][rows], ids[1][r], lengths[1][rows], heat[rows], of(r))
            for rows, p, r in places
        ]


@dataclass(frozen=True)
class Counts:
    """What one optimizer update averages over, on all ranks together."""

    tokens: int  # of responses, whose mask is set
    kept_tokens: int  # those among them whose scale is not 0
    rollouts: int
    prompts: int


@dataclass(frozen=True)
class Tokens:
    """Response tokens as one policy sees them, flat: all that an objective may read.

    Before the update `logprobs` equals `old_logprobs` and nothing carries a gradient; inside it,
    `logprobs` and `entropy` are live. What the update itself is to score is NaN before it. Per-token fields
    are [N], per-row fields [B].
    """

    row: Int[Tensor, " N"]  # index into the per-row fields
    position: Int[Tensor, " N"]
    uid: Int[Tensor, " N"]  # identity within the step, whatever the cut or order
    mask: Bool[Tensor, " N"]  # True where the loss applies
    logprobs: Float[Tensor, " N"]
    entropy: Float[Tensor, " N"]
    varentropy: Float[Tensor, " N"]
    old_logprobs: Float[Tensor, " N"]
    behavior_logprobs: Float[Tensor, " N"]
    ref_logprobs: Float[Tensor, " N"] | None
    temperature: Float[Tensor, " N"]
    advantages: Float[Tensor, " N"]
    scale: Float[Tensor, " N"]
    """Factor on the surrogate: every `scales` function multiplied."""
    correction: Float[Tensor, " N"]
    """Detached sampler-to-learner importance weight."""
    selected: Bool[Tensor, " N"]
    group: Int[Tensor, " B"]
    length: Int[Tensor, " B"]
    reward: Float[Tensor, " B"]
    correct: Float[Tensor, " B"]
    version: Int[Tensor, " B"]
    step: int
    counts: Counts
    extra: Mapping[str, Float[Tensor, " N"]] = field(default_factory=dict)
    """Further statistics of the distribution, by the name an objective asked for in `needs`."""
    drawn_before: Int[Tensor, " B"] | None = None
    """Tokens before a branch that the policy drew, outside the mask here; None where nothing branched."""
    seed: int = 0
    """Of the run: with step and uid it decides what is selected by chance."""

    @classmethod
    def from_columns(cls, **columns: Any) -> Tokens:
        """Tokens of one update from the columns that `ops.fill_columns` takes, which fills in the others."""
        from entroray.ops import fill_columns

        filled = fill_columns(**columns)
        tokens, rollouts, prompts = len(filled["row"]), len(filled["length"]), len(filled["group"].unique())
        return cls(**{"counts": Counts(tokens, tokens, rollouts, prompts)} | filled)

    def cut(self, pieces: Sequence[NDArray[np.int64]]) -> list[Tokens]:
        """For each piece, a choice of rows, its tokens re-indexed; `counts` stay those of the update."""
        from entroray.ops import cut_columns

        return [replace(self, **cut) for cut in cut_columns(vars(self), PER_ROW, pieces)]

    def take(self, rows: Int[Tensor, " b"]) -> Tokens:
        """The tokens of `rows`, in that order, as `cut` gives them."""
        return self.cut([rows.numpy()])[0]


PER_ROW = frozenset({"group", "length", "reward", "correct", "version", "drawn_before"})
