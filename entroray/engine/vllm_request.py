"""What is asked of an engine, in vLLM's terms, and what it answers, in ours."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from entroray.engine.served_version import version_of
from entroray.errors import InfrastructureError
from entroray.kept_sets import KeptSets, encode
from entroray.metrics.diversity import Loops
from entroray.rollout.reshape import FIXED
from entroray.types import Draw, Rollout, SamplerNotes, Status, TopTokens

PROCESSOR = "entroray.engine.logits_processor:Shaping"
"""The logits processor that samplers run in, as vLLM loads it."""
QUEUE = 300.0
"""Seconds that a sample without a token waits for an engine at work on nothing, unless a user says more."""
CUT = ("length", "repetition")
"""vLLM's reasons for ending a response that was not done."""
Read = Callable[[Sequence[int]], str]
"""The ids of a response -> its text."""


class Noted(NamedTuple):
    """What our logits processor noted of a request."""

    values: NDArray[np.float32]  # [positions, 3] entropy, varentropy, temperature; NaN where nothing was
    kept: KeptSets
    """Of each position; of none where the request asked for none."""


@dataclass(frozen=True)
class Request:
    """One prompt, `len(seeds)` samples; a seed makes a sample repeatable whatever runs beside it."""

    prompt_id: str
    token_ids: tuple[int, ...]
    seeds: tuple[int, ...]
    draw: Draw
    deadline: float
    """Seconds from the first token of a sample to its last."""
    after: tuple[int, ...] = ()
    """Tokens the response already has; they count against `draw.max_tokens`."""
    queue: float = QUEUE
    """The most that `patience` is."""

    @property
    def patience(self) -> float:
        """Seconds of waiting for a first token, and for a sign of the engine's life."""
        return min(self.deadline, self.queue)

    @property
    def input_ids(self) -> list[int]:
        """What the engine reads before it draws."""
        return [*self.token_ids, *self.after]


def without_notes(request: Request) -> Request:
    """As an engine that takes no logits processor draws it: an evaluation's entropies are not noted."""
    draw = request.draw
    return replace(request, draw=replace(draw, rule={})) if draw.rule == FIXED else request


def processed(draw: Draw, masks: bool) -> bool:
    """Whether our logits processor draws; it cuts where vLLM does not tell the sets itself (`masks`)."""
    return draw.notes or (draw.kept and not masks)


def sampling_params(request: Request, seed: int, name: str, masks: bool = False) -> Any:
    """As vLLM takes a request; with `masks` it takes none without top_k, and none at temperature 0."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    draw = request.draw
    reshaping = {
        "name": name,
        "rule": json.dumps(draw.rule or FIXED, sort_keys=True),
        "factor": draw.factor,
        "insert": draw.insert,
        "kept": [draw.top_k, draw.top_p] if draw.kept else None,
    }
    ours = processed(draw, masks)
    greedy = masks and draw.temperature == 0  # its likeliest token is then that of one
    whole = ours and draw.kept
    return SamplingParams(
        temperature=1.0 if greedy else draw.temperature,
        max_tokens=draw.max_tokens - len(request.after),
        min_tokens=draw.min_tokens,
        stop=list(draw.stop),
        top_p=1.0 if whole else draw.top_p,
        top_k=0 if whole else 1 if greedy else draw.top_k,
        extra_args={"entroray": reshaping} if ours else None,
        seed=seed,
        logprobs=draw.top_tokens,
        flat_logprobs=True,
        detokenize=bool(draw.stop),
        skip_special_tokens=False,  # else a stop string that is one would never be seen
        spaces_between_special_tokens=False,
        include_stop_str_in_output=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
        repetition_detection=_detection(Loops(draw.repetitions)) if draw.repetitions else None,
    )


def _detection(loops: Loops) -> Any:
    from vllm.sampling_params import RepetitionDetectionParams

    sizes = {"max_pattern_size": loops.longest, "min_pattern_size": loops.shortest}
    return RepetitionDetectionParams(**sizes, min_count=loops.count)


def probe_params(masks: bool = False) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        max_tokens=1,
        top_k=int(masks),
        prompt_logprobs=0,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def as_rollout(request: Request, completion: Any, read: Read, noted: Noted | None) -> Rollout:
    token_ids = np.asarray(completion.token_ids, dtype=np.int32)
    depth = request.draw.top_tokens
    reported = np.array(completion.logprobs.logprobs, dtype=np.float32)
    if request.draw.temperature == 0 and completion.sampling_mask:
        reported[:] = np.nan  # `sampling_params` had it drawn as the only one of its set, so that 0 is said
    logprobs = reported.reshape(len(token_ids), 1 + depth)  # the drawn token comes first
    versions = np.zeros(len(token_ids), dtype=np.int32)
    for span in completion.weight_versions or ():
        versions[span.start : span.end] = version_of(span.version)
    return Rollout(
        prompt_id=request.prompt_id,
        token_ids=token_ids,
        logprobs=np.ascontiguousarray(logprobs[:, 0]),
        versions=versions,
        text=_text(request, completion, read),
        temperature=request.draw.temperature,
        limit=request.draw.max_tokens,
        status=Status.TRUNCATED if completion.finish_reason in CUT else Status.OK,
        notes=_sampler_notes(noted, len(token_ids)) if request.draw.notes else None,
        kept=_kept_sets(completion, noted, token_ids) if request.draw.kept else None,
        top_tokens=_top_tokens(completion, logprobs) if depth else None,
    )


def _top_tokens(completion: Any, logprobs: np.ndarray) -> TopTokens:
    ids = np.asarray(completion.logprobs.token_ids, np.int32).reshape(logprobs.shape)
    return TopTokens(ids[:, 1:].copy(), np.exp(logprobs[:, 1:]))


def _text(request: Request, completion: Any, read: Read) -> str:
    """The whole response as a judge reads it; it ends with the stop string that ended it."""
    ids, stop = [*request.after, *completion.token_ids], completion.stop_reason
    text = read(ids)
    if stop not in request.draw.stop:
        return text
    before = read(ids[:-1]).rstrip("\ufffd")  # the last token may reach beyond the stop string
    start = text.find(stop, max(0, len(before) + 1 - len(stop)))
    return text if start < 0 else text[: start + len(stop)]


def _kept_sets(completion: Any, noted: Noted | None, token_ids: NDArray[np.int32]) -> KeptSets:
    """The set each token was drawn from; InfrastructureError where one is missing, or not of its token.

    By our logits processor, or by vLLM's own sampling mask, whose ids come in rising order.
    """
    mask = None if noted else completion.sampling_mask
    sets = [np.array(ids, np.int32) for ids in (mask.token_ids if mask else ())]
    told = noted.kept if noted else KeptSets.of([*map(len, sets)], [encode(ids, 1 << 31) for ids in sets])
    if len(told.sizes) >= len(token_ids):
        found = told.take(np.arange(len(token_ids)))
        if found.hold(token_ids):
            return found
    raise InfrastructureError(
        f"the sampler has not told the set of tokens that each of {len(token_ids)} was drawn from "
        f"(sampler.top_p, sampler.top_k), or another one: {len(told.sizes)} sets came. The engine must be "
        "started as actors.start_actors does"
    )


def _sampler_notes(noted: Noted | None, length: int) -> SamplerNotes:
    """The first `length` positions of a request's notes; InfrastructureError when one is missing."""
    notes = noted.values if noted else None
    if notes is None or len(notes) < length or np.isnan(notes[:length, :2]).any():
        raise InfrastructureError(
            f"the sampler has no notes on some of {length} tokens it was asked to measure: the engine must "
            "be started with the logits processor of entroray/engine/logits_processor.py "
            "(actors.engine_options does)"
        )
    return SamplerNotes(*np.ascontiguousarray(notes[:length].T))


def unfinished_rollout(request: Request, status: Status, so_far: Any | None, read: Read) -> Rollout:
    """What there is of a sample that was not waited for, and why; without its sampler's notes and sets."""
    if so_far is not None and len(so_far.token_ids):
        plain = replace(request, draw=replace(request.draw, kept=False, rule={}, factor=1.0))
        return replace(as_rollout(plain, so_far, read, None), status=status)
    none = np.empty(0, dtype=np.int32)
    draw = request.draw
    columns = none, none.astype(np.float32), none
    return Rollout(request.prompt_id, *columns, "", draw.temperature, draw.max_tokens, status)


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end a response, as vLLM takes them from its `ModelConfig` and the tokenizer."""
    from vllm import SamplingParams

    params = SamplingParams()
    params.update_from_generation_config(model.try_get_generation_config(), tokenizer.eos_token_id)
    return frozenset(params.all_stop_token_ids)


def has_begun(engine: Any, name: str) -> bool:
    """Whether a request under way has a token."""
    books = engine.output_processor
    return any(not books.request_states[i].is_prefilling for i in books.external_req_ids.get(name, ()))


def partial_completion(engine: Any, name: str) -> Any | None:
    """The completion of a request under way, as if it ended here, from vLLM's own books; None without one.

    An abort returns nothing, and these tokens were drawn all the same.
    """
    from vllm.v1.engine import FinishReason

    books = engine.output_processor
    states = [books.request_states[i] for i in books.external_req_ids.get(name, ())]
    outputs = [state.make_request_output([], None, FinishReason.ABORT, None) for state in states]
    return outputs[0].outputs[0] if outputs else None


def prompt_logprobs(output: Any) -> list[float]:
    pairs = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
    return [step[token].logprob for token, step in pairs]
